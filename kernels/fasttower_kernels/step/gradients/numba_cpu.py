"""The gradients of a batch, compiled, of either dataflow."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.philox import Key
from fasttower_kernels.settings import LossSettings
from fasttower_kernels.step.own_negatives import numba_cpu as own_negatives
from fasttower_kernels.step.shared_negatives import numba_cpu as shared_negatives
from fasttower_kernels.tables import Interactions, Tables

# Positives that `loss_sum` copies at a time. Another number may change the last bits of a sum.
_PART_ROWS = 1 << 14


def add_gradients(
    parameters: Tables,
    gradients: Tables,
    batch: Interactions,
    negatives: Negatives,
    loss: LossSettings,
    *,
    key: Key,
    step: int,
    gathered: bool = False,
) -> Tensor:
    """Add the gradients of a batch's loss; return the sum of its values, float64. See the reference.

    With ``gathered`` the user table has a row for each positive of the batch, (B, P), and the users' indices
    say what negatives leave out, nothing else.
    """
    run = shared_negatives if negatives.settings.is_shared else own_negatives
    return run.run_batch(parameters, gradients, batch, negatives, loss, key=key, step=step, gathered=gathered)


def loss_sum(
    parameters: Tables, batch: Interactions, negatives: Negatives, loss: LossSettings, *, key: Key, step: int
) -> Tensor:
    """The sum of the values of a batch, without L2, float64. See the reference."""
    run = shared_negatives if negatives.settings.is_shared else own_negatives
    total, block = torch.zeros((), dtype=torch.float64), negatives.settings.block_size
    for first, part in batch.parts(max(1, _PART_ROWS // block) * block):
        total += run.run_batch(
            parameters, None, part, negatives, loss, key=key, step=step, first_position=first
        )
    return total
