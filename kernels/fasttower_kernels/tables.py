"""The arrays that a training step reads and writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fasttower_kernels.errors import FastTowerError

ROW_ALIGNMENT = 4
"""Rows are stored padded to a multiple of this many floats, so that they load in 16-byte pieces."""


def padded(embedding_dim: int) -> int:
    """The stored width of a row of ``embedding_dim`` floats. The padding is zero and stays zero."""
    return -(-embedding_dim // ROW_ALIGNMENT) * ROW_ALIGNMENT


@dataclass(frozen=True)
class Tables:
    """One float32 array per parameter: the parameters themselves, their gradients or their moments.

    Attributes:
        users: (U, P), P the padded width.
        items: (I, P).
        item_bias: (I,), or None for a model without one.
    """

    users: Tensor
    items: Tensor
    item_bias: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """The arrays that are there."""
        yield self.users
        yield self.items
        if self.item_bias is not None:
            yield self.item_bias

    def zeros_like(self) -> Tables:
        """Arrays of the same shapes, zero."""
        return Tables(*(torch.zeros_like(array) for array in self))


@dataclass(frozen=True)
class Interactions:
    """Positives as dense indices.

    Attributes:
        user_index: (n,), int32.
        item_index: (n,), int32.
    """

    user_index: Tensor
    item_index: Tensor

    def __post_init__(self) -> None:
        """Check shapes and dtypes; compiled code reads the arrays without strides."""
        for name, index in (("user_index", self.user_index), ("item_index", self.item_index)):
            if index.ndim != 1 or index.dtype != torch.int32:
                raise FastTowerError(
                    f"{name} is {index.dtype} of shape {tuple(index.shape)}; expected int32 (n,)."
                )
        if len(self.user_index) != len(self.item_index):
            raise FastTowerError(
                f"{len(self.user_index)} user indices and {len(self.item_index)} item indices; "
                f"expected as many of each."
            )
        object.__setattr__(self, "user_index", self.user_index.contiguous())
        object.__setattr__(self, "item_index", self.item_index.contiguous())

    @cached_property
    def largest(self) -> tuple[int, int]:
        """The largest user index and item index; -1 where there are no rows or one is negative."""
        return tuple(  # type: ignore[return-value]  # there are two
            int(index.max()) if len(index) and int(index.min()) >= 0 else -1
            for index in (self.user_index, self.item_index)
        )

    def parts(self, size: int) -> Iterator[tuple[int, Interactions]]:
        """At most ``size`` positives at a time, each part after the position of its first."""
        for first in range(0, len(self), size):
            rows = slice(first, first + size)
            yield first, Interactions(self.user_index[rows], self.item_index[rows])

    def to(self, device: torch.device | str) -> Interactions:
        """The same positives on another device."""
        return Interactions(self.user_index.to(device), self.item_index.to(device))

    def __len__(self) -> int:
        """The number of positives, n."""
        return len(self.user_index)
