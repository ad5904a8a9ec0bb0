"""The sampling rule in plain torch.

A uniform negative k of the positive at position b of step t is drawn with the word in lane ``k % 4`` of
Philox(key; b, k // 4, t, attempt) as ``word * I >> 32``. A negative by popularity takes two words, those in
lanes ``2 (k % 2)`` and ``2 (k % 2) + 1`` of Philox(key; b, k // 2, t, attempt), for the cell and the side of
an alias table.

Without exclusion, attempt 0 is the draw. With exclusion, an item that the user has touched is drawn again
with the next attempt; after 16 attempts the (first) word of attempt 16 gives a rank, ``word * (I - degree) >>
32``, among the untouched items, found by the gap search. So a uniform negative is uniform over the untouched
items however many the user has touched, and one by popularity follows the popularity of the untouched items.

A list that a block of positives shares is drawn uniformly over the catalogue: item m of block c with the word
in lane ``m % 4`` of Philox(list_key(key); c, m // 4, t, 0). What a user has touched is masked, not drawn
again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives.popularity import Popularity
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.philox import Key, Purpose, derive, philox4x32
from fasttower_kernels.tables import Interactions

ATTEMPTS = 16


class Drawn(NamedTuple):
    """Negatives of a batch.

    Attributes:
        items: (B, N), int64, in [0, I). They may repeat. Those of a user who has touched every item mean
            nothing: such a positive has weight 0 in the loss.
        by_rank: (B, N), bool: which came from the gap search, uniform whatever the proposal.
    """

    items: Tensor
    by_rank: Tensor


def draw(
    user_index: Tensor,
    num_negatives: int,
    num_items: int,
    *,
    key: Key,
    step: int,
    known_positives: KnownPositives | None = None,
    popularity: Popularity | None = None,
    first_position: int = 0,
) -> Drawn:
    """Draw the negatives of a batch.

    Args:
        user_index: (B,), integer: the users of the batch.
        num_negatives: N.
        num_items: I.
        key: of the stream of negatives.
        step: t, the training step.
        known_positives: what to leave out; None draws from the whole catalogue.
        popularity: what to draw by; None draws uniformly.
        first_position: the batch position of ``user_index[0]``, where a batch is handled in parts.
    """
    users = user_index.long()
    device = users.device
    position = (first_position + torch.arange(len(users), device=device))[:, None]
    each = 1 if popularity is None else 2
    quad = torch.arange((num_negatives * each + 3) // 4, device=device)
    stream = torch.stack(philox4x32(key, (position, quad, step, 0)), dim=-1).flatten(1)  # [B, 4 Q]
    words = stream[:, : num_negatives * each].unflatten(1, (num_negatives, each)).unbind(2)
    items = _items_of(words, num_items, popularity)
    by_rank = torch.zeros_like(items, dtype=torch.bool)
    if known_positives is None:
        return Drawn(items, by_rank)

    b, k = known_positives.contains(users[:, None], items, repeatedly=True).nonzero(as_tuple=True)
    for attempt in range(1, ATTEMPTS):
        if not len(b):
            return Drawn(items, by_rank)
        drawn = _items_of(_words(key, position[b, 0], k, step, attempt, each), num_items, popularity)
        items[b, k] = drawn
        again = known_positives.contains(users[b], drawn, repeatedly=True)
        b, k = b[again], k[again]
    free = num_items - known_positives.degrees[users[b]]
    b, k, free = b[free > 0], k[free > 0], free[free > 0]
    word = _words(key, position[b, 0], k, step, ATTEMPTS, each)[0]
    items[b, k] = known_positives.untouched(users[b], (word * free) >> 32)
    by_rank[b, k] = True
    return Drawn(items, by_rank)


def sample_negatives(
    user_index: Tensor,
    num_negatives: int,
    num_items: int,
    *,
    key: Key,
    step: int,
    known_positives: KnownPositives | None = None,
    popularity: Popularity | None = None,
    first_position: int = 0,
) -> Tensor:
    """The items of `draw`: (B, N), int64."""
    return draw(
        user_index,
        num_negatives,
        num_items,
        key=key,
        step=step,
        known_positives=known_positives,
        popularity=popularity,
        first_position=first_position,
    ).items


def log_expected(batch: Interactions, drawn: Drawn, negatives: Negatives) -> Tensor:
    """Logarithms of q, float32, (B, N) or (B, 1): how often a negative is expected among its positive's.

    Uniform: N / (I - degree). By popularity: N p / (1 - P_u), P_u the mass of the user's known positives;
    what came from the gap search is uniform.
    """
    users, known = batch.user_index.long(), negatives.known_positives
    count = negatives.settings.drawn
    free = torch.full((len(users), 1), negatives.num_items, device=users.device)
    if known is not None:
        free = (free - known.degrees[users][:, None]).clamp(min=1)
    uniform = math.log(max(count, 1)) - free.float().log()
    table = negatives.popularity
    if table is None:
        return uniform
    log_q = math.log(max(count, 1)) + table.log_p[drawn.items] - table.log_free_mass[users][:, None]
    return torch.where(drawn.by_rank, uniform, log_q)


def list_key(key: Key) -> Key:
    """The key of the lists that blocks share, from that of the negatives."""
    return derive(key, Purpose.SHARED_NEGATIVES)


def draw_list(block: int, count: int, num_items: int, *, key: Key, step: int, device: torch.device) -> Tensor:
    """The list of a block of positives: (count,), int64, in [0, I). Items may repeat.

    Args:
        block: c, the number of the block in the batch.
        count: M.
        num_items: I.
        key: of the negatives.
        step: t.
        device: of the result.
    """
    m = torch.arange(count, device=device)
    words = torch.stack(philox4x32(list_key(key), (m * 0 + block, m >> 2, step, 0)), dim=-1)  # [M, 4]
    return (words.gather(1, (m & 3)[:, None])[:, 0] * num_items) >> 32


def _items_of(words: tuple[Tensor, ...], num_items: int, popularity: Popularity | None) -> Tensor:
    cell = (words[0] * num_items) >> 32
    if popularity is None:
        return cell
    threshold = popularity.threshold[cell].long() & 0xFFFFFFFF
    return torch.where(words[1] < threshold, cell, popularity.alias[cell].long())


def _words(key: Key, position: Tensor, k: Tensor, step: int, attempt: int, each: int) -> tuple[Tensor, ...]:
    """The words (m,) of single negatives, one or two for each."""
    words = torch.stack(philox4x32(key, (position, k * each >> 2, step, attempt)), dim=-1)  # [m, 4]
    lane = (k * each & 3)[:, None]
    return tuple(words.gather(1, lane + i)[:, 0] for i in range(each))
