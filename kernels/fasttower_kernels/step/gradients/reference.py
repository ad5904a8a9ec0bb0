"""The gradients of a batch for two tables, in plain torch: autograd over the loss of either dataflow."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.negatives.reference import draw, draw_list
from fasttower_kernels.philox import Key
from fasttower_kernels.settings import LossSettings
from fasttower_kernels.step.own_negatives import reference as own_negatives
from fasttower_kernels.step.shared_negatives import reference as shared_negatives
from fasttower_kernels.tables import Interactions, Tables

# Positives whose negatives are held at a time where no gradients are needed.
_ROWS_AT_A_TIME = 1 << 14


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
        first_position: the batch position of the first positive, where a batch is handled in parts; with
            shared negatives a multiple of the block size.

    Returns:
        The loss to minimise, and the sum of its values without L2, both scalars.
    """
    dataflow = shared_negatives if negatives.settings.is_shared else own_negatives
    vectors = user_vectors, item_vectors, item_bias
    return dataflow.batch_loss(
        *vectors, batch, negatives, loss, key=key, step=step, first_position=first_position
    )


def add_gradients(
    parameters: Tables,
    gradients: Tables,
    batch: Interactions,
    negatives: Negatives,
    loss: LossSettings,
    *,
    key: Key,
    step: int,
) -> Tensor:
    """Add the gradients of a batch's loss to gradient tables; return the sum of its values, scalar."""
    users = batch.user_index.long()
    with torch.enable_grad():
        user_vectors = parameters.users[users].requires_grad_()  # [B, P]
        items, *bias = (table.detach().requires_grad_() for table in list(parameters)[1:])
        leaves = [user_vectors, items, *bias]
        total, value = batch_loss(
            user_vectors, items, bias[0] if bias else None, batch, negatives, loss, key=key, step=step
        )
        slopes = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    gradients.users.index_add_(0, users, slopes[0])
    for gradient, slope in zip(list(gradients)[1:], slopes[1:], strict=True):
        gradient.add_(slope)
    return value


def loss_sum(
    parameters: Tables,
    batch: Interactions,
    negatives: Negatives,
    loss: LossSettings,
    *,
    key: Key,
    step: int,
) -> Tensor:
    """The sum of the values of a batch, without L2, float64: what the validation loss is made of."""
    total = torch.zeros((), dtype=torch.float64, device=parameters.users.device)
    size = max(1, _ROWS_AT_A_TIME // negatives.settings.block_size) * negatives.settings.block_size
    for first, part in batch.parts(size):
        vectors = parameters.users[part.user_index.long()], parameters.items, parameters.item_bias
        total += batch_loss(*vectors, part, negatives, loss, key=key, step=step, first_position=first)[1]
    return total


def items_in_use(
    parameters: Tables, batch: Interactions, negatives: Negatives, *, key: Key, step: int
) -> Tensor:
    """The items that a batch's loss reads, each once, ascending: what a lazy optimiser brings up to date.

    Of hard negatives the whole pool is read.
    """
    device = parameters.items.device
    if negatives.settings.is_shared:
        size = negatives.settings.block_size
        drawn = [
            draw_list(block, negatives.settings.drawn, negatives.num_items, key=key, step=step, device=device)
            for block in range(-(-len(batch) // size))
        ]
    else:
        drawn = [
            draw(
                batch.user_index,
                negatives.settings.drawn,
                negatives.num_items,
                key=key,
                step=step,
                known_positives=negatives.known_positives,
                popularity=negatives.popularity,
            ).items.flatten()
        ]
    return torch.cat([batch.item_index.long(), *drawn]).unique()
