"""Reading a vector with cosine similarity, and a gradient's way back through the norm, compiled.

With r = 1 / max(|v|, LEAST_NORM) a vector is read as ``v r / t``, t the temperature for users and 1 for
items.
"""

from __future__ import annotations

import numpy as np

from fasttower_kernels.compiled import FAST, OPTIONS, float32, njit
from fasttower_kernels.similarity import LEAST_NORM
from fasttower_kernels.vector_rows import Row, add_scaled, dot, scaled

_LEAST_SQUARE = LEAST_NORM**2
_LARGEST_INVERSE = float32(1 / LEAST_NORM)


@njit(fastmath=FAST, **OPTIONS)
def inverse_norm(vector: Row) -> float:
    """1 / max(|v|, LEAST_NORM), float32."""
    square = np.float64(dot(vector, vector))
    return float32(1 / np.sqrt(square)) if square > _LEAST_SQUARE else _LARGEST_INVERSE


@njit(**OPTIONS)
def is_least(inverse: float) -> bool:
    """Whether an inverse norm is that of a norm below LEAST_NORM, which stands still."""
    return inverse == _LARGEST_INVERSE


@njit(fastmath=FAST, **OPTIONS)
def through_norm(gradient: Row, read: Row, inverse: float, temperature: float) -> Row:
    """The gradient of a vector from that of what was read: ``r/t (g - <g, v r> v r)``.

    Below LEAST_NORM the norm is a constant, and the gradient ``r/t g``.

    Args:
        gradient: of what was read.
        read: ``v r / t``.
        inverse: r of `inverse_norm`.
        temperature: t, float32.
    """
    if not is_least(inverse):
        gradient = add_scaled(gradient, -temperature * temperature * dot(gradient, read), read)
    return scaled(inverse / temperature, gradient)
