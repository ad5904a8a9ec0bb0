"""BPR in plain torch."""

from torch import Tensor
from torch.nn.functional import softplus

from fasttower_kernels.losses.reference import Scores


def values(scores: Scores) -> Tensor:
    """The loss of each positive: (B,)."""
    return (softplus(scores.negatives - scores.positive[:, None]) * scores.counted).sum(1)
