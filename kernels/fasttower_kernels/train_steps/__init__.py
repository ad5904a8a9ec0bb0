"""Training steps: batches of the shuffled epoch, the gradients of their loss, and Adam, many steps a call."""

from __future__ import annotations

from torch import Tensor

from fasttower_kernels.backends import Backend, implementation
from fasttower_kernels.checks import check_pairs, check_step, check_tables
from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.tables import Interactions
from fasttower_kernels.train_steps import reference
from fasttower_kernels.train_steps.state import (
    Optimiser,
    StepSettings,
    TableDtype,
    TrainState,
    steps_per_epoch,
)

__all__ = ["Optimiser", "StepSettings", "TableDtype", "TrainState", "run_steps", "steps_per_epoch"]


def run_steps(
    state: TrainState,
    interactions: Interactions,
    known_positives: KnownPositives | None,
    settings: StepSettings,
    *,
    first_step: int,
    num_steps: int,
    backend: Backend = "auto",
) -> Tensor:
    """Train for some steps of one epoch.

    Step t belongs to epoch ``t // S`` with S = ceil(n / B). Its batch is positions ``i * B`` up to
    ``min(n, (i + 1) * B)`` of that epoch's order, i = t mod S, and it replaces

        rows = shuffled_rows(positions, n, epoch_key(seed, epoch))
        train_step(parameters, gradients, interactions[rows], ..., key=seed_key(seed), step=t)
        adam_step(parameters, gradients, moments_1, moments_2, count=t + 1, learning_rate=...)

    With bfloat16 tables ``train_step`` gets users and items as ``table.bfloat16().float()``.

    Nothing but the state is carried from a step to the next, so a run may stop and go on at any step. With
    the lazy optimiser, rows that a step does not read are updated when one reads them again, at the latest
    when the call ends: whoever reads the tables sees what dense Adam would leave, to rounding. So where the
    calls of a run begin and end shows in the last bits, and long calls are faster than short ones.

    Args:
        state: updated in place.
        interactions: the n positives of the training part, on the state's device.
        known_positives: what negatives leave out; None draws from the whole catalogue.
        settings: of the loss, the optimiser and the batches.
        first_step: t of the first step.
        num_steps: how many; they must not pass the end of the epoch of ``first_step``.
        backend: the implementation.

    Returns:
        float64 scalar on the CPU or the state's device: the BCE summed over the steps' pairs.

    Raises:
        FastTowerError: the steps cross an epoch's end or do not fit 32 bits, arrays that do not fit each
            other, or the backend cannot run here or not in that dtype.
    """
    if not len(interactions):
        raise FastTowerError("there are no interactions to train on; expected 1 or more.")
    per_epoch = steps_per_epoch(len(interactions), settings.batch_size)
    if not 0 < num_steps <= per_epoch - first_step % per_epoch:
        raise FastTowerError(
            f"{num_steps} steps from step {first_step} leave its epoch of {per_epoch} steps; ask for fewer."
        )
    check_step(first_step + num_steps - 1)  # the first is of the same epoch, and below 0 with it
    run = implementation(__name__, backend, state.parameters.users.device)
    others = {"gradients": state.gradients, "moments_1": state.moments_1, "moments_2": state.moments_2}
    check_tables(state.parameters, others, fused=run is not reference)
    check_pairs(state.parameters, interactions, known_positives)
    bce: Tensor = run.run_steps(
        state, interactions, known_positives, settings, first_step=first_step, num_steps=num_steps
    )
    return bce
