"""Each user's known positives: the items that negatives leave out and that recommendations hide."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fasttower_kernels.errors import FastTowerError

# A boolean users x items table answers five times faster than a search, so long as it stays small.
_TABLE_LIMIT_BYTES = 1 << 30


@dataclass(frozen=True)
class KnownPositives:
    """Unique (user, item) pairs in compressed rows.

    Attributes:
        indptr: (U + 1,), int64: the row of user u is ``items[indptr[u]:indptr[u + 1]]``.
        items: (nnz,), int32, ascending within a row, without repeats.
        num_items: I, the size of the catalogue.
    """

    indptr: Tensor
    items: Tensor
    num_items: int

    def __post_init__(self) -> None:
        """Check the dtypes; compiled code reads the arrays without strides."""
        if self.indptr.dtype != torch.int64 or self.items.dtype != torch.int32:
            raise FastTowerError(
                f"known positives have indptr {self.indptr.dtype} and items {self.items.dtype}; "
                "expected int64 and int32."
            )
        object.__setattr__(self, "indptr", self.indptr.contiguous())
        object.__setattr__(self, "items", self.items.contiguous())

    @staticmethod
    def from_pairs(user_index: Tensor, item_index: Tensor, num_users: int, num_items: int) -> KnownPositives:
        """Sort and deduplicate pairs.

        Args:
            user_index: (n,), integer, in [0, num_users).
            item_index: (n,), integer, in [0, num_items).
            num_users: U.
            num_items: I.

        Returns:
            The rows, on the device of ``user_index``. The sort is done on the CPU.

        Raises:
            FastTowerError: an index out of range.
        """
        for name, index, size in (("user", user_index, num_users), ("item", item_index, num_items)):
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
                raise FastTowerError(
                    f"{name} indices span {int(index.min())} to {int(index.max())}; expected 0 to {size - 1}."
                )
        # One int64 key a pair, sorted in place: half the memory of a lexicographic sort, and faster.
        pairs = user_index.cpu().numpy().astype(np.int64)
        pairs *= num_items
        pairs += item_index.cpu().numpy()
        pairs.sort(kind="stable")  # a file sorted by user and item, as MovieLens is by user, costs nothing
        if len(pairs) > 1:
            first = np.empty(len(pairs), dtype=bool)
            first[0] = True
            np.not_equal(pairs[1:], pairs[:-1], out=first[1:])
            if not first.all():
                pairs = pairs[first]
        indptr = np.searchsorted(pairs, np.arange(num_users + 1, dtype=np.int64) * num_items)
        pairs %= num_items
        items = pairs.astype(np.int32)
        device = user_index.device
        return KnownPositives(
            torch.from_numpy(indptr.astype(np.int64)).to(device),
            torch.from_numpy(items).to(device),
            num_items,
        )

    @property
    def num_users(self) -> int:
        """U, the number of rows."""
        return len(self.indptr) - 1

    @cached_property
    def degrees(self) -> Tensor:
        """(U,), int64: the number of items that each user has touched."""
        return self.indptr[1:] - self.indptr[:-1]

    @cached_property
    def max_degree(self) -> int:
        """The length of the longest row; 0 without users."""
        return int(self.degrees.max()) if self.num_users else 0

    @cached_property
    def _table(self) -> Tensor | None:
        """(U * I,), bool: the dense table, or None where it would be too large."""
        if self.num_users * self.num_items > _TABLE_LIMIT_BYTES:
            return None
        table = torch.zeros(self.num_users * self.num_items, dtype=torch.bool, device=self.items.device)
        rows = torch.repeat_interleave(torch.arange(self.num_users, device=self.items.device), self.degrees)
        table[rows * self.num_items + self.items] = True
        return table

    def contains(self, user_index: Tensor, item_index: Tensor, *, repeatedly: bool = False) -> Tensor:
        """Whether each user has touched the item.

        Args:
            user_index: int64, any shape.
            item_index: int64, broadcasts with ``user_index``.
            repeatedly: whether more such questions follow. They are answered from a users x items table, if
                it takes at most 1 GiB, which is kept.

        Returns:
            bool, of the broadcast shape.
        """
        if repeatedly and self._table is not None:
            return self._table[user_index * self.num_items + item_index]
        user_index, item_index = torch.broadcast_tensors(user_index, item_index)
        if not len(self.items):
            return torch.zeros_like(user_index, dtype=torch.bool)
        position = self._count(user_index, item_index, minus_rank=False)
        inside = position < self.degrees[user_index]
        slot = (self.indptr[user_index] + position).clamp_(max=len(self.items) - 1)
        return inside & (self.items[slot] == item_index)

    def untouched(self, user_index: Tensor, rank: Tensor) -> Tensor:
        """The item of that rank, from 0, among those that the user has not touched.

        The gap search: with ``gap[p] = items[p] - p`` over a user's row, the item is the rank plus the number
        of gaps that are at most the rank.

        Args:
            user_index: (m,), int64.
            rank: (m,), int64, in [0, I - degree).

        Returns:
            (m,), int64.
        """
        return rank + self._count(user_index, rank + 1, minus_rank=True)

    def _count(self, user_index: Tensor, bound: Tensor, *, minus_rank: bool) -> Tensor:
        """How many entries of the user's row (less their rank in it, if asked) are below the bound."""
        begin = self.indptr[user_index]
        low = torch.zeros_like(begin)
        high = self.degrees[user_index]
        for _ in range(self.max_degree.bit_length()):
            open_ = low < high
            middle = (low + high) >> 1
            value = self.items[torch.where(open_, begin + middle, 0)].long()
            if minus_rank:
                value = value - middle
            below = open_ & (value < bound)
            low = torch.where(below, middle + 1, low)
            high = torch.where(open_ & ~below, middle, high)
        return low

    def to(self, device: torch.device | str) -> KnownPositives:
        """The same rows on another device."""
        return KnownPositives(self.indptr.to(device), self.items.to(device), self.num_items)
