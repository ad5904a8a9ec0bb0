"""The sampling rule in plain torch.

Negative k of the positive at position b of step t is drawn with the word in lane ``k % 4`` of
Philox(key; b, k // 4, t, attempt) as ``word * I >> 32``. Without exclusion, attempt 0 is the draw. With
exclusion, an item that the user has touched is drawn again with the next attempt; after 16 attempts the word
of attempt 16 gives a rank, ``word * (I - degree) >> 32``, among the untouched items, found by the gap search.
So a negative is uniform over the untouched items however many the user has touched.
"""

import torch
from torch import Tensor

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.philox import Key, philox4x32

ATTEMPTS = 16


def sample_negatives(
    user_index: Tensor,
    num_negatives: int,
    num_items: int,
    *,
    key: Key,
    step: int,
    known_positives: KnownPositives | None = None,
    first_position: int = 0,
) -> Tensor:
    """Draw the negatives of a batch.

    Args:
        user_index: (B,), integer: the users of the batch.
        num_negatives: N.
        num_items: I.
        key: of the stream of negatives.
        step: t, the training step.
        known_positives: what to leave out; None draws from the whole catalogue.
        first_position: the batch position of ``user_index[0]``, where a batch is handled in parts.

    Returns:
        (B, N), int64, in [0, I). Negatives may repeat. Those of a user who has touched every item mean
        nothing: such a positive has weight 0 in the loss.
    """
    users = user_index.long()
    device = users.device
    position = first_position + torch.arange(len(users), device=device)
    quad = torch.arange((num_negatives + 3) // 4, device=device)
    words = philox4x32(key, (position[:, None], quad[None, :], step, 0))
    # 4 x [B, Q] -> [B, N]
    negatives = (
        torch.stack(words, dim=-1).flatten(1)[:, :num_negatives].mul_(num_items).bitwise_right_shift_(32)
    )
    if known_positives is None:
        return negatives

    b, k = known_positives.contains(users[:, None], negatives, repeatedly=True).nonzero(as_tuple=True)
    for attempt in range(1, ATTEMPTS):
        if not len(b):
            return negatives
        drawn = (_word(key, position[b], k, step, attempt) * num_items) >> 32
        negatives[b, k] = drawn
        again = known_positives.contains(users[b], drawn, repeatedly=True)
        b, k = b[again], k[again]
    free = num_items - known_positives.degrees[users[b]]
    b, k, free = b[free > 0], k[free > 0], free[free > 0]
    rank = (_word(key, position[b], k, step, ATTEMPTS) * free) >> 32
    negatives[b, k] = known_positives.untouched(users[b], rank)
    return negatives


def _word(key: Key, position: Tensor, k: Tensor, step: int, attempt: int) -> Tensor:
    words = torch.stack(philox4x32(key, (position, k >> 2, step, attempt)), dim=-1)  # [m, 4]
    return words.gather(1, (k & 3)[:, None])[:, 0]
