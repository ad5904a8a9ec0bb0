"""Training steps: batches of the shuffled epoch, the gradients of their loss, and Adam, many steps a call."""

from __future__ import annotations

from torch import Tensor

from fasttower_kernels.backends import Backend, implementation
from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.tables import Interactions
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
        FastTowerError: the steps cross an epoch's end, or the backend cannot run here or not in that dtype.
    """
    per_epoch = steps_per_epoch(len(interactions), settings.batch_size)
    if not 0 < num_steps <= per_epoch - first_step % per_epoch:
        raise FastTowerError(
            f"{num_steps} steps from step {first_step} leave its epoch of {per_epoch} steps; ask for fewer."
        )
    _check_sizes(state, interactions, known_positives)
    run = implementation(__name__, backend, state.parameters.users.device).run_steps
    bce: Tensor = run(
        state, interactions, known_positives, settings, first_step=first_step, num_steps=num_steps
    )
    return bce


def _check_sizes(
    state: TrainState, interactions: Interactions, known_positives: KnownPositives | None
) -> None:
    """Compiled code checks no index."""
    sizes = len(state.parameters.users), len(state.parameters.items)
    for name, largest, size in zip(("user", "item"), interactions.largest, sizes, strict=True):
        if not 0 <= largest < size:
            raise FastTowerError(f"{name} indices reach {largest}; expected 0 to {size - 1}.")
    if known_positives is not None and (known_positives.num_users, known_positives.num_items) != sizes:
        raise FastTowerError(
            f"known positives are of {known_positives.num_users} users, {known_positives.num_items} items; "
            f"the tables have {sizes[0]} and {sizes[1]}."
        )
