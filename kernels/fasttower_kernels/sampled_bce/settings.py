"""What the loss of a batch depends on besides its vectors."""

from dataclasses import dataclass
from typing import Literal

from fasttower_kernels.errors import FastTowerError


@dataclass(frozen=True)
class LossSettings:
    """Settings of the sampled BCE loss.

    Attributes:
        num_negatives: N, 0 or more.
        l2: weight of the L2 term, 0 or more.
        loss_scale: divide the batch's sum by its positives, or by its positive and negative pairs.
    """

    num_negatives: int = 10
    l2: float = 0.0
    loss_scale: Literal["positives", "pairs"] = "positives"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.num_negatives < 0:
            raise FastTowerError(f"num_negatives is {self.num_negatives}; expected 0 or more.")
        if not 0 <= self.l2 < float("inf"):
            raise FastTowerError(f"l2 is {self.l2}; expected a finite number, 0 or more.")

    @property
    def pairs(self) -> int:
        """Terms of the loss for each positive that it is averaged over: 1, or 1 + N."""
        return 1 if self.loss_scale == "positives" else 1 + self.num_negatives

    def divisor(self, batch_size: int) -> int:
        """What the batch's sum is divided by."""
        return batch_size * self.pairs
