"""The gradients of a batch for two tables, in plain torch: autograd over the loss of either dataflow."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttower_kernels.losses import LossSettings
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.philox import Key
from fasttower_kernels.step.own_negatives import reference as own_negatives
from fasttower_kernels.step.shared_negatives import reference as shared_negatives
from fasttower_kernels.tables import Interactions, Tables


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

    Args: user_vectors: (B, D): row b is the vector of positive b's user. item_vectors: (I, D). item_bias:
        (I,), or None. batch: the B positives. negatives: where they come from. loss: of a positive. key: of
        the stream of negatives. step: t. first_position: the batch position of the first positive, where a
        batch is handled in parts; with shared
            negatives a multiple of the block size.

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
    first_position: int = 0,
) -> Tensor:
    """The sum of the values of a batch, without L2: what the validation loss is made of."""
    return batch_loss(
        parameters.users[batch.user_index.long()],
        parameters.items,
        parameters.item_bias,
        batch,
        negatives,
        loss,
        key=key,
        step=step,
        first_position=first_position,
    )[1]
