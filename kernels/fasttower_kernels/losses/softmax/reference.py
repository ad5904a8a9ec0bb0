"""Sampled softmax in plain torch."""

import torch
from torch import Tensor

from fasttower_kernels.losses.reference import Scores


def values(scores: Scores) -> Tensor:
    """The loss of each positive: (B,)."""
    corrected = (scores.negatives - scores.log_q).masked_fill(~scores.counted, -torch.inf)
    return torch.cat([scores.positive[:, None], corrected], dim=1).logsumexp(1) - scores.positive
