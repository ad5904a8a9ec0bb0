"""The order of an epoch: a keyed bijection of row numbers, computed where it is needed and never stored."""

from __future__ import annotations

from torch import Tensor

from fasttower_kernels.backends import implementation
from fasttower_kernels.checks import check_index
from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.philox import Key, Purpose, derive_key
from fasttower_kernels.settings import Backend
from fasttower_kernels.shuffle.reference import ROUNDS

__all__ = ["ROUNDS", "epoch_key", "shuffled_rows"]


def epoch_key(seed: int, epoch: int) -> Key:
    """The key of an epoch's order."""
    return derive_key(seed, Purpose.SHUFFLE, epoch)


def shuffled_rows(positions: Tensor, num_rows: int, key: Key, *, backend: Backend = "auto") -> Tensor:
    """The row at each position of a shuffled order, the same one in every backend.

    Replaces ``torch.randperm(num_rows)[positions]`` and stores nothing; the rounds are in `reference`.

    Args:
        positions: (m,), int64, in [0, num_rows).
        num_rows: n, the number of rows that are shuffled, 1 or more.
        key: of this order, such as ``epoch_key(seed, epoch)``.
        backend: the implementation; Triton's takes fewer than 2**31 rows.

    Returns:
        (m,), int64, in [0, num_rows); the whole of 0 .. n - 1 maps onto itself.

    Raises:
        FastTowerError: positions out of range, or the backend cannot run here.
    """
    if num_rows < 1:
        raise FastTowerError(f"num_rows is {num_rows}; expected 1 or more.")
    check_index("positions", positions, num_rows)
    rows: Tensor = implementation(__name__, backend, positions.device).shuffled_rows(
        positions.long().contiguous(), num_rows, key
    )
    return rows
