"""The losses in plain torch, by name."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from torch import Tensor

from fasttower_kernels.settings import LossSettings


class Scores(NamedTuple):
    """What a loss is a function of: B positives, M negatives each.

    Attributes:
        positive: (B,): logits x+.
        negatives: (B, M): logits x_k.
        counted: (B, M), bool: which negatives count; the others are known positives.
        log_q: broadcasts to (B, M): logarithm of the expected number of times that the negative is drawn.
        positive_weight: broadcasts to (B,): beta of gbce.
    """

    positive: Tensor
    negatives: Tensor
    counted: Tensor
    log_q: Tensor
    positive_weight: Tensor


def loss_values(scores: Scores, settings: LossSettings) -> Tensor:
    """The loss of each positive, without L2: (B,)."""
    values: Tensor = importlib.import_module(f"fasttower_kernels.losses.{settings.name}.reference").values(
        scores
    )
    return values
