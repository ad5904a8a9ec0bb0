"""Dense Adam, compiled: one pass over memory, which also zeroes the gradient."""

import math

import numpy as np

from fasttower_kernels.adam.reference import BETA_1, BETA_2, EPSILON
from fasttower_kernels.compiled import FAST, OPTIONS, Array, float32, njit

_DECAY_1, _DECAY_2 = float32(BETA_1), float32(BETA_2)
_GAIN_1, _GAIN_2 = float32(1 - BETA_1), float32(1 - BETA_2)
_EPSILON = float32(EPSILON)


@njit(fastmath=FAST, **OPTIONS)
def adam_range(
    parameters: Array,
    gradients: Array,
    moments_1: Array,
    moments_2: Array,
    begin: int,
    end: int,
    step_size: float,
    inverse_root: float,
) -> None:
    """Elements begin .. end - 1 of flat arrays.

    Args:
        parameters: (n,), float32; so are the gradients and the moments.
        gradients: zeroed.
        moments_1: first moment.
        moments_2: second moment.
        begin: uint64.
        end: uint64.
        step_size: float32, ``learning_rate / (1 - beta_1**count)``.
        inverse_root: float32, ``1 / sqrt(1 - beta_2**count)``.
    """
    for i in range(begin, end):
        g = gradients[i]
        m = moments_1[i]
        m += _GAIN_1 * (g - m)
        v = _DECAY_2 * moments_2[i] + _GAIN_2 * (g * g)
        moments_1[i] = m
        moments_2[i] = v
        gradients[i] = float32(0)
        parameters[i] -= step_size * m / (math.sqrt(v) * inverse_root + _EPSILON)


def step_scales(counts: Array, learning_rate: float) -> Array:
    """The two scalars of each step, counted from 1: (S, 2), float32, step size and inverse root."""
    step_size = learning_rate / (1 - BETA_1**counts)
    inverse_root = 1 / np.sqrt(1 - BETA_2**counts)
    return np.stack([step_size, inverse_root], axis=1).astype(np.float32)
