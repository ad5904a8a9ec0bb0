"""Functions of a logit that several losses are made of, in Triton."""

# Arguments get their types when a kernel is compiled.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus_and_sigmoid(x):
    """``log(1 + exp(x))`` and its derivative, stable for logits of any size."""
    e = tl.exp(-tl.abs(x))
    # The base-2 logarithm is one instruction, the natural one a polynomial.
    return tl.maximum(x, 0.0) + tl.log2(1.0 + e) * _LN_2, tl.where(x >= 0, 1.0, e) / (1.0 + e)
