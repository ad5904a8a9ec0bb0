"""What the loss of a batch depends on besides its vectors and its negatives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fasttower_kernels.errors import FastTowerError

LossName = Literal["bce", "gbce", "bpr", "softmax"]
Similarity = Literal["dot", "cosine"]


@dataclass(frozen=True)
class LossSettings:
    """The loss of a positive and its negatives.

    A logit is ``x = <u, v> + bias``, or with cosine similarity ``<u, v> / (|u| |v| temperature) + bias``,
    where a norm below 1e-8 counts as 1e-8. The batch's loss is the mean over its B positives of the loss's
    value and

        user_l2 |u|^2 + 2 / (N + 1) * sum_{j in {+, k}} (item_l2 |v_j|^2 + bias_l2 bias_j^2)

    with N the negatives that the positive is scored against (of shared ones, the length of the list).

    Attributes:
        name: the loss; each is a folder beside this file, with its formula and its source.
        calibration: t of gbce, 0 to 1; other losses do not read it.
        similarity: of a user's and an item's vector.
        temperature: of cosine similarity, above 0; dot does not read it.
        user_l2: weight of the users' L2 term, 0 or more.
        item_l2: weight of the items' L2 term, 0 or more.
        bias_l2: weight of the item biases' L2 term, 0 or more.
        scale: divide the batch's sum by its positives, or by its positive and negative pairs.
    """

    name: LossName = "bce"
    calibration: float = 0.75
    similarity: Similarity = "dot"
    temperature: float = 0.2
    user_l2: float = 0.0
    item_l2: float = 0.0
    bias_l2: float = 0.0
    scale: Literal["positives", "pairs"] = "positives"

    def __post_init__(self) -> None:
        """Check the ranges."""
        for field, kind in (("name", LossName), ("similarity", Similarity)):
            if getattr(self, field) not in get_args(kind):
                raise FastTowerError(
                    f"the loss's {field} is {getattr(self, field)!r}; expected one of "
                    f"{', '.join(get_args(kind))}."
                )
        for field in ("user_l2", "item_l2", "bias_l2"):
            if not 0 <= getattr(self, field) < math.inf:
                raise FastTowerError(
                    f"{field} is {getattr(self, field)}; expected a finite number, 0 or more."
                )
        if not 0 < self.temperature < math.inf:
            raise FastTowerError(f"temperature is {self.temperature}; expected a finite number above 0.")
        if not 0 <= self.calibration <= 1:
            raise FastTowerError(f"calibration is {self.calibration}; expected a number from 0 to 1.")

    @property
    def has_l2(self) -> bool:
        """Whether there is an L2 term."""
        return bool(self.user_l2 or self.item_l2 or self.bias_l2)

    @property
    def is_cosine(self) -> bool:
        """Whether vectors are normalised."""
        return self.similarity == "cosine"

    @property
    def reads_log_q(self) -> bool:
        """Whether the loss corrects for how often a negative is drawn."""
        return self.name == "softmax"

    def pairs(self, num_negatives: int) -> int:
        """Terms of the loss for each positive that it is averaged over: 1, or 1 + N."""
        return 1 if self.scale == "positives" else 1 + num_negatives

    def divisor(self, batch_size: int, num_negatives: int) -> int:
        """What the sum over a batch is divided by."""
        return batch_size * self.pairs(num_negatives)
