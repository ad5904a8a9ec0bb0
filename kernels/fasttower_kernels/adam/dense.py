"""Dense Adam, with a choice of backend."""

from __future__ import annotations

from fasttower_kernels.adam import reference
from fasttower_kernels.backends import implementation
from fasttower_kernels.checks import check_tables
from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.settings import Backend
from fasttower_kernels.tables import Tables


def adam_step(
    parameters: Tables,
    gradients: Tables,
    moments_1: Tables,
    moments_2: Tables,
    *,
    count: int,
    learning_rate: float,
    backend: Backend = "auto",
) -> None:
    """Update the parameters and both moments in place, and zero the gradients.

    In one pass over memory it replaces

        optimiser = torch.optim.Adam(parameters, lr=learning_rate)  # its state: the moments and the count
        optimiser.step()
        optimiser.zero_grad(set_to_none=False)

    Args:
        parameters: users (U, P), items (I, P) and item bias (I,) or None, float32; changed in place.
        gradients: of the same shapes, like the moments; read, and zeroed.
        moments_1: running means of the gradients, changed in place; zero at the start.
        moments_2: running means of their squares, likewise.
        count: of this update, from 1.
        learning_rate: the step size, above 0.
        backend: the implementation; torch takes float64 too.

    Raises:
        FastTowerError: tables that do not fit each other, a number out of range, or the backend cannot run
            here.
    """
    if count < 1 or not 0 < learning_rate < float("inf"):
        raise FastTowerError(
            f"count is {count}, learning_rate {learning_rate}; expected 1 or more, a finite number above 0."
        )
    run = implementation("fasttower_kernels.adam", backend, parameters.users.device)
    others = {"gradients": gradients, "moments_1": moments_1, "moments_2": moments_2}
    check_tables(parameters, others, fused=run is not reference)
    run.adam_step(parameters, gradients, moments_1, moments_2, count=count, learning_rate=learning_rate)
