"""Reading vectors with cosine similarity, and a gradient's way back through the norm, in Triton.

With r = 1 / max(|v|, LEAST_NORM) a vector is read as ``v r / t``, t the temperature for users and 1 for items.
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
def inverse_norms(vectors):
    """1 / max(|v|, LEAST_NORM) of some vectors: (R, D) to (R,), float32."""
    return 1.0 / tl.maximum(tl.sqrt_rn(tl.sum(vectors * vectors, axis=1)), _LEAST_NORM)


@triton.jit
def through_norms(gradients, vectors, inverse, temperature):
    """The gradients of vectors from those of what was read: ``r/t (g - <g, v r> v r)``.

    Below LEAST_NORM the norm is a constant, and the gradient ``r/t g``.

    Args:
        gradients: (R, D), float32: of what was read.
        vectors: (R, D), float32: v.
        inverse: (R,), float32: r.
        temperature: t.
    """
    along = tl.sum(gradients * vectors, axis=1) * inverse * inverse
    along = tl.where(inverse < _LARGEST_INVERSE, along, 0.0)
    return (inverse / temperature)[:, None] * (gradients - along[:, None] * vectors)
