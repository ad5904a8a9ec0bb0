"""Training steps: batches of the shuffled epoch, the gradients of their loss, and Adam, many steps a call.

step/                     the steps of a run: `Step`, one file per backend
step/gradients/           the gradients of one batch, of either dataflow
step/own_negatives/       each positive draws negatives of its own: gather, dot product, scatter
step/shared_negatives/    a block of positives shares a list: three matmuls, a tile at a time
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fasttower_kernels.backends import implementation
from fasttower_kernels.checks import check_pairs, check_step, check_tables
from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.settings import Backend, StepSettings
from fasttower_kernels.step import reference
from fasttower_kernels.step.autograd import sampled_loss
from fasttower_kernels.step.gradients import add_gradients, loss_sum
from fasttower_kernels.step.state import TrainState, steps_per_epoch
from fasttower_kernels.tables import Interactions

__all__ = ["Step", "TrainState", "add_gradients", "loss_sum", "sampled_loss", "steps_per_epoch"]


class _Runs(Protocol):
    """What a backend makes of a step: the buffers and launches that its calls share."""

    def run(self, first_step: int, num_steps: int) -> Tensor: ...


class Step:
    """The training steps of one state over one part.

    Step t belongs to epoch ``t // S`` with S = ceil(n / B). Its batch is positions ``i * B`` up to
    ``min(n, (i + 1) * B)`` of that epoch's order, i = t mod S, and it replaces

        rows = shuffled_rows(positions, n, epoch_key(seed, epoch))
        add_gradients(parameters, gradients, interactions[rows], ..., key=seed_key(seed), step=t)
        adam_step(parameters, gradients, moments_1, moments_2, count=t + 1, learning_rate=...)

    With bfloat16 tables ``add_gradients`` gets users and items as ``table.bfloat16().float()``.

    Nothing but the state is carried from a step to the next, so a run may stop and go on at any step. With
    the lazy optimiser, rows that a step does not read are updated when one reads them again, at the latest
    when the call ends: whoever reads the tables sees what dense Adam would leave, to rounding. So where the
    calls of a run begin and end shows in the last bits, and long calls are faster than short ones.
    """

    def __init__(
        self,
        state: TrainState,
        interactions: Interactions,
        negatives: Negatives,
        settings: StepSettings,
        *,
        backend: Backend = "auto",
    ) -> None:
        """Check that the parts fit each other, once for all calls.

        Args:
            state: updated in place by `run`.
            interactions: the n positives of the part, on the state's device.
            negatives: of the same part.
            settings: of the loss, the optimiser and the batches; their negatives are those of ``negatives``.
            backend: the implementation.

        Raises:
            FastTowerError: arrays that do not fit each other, or the backend cannot run here or not with
                these settings.
        """
        if not len(interactions):
            raise FastTowerError("there are no interactions to train on; expected 1 or more.")
        if settings.negatives != negatives.settings:
            raise FastTowerError("the step's settings and its negatives were made with different settings.")
        self._per_epoch = steps_per_epoch(len(interactions), settings.batch_size)
        steps = implementation(__name__, backend, state.parameters.users.device)
        others = {"gradients": state.gradients, "moments_1": state.moments_1, "moments_2": state.moments_2}
        check_tables(state.parameters, others, fused=steps is not reference)
        check_pairs(state.parameters, interactions, negatives.known_positives)
        negatives.check_sizes(len(state.parameters.items), len(state.parameters.users))
        self._steps: _Runs = steps.Steps(state, interactions, negatives, settings)

    def run(self, first_step: int, num_steps: int) -> Tensor:
        """Train for some steps of one epoch.

        Args:
            first_step: t of the first step.
            num_steps: how many; they must not pass the end of the epoch of ``first_step``.

        Returns:
            float64 scalar on the CPU or the state's device: the loss's values summed over the steps'
            positives, without L2.

        Raises:
            FastTowerError: the steps cross an epoch's end or do not fit 32 bits.
        """
        if not 0 < num_steps <= self._per_epoch - first_step % self._per_epoch:
            raise FastTowerError(
                f"{num_steps} steps from step {first_step} leave its epoch of {self._per_epoch} steps; "
                "ask for fewer."
            )
        check_step(first_step + num_steps - 1)  # the first is of the same epoch, and below 0 with it
        return self._steps.run(first_step, num_steps)
