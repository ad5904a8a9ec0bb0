"""Functions of a logit that several losses are made of, in Triton."""

# Arguments get their types when a kernel is compiled.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus_and_sigmoid(x):
    """Softplus as ``linear + log(factor)``, factor in (1, 2], and its derivative, for logits of any size.

    Whoever sums values multiplies a few factors first: a logarithm costs twenty instructions.
    """
    e = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0), 1.0 + e, tl.where(x >= 0, 1.0, e) / (1.0 + e)
