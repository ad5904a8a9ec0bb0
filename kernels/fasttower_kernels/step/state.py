"""What training steps carry along."""

from __future__ import annotations

from dataclasses import dataclass

from fasttower_kernels.tables import Tables


@dataclass(frozen=True)
class TrainState:
    """The parameters and what Adam keeps of them, all of the same shapes.

    Gradients are zero between calls.
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


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """S = ceil(n / B)."""
    return -(-num_rows // batch_size)
