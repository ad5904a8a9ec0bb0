"""Generalised BCE in plain torch."""

from torch import Tensor
from torch.nn.functional import softplus

from fasttower_kernels.losses.reference import Scores


def values(scores: Scores) -> Tensor:
    """The loss of each positive: (B,)."""
    negatives = (softplus(scores.negatives) * scores.counted).sum(1)
    return scores.positive_weight * softplus(-scores.positive) + negatives
