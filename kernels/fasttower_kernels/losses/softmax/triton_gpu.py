"""Sampled softmax in Triton: negatives' logits are less log q, z is the log-sum-exp of all and of p."""

# Arguments get their types when a kernel is compiled.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def negative(x, p, z):
    """Value and slope of a negative's logit."""
    return x * 0.0, tl.exp(x - z)


@triton.jit
def positive(p, z, total, weight):
    """Value and slope of the positive's logit."""
    return z - p, -total
