"""The score matrix, users x items, cut into tiles of some users and some of the items that may be given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Above this share of the catalogue, scoring all and masking costs less than gathering and scoring the few.
_GATHER_BELOW = 0.9

_INDEX_BYTES = 8


class Tile(NamedTuple):
    """Some items: W columns of the score matrix."""

    vectors: Tensor
    """(W, D), float32."""
    bias: Tensor | None
    """(W,), float32, to be added to the scores; -inf for an item that may not be given."""
    first: int
    """The item of the first column; the others follow it, unless there is an item index."""
    item_index: Tensor | None
    """(W,), int64, ascending: the items of the columns."""

    def items(self, columns: Tensor) -> Tensor:
        """The items, int32, of some columns."""
        return (columns + self.first if self.item_index is None else self.item_index[columns]).int()


@dataclass(frozen=True)
class Catalogue:
    """The items that may be given, in ascending order: J columns of the score matrix.

    Attributes:
        vectors: (I, D), float32.
        bias: (I,), float32, or None.
        candidates: (I,), bool: what may be given, where every item has a column; None for all.
        index: (J,), int64, ascending: the items that have a column; None for all of them, J = I.
    """

    vectors: Tensor
    bias: Tensor | None
    candidates: Tensor | None
    index: Tensor | None

    @staticmethod
    def of(
        item_vectors: Tensor, item_bias: Tensor | None, candidates: Tensor | None, budget_bytes: int
    ) -> Catalogue:
        """Columns for the candidates alone if they are few and their index takes at most half the budget.

        Others than candidates keep their columns otherwise, with a bias of -inf.
        """
        if candidates is not None:
            count = int(candidates.sum())
            if count == len(candidates):
                candidates = None
            elif count < _GATHER_BELOW * len(candidates) and _INDEX_BYTES * count <= budget_bytes // 2:
                return Catalogue(item_vectors, item_bias, None, candidates.nonzero().squeeze(1))
        return Catalogue(item_vectors, item_bias, candidates, None)

    def __len__(self) -> int:
        return len(self.vectors if self.index is None else self.index)

    @property
    def index_bytes(self) -> int:
        """What the index takes."""
        return 0 if self.index is None else _INDEX_BYTES * len(self.index)

    def tile(self, begin: int, end: int) -> Tile:
        """Columns begin .. end - 1; an end beyond the last column is the last."""
        columns = slice(begin, end)
        if self.index is not None:
            index = self.index[columns]
            return Tile(self.vectors[index], None if self.bias is None else self.bias[index], 0, index)
        bias = None if self.bias is None else self.bias[columns]
        if self.candidates is not None:
            candidates = self.candidates[columns]
            nothing = torch.zeros((), device=candidates.device) if bias is None else bias
            bias = torch.where(candidates, nothing, -torch.inf)
        return Tile(self.vectors[columns], bias, begin, None)
