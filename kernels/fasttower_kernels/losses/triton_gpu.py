"""The losses in Triton, chosen when a kernel is compiled.

For a negative's logit x, the positive's logit p and, where the loss is normalised, the log-sum-exp z of all
of them (else 0), `negative` gives a value in two parts, ``linear + log(factor)``, and a slope. `positive`
follows, with the sum of the negatives' slopes.
"""

# Constants of a kernel are written in capitals, and arguments get their types when it is compiled.
# ruff: noqa: N803
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from fasttower_kernels.losses.bce import triton_gpu as bce
from fasttower_kernels.losses.bpr import triton_gpu as bpr
from fasttower_kernels.losses.gbce import triton_gpu as gbce
from fasttower_kernels.losses.softmax import triton_gpu as softmax

_bce_negative, _bce_positive = bce.negative, bce.positive
_gbce_negative, _gbce_positive = gbce.negative, gbce.positive
_bpr_negative, _bpr_positive = bpr.negative, bpr.positive
_softmax_negative, _softmax_positive = softmax.negative, softmax.positive

NORMALISED = frozenset({"softmax"})
"""Losses whose slopes need the log-sum-exp of all logits first."""

POSITIVE_LAST = frozenset({"bpr", "softmax"})
"""Losses whose positive has minus the slopes of its negatives."""


@triton.jit
def negative(x, p, z, LOSS: tl.constexpr):
    """Value, as ``linear + log(factor)``, and slope of a negative's logit."""
    if LOSS == "bce":
        linear, factor, slope = _bce_negative(x, p, z)
    elif LOSS == "gbce":
        linear, factor, slope = _gbce_negative(x, p, z)
    elif LOSS == "bpr":
        linear, factor, slope = _bpr_negative(x, p, z)
    else:
        tl.static_assert(LOSS == "softmax")
        linear, factor, slope = _softmax_negative(x, p, z)
    return linear, factor, slope


@triton.jit
def positive(p, z, total, weight, LOSS: tl.constexpr):
    """Value, as ``linear + log(factor)``, and slope of the positive's logit.

    Args:
        p: its logit.
        z: of the loss, or 0.
        total: the sum of the negatives' slopes.
        weight: beta of gbce.
        LOSS: the loss's name.
    """
    if LOSS == "bce":
        linear, factor, slope = _bce_positive(p, z, total, weight)
    elif LOSS == "gbce":
        linear, factor, slope = _gbce_positive(p, z, total, weight)
    elif LOSS == "bpr":
        linear, factor, slope = _bpr_positive(p, z, total, weight)
    else:
        tl.static_assert(LOSS == "softmax")
        linear, factor, slope = _softmax_positive(p, z, total, weight)
    return linear, factor, slope
