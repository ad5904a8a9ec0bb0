"""What slopes and L2 gradients are multiplied by, compiled."""

from __future__ import annotations

from typing import Any, NamedTuple

from fasttower_kernels.compiled import OPTIONS, float32, njit
from fasttower_kernels.settings import LossSettings


class LossFactors(NamedTuple):
    """The part of the scales that is the same in every batch.

    Attributes:
        pairs: terms that a positive's loss is averaged over.
        user_l2: 2 times the weight of a user's squared norm in a positive's loss; as the others float64.
        item_l2: the same of an item.
        bias_l2: the same of an item's bias.
    """

    pairs: int
    user_l2: float
    item_l2: float
    bias_l2: float


class LossScales(NamedTuple):
    """Factors, float32.

    Attributes:
        weight: of a slope: 1 / divisor.
        user_l2: of a user's row in its gradient.
        item_l2: of an item's row.
        bias_l2: of an item's bias.
    """

    weight: float
    user_l2: float
    item_l2: float
    bias_l2: float


def factors_of(loss: LossSettings, scored: int) -> LossFactors:
    """The factors for positives that have so many negatives."""
    return LossFactors(
        loss.pairs(scored),
        2.0 * loss.user_l2,
        4.0 * loss.item_l2 / (1 + scored),
        4.0 * loss.bias_l2 / (1 + scored),
    )


@njit(**OPTIONS)
def scales_of(size: int, factors: Any) -> Any:
    """The scales of a batch of so many positives."""
    divisor = size * factors.pairs
    return LossScales(
        float32(1 / divisor),
        float32(factors.user_l2 / divisor),
        float32(factors.item_l2 / divisor),
        float32(factors.bias_l2 / divisor),
    )
