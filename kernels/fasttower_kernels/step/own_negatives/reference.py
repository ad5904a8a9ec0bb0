"""The loss of positives that draw negatives of their own, in plain torch.

With x the logits of a batch's B positives and their N negatives each:

    loss = 1/B * sum_b w_b * [ value(x_b+, x_b1 .. x_bN) + L2 term of `LossSettings` ]

where w_b is 0 for a user who has touched every item and 1 otherwise. Of hard negatives, a pool of M is drawn
and the N with the largest logits are kept, of equal ones those drawn first; no gradient passes through the
choice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from fasttower_kernels.losses.reference import Scores, loss_values
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.negatives.reference import draw, log_expected
from fasttower_kernels.philox import Key
from fasttower_kernels.settings import LossSettings
from fasttower_kernels.similarity import read_items, read_users
from fasttower_kernels.tables import Interactions


def batch_loss(
    user_vectors: Tensor,
    item_vectors: Tensor,
    item_bias: Tensor | None,
    batch: Interactions,
    negatives: Negatives,
    loss: LossSettings,
    *,
    key: Key,
    step: int,
    first_position: int = 0,
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, left to autograd.

    Args:
        user_vectors: (B, D): row b is the vector of positive b's user.
        item_vectors: (I, D).
        item_bias: (I,), or None.
        batch: the B positives.
        negatives: where they come from.
        loss: of a positive.
        key: of the stream of negatives.
        step: t.
        first_position: the batch position of the first positive, where a batch is handled in parts.

    Returns:
        The loss to minimise, and the sum of its values without L2, both scalars.
    """
    items, log_q, weight = _candidates(
        user_vectors, item_vectors, item_bias, batch, negatives, loss, key, step, first_position
    )
    rows = embedding(items, item_vectors)  # [B, 1 + N, D]
    logits = torch.bmm(
        read_items(rows, loss.norm_temperature), read_users(user_vectors, loss.norm_temperature)[:, :, None]
    )[:, :, 0]
    bias = None if item_bias is None else item_bias[items]
    if bias is not None:
        logits = logits + bias
    counted = torch.ones_like(logits[:, 1:], dtype=torch.bool)
    scores = Scores(logits[:, 0], logits[:, 1:], counted, log_q, positive_weight(batch, negatives, loss))
    total = value = (weight * loss_values(scores, loss)).sum()
    if loss.has_l2:
        norms = loss.user_l2 * user_vectors.square().sum(1)
        share = 2 / items.shape[1]
        norms = norms + share * loss.item_l2 * rows.square().sum((1, 2))
        if bias is not None:
            norms = norms + share * loss.bias_l2 * bias.square().sum(1)
        total = total + (weight * norms).sum()
    return total / loss.divisor(len(items), items.shape[1] - 1), value.detach()


def positive_weight(batch: Interactions, negatives: Negatives, loss: LossSettings) -> Tensor:
    """Beta of gbce for each positive, (B,), float32; ones for other losses."""
    beta = torch.ones(len(batch), device=batch.item_index.device)
    if loss.name != "gbce":
        return beta
    free = torch.full_like(beta, negatives.num_items)
    if negatives.known_positives is not None:
        free = free - negatives.known_positives.degrees[batch.user_index.long()]
    drawn_share = (negatives.settings.count / free.clamp(min=1)).clamp(max=1)
    return 1 - loss.calibration * (1 - drawn_share)


@torch.no_grad()
def _candidates(
    user_vectors: Tensor,
    item_vectors: Tensor,
    item_bias: Tensor | None,
    batch: Interactions,
    negatives: Negatives,
    loss: LossSettings,
    key: Key,
    step: int,
    first_position: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Items (B, 1 + N), the positive first; log q, (B, N) or (B, 1); and weights (B,) of the positives."""
    known, settings = negatives.known_positives, negatives.settings
    drawn = draw(
        batch.user_index,
        settings.drawn,
        negatives.num_items,
        key=key,
        step=step,
        known_positives=known,
        popularity=negatives.popularity,
        first_position=first_position,
    )
    log_q = log_expected(batch, drawn, negatives).to(user_vectors)
    items = drawn.items
    if settings.pool:
        rows = read_items(item_vectors[items], loss.norm_temperature)
        logits = torch.bmm(rows, read_users(user_vectors, loss.norm_temperature)[:, :, None])[:, :, 0]
        if item_bias is not None:
            logits = logits + item_bias[items]
        kept = logits.sort(dim=1, descending=True, stable=True).indices[:, : settings.count]
        items = items.gather(1, kept)
        log_q = log_q.expand(-1, settings.pool).gather(1, kept)
    items = torch.cat([batch.item_index.long()[:, None], items], dim=1)
    weight = torch.ones(len(batch), device=items.device, dtype=user_vectors.dtype)
    if known is not None:
        weight = (known.degrees[batch.user_index.long()] < negatives.num_items).to(weight)
    return items, log_q, weight
