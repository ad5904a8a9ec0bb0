"""Dense Adam in plain torch.

Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization" (ICLR 2015), algorithm 1, in the
arrangement of ``torch.optim.Adam``, whose result it equals.
"""

import math

from fasttower_kernels.tables import Tables

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


def adam_step(
    parameters: Tables,
    gradients: Tables,
    moments_1: Tables,
    moments_2: Tables,
    *,
    count: int,
    learning_rate: float,
) -> None:
    """Update the parameters and both moments in place, and zero the gradients.

    Args:
        parameters: changed in place.
        gradients: read, and zeroed.
        moments_1: running means of the gradients, changed in place; zero at the start.
        moments_2: running means of their squares, likewise.
        count: of this update, from 1.
        learning_rate: the step size.
    """
    step_size = learning_rate / (1 - BETA_1**count)
    root = math.sqrt(1 - BETA_2**count)
    for p, g, m, v in zip(parameters, gradients, moments_1, moments_2, strict=True):
        m.lerp_(g, 1 - BETA_1)
        v.mul_(BETA_2).addcmul_(g, g, value=1 - BETA_2)
        p.addcdiv_(m, (v.sqrt() / root).add_(EPSILON), value=-step_size)
        g.zero_()
