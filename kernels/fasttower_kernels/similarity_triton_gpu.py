"""Reading vectors with cosine similarity, and a gradient's way back through the norm, in Triton.

With r = 1 / max(|v|, LEAST_NORM) a vector is read as ``v r / t``, t the temperature for users and 1 for
items.
"""

# Arguments get their types when a kernel is compiled.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from fasttower_kernels.similarity import LEAST_NORM

_LEAST_NORM = tl.constexpr(LEAST_NORM)
# A little less than 1 / LEAST_NORM, whose rounding is the compiler's.
_LARGEST_INVERSE = tl.constexpr(0.999999 / LEAST_NORM)


@triton.jit
def inverse_norm(square):
    """1 / max(|v|, LEAST_NORM) from ``|v|^2``, float32."""
    return 1.0 / tl.maximum(tl.sqrt_rn(square), _LEAST_NORM)


@triton.jit
def through_norm(gradient, along, vector, inverse, temperature):
    """The gradients of vectors from those of what was read: ``r/t (g - <g, v r> v r)``.

    Below LEAST_NORM the norm is a constant, and the gradient ``r/t g``.

    Args:
        gradient: (R, D), float32: g, of what was read.
        along: (R,), float32: ``<g, v r>``.
        vector: (R, D), float32: v.
        inverse: (R,), float32: r.
        temperature: t.
    """
    along = tl.where(inverse < _LARGEST_INVERSE, along * inverse, 0.0)
    return (inverse / temperature)[:, None] * (gradient - along[:, None] * vector)
