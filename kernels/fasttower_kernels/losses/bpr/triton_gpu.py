"""BPR in Triton; see `losses.triton_gpu`."""

# Arguments get their types when a kernel is compiled.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401 - the interpreter looks for it

from fasttower_kernels.losses.triton_math import softplus_and_sigmoid


@triton.jit
def negative(x, p, z):
    """Value in two parts, and slope, of a negative's logit."""
    return softplus_and_sigmoid(x - p)


@triton.jit
def positive(p, z, total, weight):
    """Value in two parts, and slope, of the positive's logit: the other side of what the negatives pull."""
    return p * 0.0, p * 0.0 + 1.0, -total
