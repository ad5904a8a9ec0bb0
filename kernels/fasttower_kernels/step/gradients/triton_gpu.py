"""The gradients of a batch on a GPU, of either dataflow."""

from __future__ import annotations

from torch import Tensor

from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.philox import Key
from fasttower_kernels.settings import LossSettings
from fasttower_kernels.step.own_negatives import triton_gpu as own_negatives
from fasttower_kernels.step.shared_negatives import triton_gpu as shared_negatives
from fasttower_kernels.tables import Interactions, Tables


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
    return _run(parameters, gradients, batch, negatives, loss, key=key, step=step, gathered=gathered)


def loss_sum(
    parameters: Tables, batch: Interactions, negatives: Negatives, loss: LossSettings, *, key: Key, step: int
) -> Tensor:
    """The sum of the values of a batch, without L2, float64, in one launch. See the reference."""
    return _run(parameters, None, batch, negatives, loss, key=key, step=step)


def _run(
    parameters: Tables,
    gradients: Tables | None,
    batch: Interactions,
    negatives: Negatives,
    loss: LossSettings,
    *,
    key: Key,
    step: int,
    gathered: bool = False,
) -> Tensor:
    run = shared_negatives if negatives.settings.is_shared else own_negatives
    return run.run_batch(parameters, gradients, batch, negatives, loss, key=key, step=step, gathered=gathered)
