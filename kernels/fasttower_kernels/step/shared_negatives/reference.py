"""The loss of blocks of positives against lists that each block shares, in plain torch.

A block is ``block_size`` consecutive positions of the batch; the last one may be shorter. Its list holds the
drawn items (shared, mixed) and the items of the block's positives (in-batch, mixed), each as often as it
stands there. With V the vectors of the list, U those of the block's users and b its positives,

    x = U V^T + bias                                                     # [b, M]
    loss = 1/B * sum_b w_b * [ value(x_b+, x_b1 .. x_bM, less the masked) + L2 term of `LossSettings` ]

Masked for a positive are its own item and all that its user knows. ``log q = log(b rate + M_drawn / I)``, see
`Negatives.list_rates`. w_b is 0 for a user who has touched every item and 1 otherwise. The L2 term counts the
items that are not masked.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from fasttower_kernels.losses.reference import Scores, loss_values
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.negatives.reference import draw_list
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
    """The loss of a batch, left to autograd; see `own_negatives.reference.batch_loss`.

    ``first_position`` is a multiple of the block size.
    """
    settings = negatives.settings
    size = settings.block_size
    total = value = user_vectors.new_zeros(())
    for begin in range(0, len(batch), size):
        rows = slice(begin, begin + size)
        block = Interactions(batch.user_index[rows], batch.item_index[rows])
        number = (first_position + begin) // size
        parts = _block_loss(
            user_vectors[rows], item_vectors, item_bias, block, number, negatives, loss, key, step
        )
        total, value = total + parts[0], value + parts[1]
    return total / loss.divisor(len(batch), settings.scored), value.detach()


def _block_loss(
    user_vectors: Tensor,
    item_vectors: Tensor,
    item_bias: Tensor | None,
    block: Interactions,
    number: int,
    negatives: Negatives,
    loss: LossSettings,
    key: Key,
    step: int,
) -> tuple[Tensor, Tensor]:
    """The sum of a block's losses with L2, and without."""
    settings, known = negatives.settings, negatives.known_positives
    users, positives = block.user_index.long(), block.item_index.long()
    lists = []
    if settings.drawn:
        lists.append(
            draw_list(number, settings.drawn, negatives.num_items, key=key, step=step, device=users.device)
        )
    if settings.proposal in ("in-batch", "mixed"):
        lists.append(positives)
    items = torch.cat(lists) if lists else positives[:0]  # [M]
    counted = positives[:, None] != items[None, :]  # [b, M]
    weight = torch.ones(len(users), dtype=user_vectors.dtype, device=users.device)
    if known is not None:
        counted &= ~known.contains(users[:, None], items[None, :], repeatedly=True)
        weight = (known.degrees[users] < negatives.num_items).to(weight)

    queries = read_users(user_vectors, loss.norm_temperature)
    of_positives, of_list = embedding(positives, item_vectors), embedding(items, item_vectors)
    positive = (queries * read_items(of_positives, loss.norm_temperature)).sum(1)
    logits = queries @ read_items(of_list, loss.norm_temperature).T
    if item_bias is not None:
        positive, logits = positive + item_bias[positives], logits + item_bias[items]
    rate, drawn = negatives.list_rates
    log_q = (len(users) * rate[items] + drawn).log().to(logits)
    beta = loss.shared_positive_weight(drawn)
    scores = Scores(positive, logits, counted, log_q, torch.full_like(positive, beta))
    total = value = (weight * loss_values(scores, loss)).sum()
    if loss.has_l2:
        share = 2 / (1 + settings.scored)
        counts = weight @ counted.to(weight)  # [M]: positives that an item of the list is a negative of
        norms = weight @ (
            loss.user_l2 * user_vectors.square().sum(1) + share * loss.item_l2 * of_positives.square().sum(1)
        )
        norms = norms + share * loss.item_l2 * (counts @ of_list.square().sum(1))
        if item_bias is not None:
            squares = weight @ item_bias[positives].square() + counts @ item_bias[items].square()
            norms = norms + share * loss.bias_l2 * squares
        total = total + norms
    return total, value
