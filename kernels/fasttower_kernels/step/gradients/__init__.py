"""The gradients of a batch: of positives with negatives of their own, or of blocks that share a list."""

from __future__ import annotations

from torch import Tensor

from fasttower_kernels.backends import implementation
from fasttower_kernels.checks import check_pairs, check_step, check_tables
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.philox import Key
from fasttower_kernels.settings import Backend, LossSettings, check_together
from fasttower_kernels.step.gradients import reference
from fasttower_kernels.tables import Interactions, Tables

__all__ = ["add_gradients", "loss_sum"]


def add_gradients(
    parameters: Tables,
    gradients: Tables,
    batch: Interactions,
    negatives: Negatives,
    loss: LossSettings,
    *,
    key: Key,
    step: int,
    backend: Backend = "auto",
) -> Tensor:
    """Add the gradients of a batch's loss to ``gradients``.

    Args:
        parameters: users (U, P), items (I, P) and item bias (I,) or None, float32.
        gradients: of the same shapes.
        batch: the B positives.
        negatives: where they come from.
        loss: of a positive.
        key: of the stream of negatives.
        step: t, the training step.
        backend: the implementation.

    Returns:
        Scalar, float32 or float64: the sum of the loss's values over the batch, without L2.

    Raises:
        FastTowerError: tables, pairs or known positives that do not fit each other, a loss and negatives that
            do not go together, or the backend cannot run here.
    """
    run = implementation(__name__, backend, parameters.users.device)
    check_tables(parameters, {"gradients": gradients}, fused=run is not reference)
    _check(parameters, batch, negatives, loss, step)
    value: Tensor = run.add_gradients(parameters, gradients, batch, negatives, loss, key=key, step=step)
    return value


def loss_sum(
    parameters: Tables,
    batch: Interactions,
    negatives: Negatives,
    loss: LossSettings,
    *,
    key: Key,
    step: int,
    backend: Backend = "auto",
) -> Tensor:
    """The sum of the loss's values over a batch, without L2: what the validation loss is made of.

    Args:
        parameters: as in `add_gradients`.
        batch: the B positives, any number of them: what a backend holds at a time is bounded.
        negatives: where they come from.
        loss: of a positive.
        key: of the stream of negatives.
        step: t.
        backend: the implementation.

    Returns:
        Scalar, float32 or float64.

    Raises:
        FastTowerError: as in `add_gradients`.
    """
    run = implementation(__name__, backend, parameters.users.device)
    check_tables(parameters, {}, fused=run is not reference)
    _check(parameters, batch, negatives, loss, step)
    value: Tensor = run.loss_sum(parameters, batch, negatives, loss, key=key, step=step)
    return value


def _check(
    parameters: Tables, batch: Interactions, negatives: Negatives, loss: LossSettings, step: int
) -> None:
    check_pairs(parameters, batch, negatives.known_positives)
    negatives.check_sizes(len(parameters.items), len(parameters.users))
    check_together(loss, negatives.settings)
    check_step(step)
