"""What training steps carry along, and what they are told."""

from __future__ import annotations

from dataclasses import dataclass

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.philox import seed_key
from fasttower_kernels.sampled_bce.settings import LossSettings
from fasttower_kernels.tables import Tables


@dataclass(frozen=True)
class TrainState:
    """The parameters and what Adam keeps of them, all of the same shapes.

    Gradients are zero between steps.
    """

    parameters: Tables
    gradients: Tables
    moments_1: Tables
    moments_2: Tables

    @staticmethod
    def start(parameters: Tables) -> TrainState:
        """The state before step 0; the parameters are used in place."""
        return TrainState(
            parameters, parameters.zeros_like(), parameters.zeros_like(), parameters.zeros_like()
        )


@dataclass(frozen=True)
class StepSettings:
    """Settings of a run's steps.

    Attributes:
        loss: of a batch.
        learning_rate: Adam's step size.
        batch_size: B, positives in a batch; the last one of an epoch may be shorter.
        seed: of the negatives and the order.
    """

    loss: LossSettings
    learning_rate: float
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.batch_size < 1:
            raise FastTowerError(f"batch_size is {self.batch_size}; expected 1 or more.")
        if not 0 < self.learning_rate < float("inf"):
            raise FastTowerError(f"learning_rate is {self.learning_rate}; expected a finite number above 0.")
        seed_key(self.seed)


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """S = ceil(n / B)."""
    return -(-num_rows // batch_size)
