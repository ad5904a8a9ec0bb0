"""Sampled softmax in Triton; see `losses.triton_gpu`. Negatives' logits are less log q."""

# Arguments get their types when a kernel is compiled.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def negative(x, p, z):
    """Value in two parts, and slope, of a negative's logit."""
    return x * 0.0, x * 0.0 + 1.0, tl.exp(x - z)


@triton.jit
def positive(p, z, total, weight):
    """Value in two parts, and slope, of the positive's logit."""
    return z - p, p * 0.0 + 1.0, -total
