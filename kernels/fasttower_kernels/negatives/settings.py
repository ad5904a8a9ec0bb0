"""What the negatives of a batch depend on besides the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fasttower_kernels.errors import FastTowerError

Proposal = Literal["uniform", "popularity", "shared", "in-batch", "mixed"]

MAX_BLOCK_SIZE = 1 << 14


@dataclass(frozen=True)
class NegativeSettings:
    """Where the negatives of a positive come from.

    Attributes: proposal: uniform and popularity draw ``count`` negatives for each positive. The others score
        a block of
            positives against one list: shared draws it uniformly, in-batch takes the block's own items, mixed
            takes both.
        count: N, drawn for each positive or for each block, 0 or more; in-batch does not read it.
        pool: where it is not 0, draw so many for each positive and keep the N with the largest logits.
        popularity_power: an item is drawn in proportion to its count to this power, 0 or more; only
            popularity reads it.
        block_size: positives that share a list: consecutive positions of the batch.
    """

    proposal: Proposal = "uniform"
    count: int = 10
    pool: int = 0
    popularity_power: float = 0.75
    block_size: int = 256

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.proposal not in get_args(Proposal):
            raise FastTowerError(
                f"the negatives' proposal is {self.proposal!r}; expected one of "
                f"{', '.join(get_args(Proposal))}."
            )
        if self.count < 0:
            raise FastTowerError(f"the number of negatives is {self.count}; expected 0 or more.")
        if self.pool and (self.is_shared or not max(self.count, 1) <= self.pool):
            raise FastTowerError(
                f"the pool of hard negatives is {self.pool} for {self.count} {self.proposal} negatives; "
                "expected 0, or at least as many as are kept, with uniform or popularity."
            )
        if not 0 <= self.popularity_power < math.inf:
            raise FastTowerError(
                f"popularity_power is {self.popularity_power}; expected a finite number, 0 or more."
            )
        if not 1 <= self.block_size <= MAX_BLOCK_SIZE:
            raise FastTowerError(f"block_size is {self.block_size}; expected 1 to {MAX_BLOCK_SIZE}.")

    @property
    def is_shared(self) -> bool:
        """Whether a block of positives is scored against one list."""
        return self.proposal in ("shared", "in-batch", "mixed")

    @property
    def drawn(self) -> int:
        """How many are drawn for each positive, or for each block."""
        return 0 if self.proposal == "in-batch" else self.pool or self.count

    @property
    def scored(self) -> int:
        """Negatives in the loss of a positive of a full block, masked ones among them."""
        in_batch = self.block_size if self.proposal in ("in-batch", "mixed") else 0
        return in_batch + (0 if self.proposal == "in-batch" else self.count)
