"""The keyed bijection for a tile of positions. Nearly all rows need one pass, which vectorises."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttower_kernels.compiled import OPTIONS, SOURCES, Array, entry_point, njit, uint32, uint64
from fasttower_kernels.philox import Key
from fasttower_kernels.shuffle.reference import ROUNDS, round_keys

_HALF_ROUNDS = ROUNDS // 2
_BLOCK = 256


@njit(**OPTIONS)
def _mix(x: int, key: int) -> int:
    h = uint32((x ^ key) * uint32(0x85EBCA6B))
    h = uint32((h ^ (h >> uint32(15))) * uint32(0xC2B2AE35))
    return h ^ (h >> uint32(16))


@njit(**OPTIONS)
def _one_pass(row: int, left_bits: int, right_bits: int, keys: tuple[int, ...]) -> int:
    """All rounds on one row number (uint64); the parts stay below 2**32, so n may pass 2**32."""
    left_mask = uint32((uint64(1) << left_bits) - uint64(1))
    right_mask = uint32((uint64(1) << right_bits) - uint64(1))
    left = uint32(row >> right_bits)
    right = uint32(row) & right_mask
    for r in range(_HALF_ROUNDS):
        right ^= _mix(left, keys[2 * r]) & right_mask
        left ^= _mix(right, keys[2 * r + 1]) & left_mask
    return (uint64(left) << right_bits) | uint64(right)


@njit(**OPTIONS)
def shuffle_tile(
    first_position: int,
    count: int,
    num_rows: int,
    left_bits: int,
    right_bits: int,
    keys: tuple[int, ...],
    rows: Array,
    outside: Array,
) -> None:
    """Write the rows at ``count`` positions from the first to ``rows``.

    Args:
        first_position: uint64.
        count: uint64: how many, at most the length of ``rows``.
        num_rows: n.
        left_bits: uint64.
        right_bits: uint64.
        keys: eight uint32 as a tuple.
        rows: (W,), uint64, out.
        outside: (W,), uint64, scratch.
    """
    for w in range(count):
        rows[w] = _one_pass(first_position + w, left_bits, right_bits, keys)
    _walk(rows, count, uint64(num_rows), left_bits, right_bits, keys, outside)


@njit(**OPTIONS)
def _walk(
    rows: Array,
    count: int,
    n: int,
    left_bits: int,
    right_bits: int,
    keys: tuple[int, ...],
    outside: Array,
) -> None:
    """Take rows that are not below n through the rounds again, until all are."""
    waiting = uint64(0)
    for w in range(count):
        outside[waiting] = w
        waiting += uint64(rows[w] >= n)
    while waiting:
        left_over = uint64(0)
        for i in range(waiting):
            w = outside[i]
            row = _one_pass(rows[w], left_bits, right_bits, keys)
            rows[w] = row
            outside[left_over] = w
            left_over += uint64(row >= n)
        waiting = left_over


@lru_cache
def _compiled(sources: int = SOURCES) -> Any:
    def run(
        positions: Array, num_rows: int, left_bits: int, right_bits: int, words: Array, out: Array
    ) -> None:
        _ = sources
        keys = words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]
        rows, outside = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64)
        for start in range(uint64(0), uint64(len(out)), uint64(_BLOCK)):
            count = min(uint64(_BLOCK), uint64(len(out)) - start)
            for w in range(count):
                rows[w] = _one_pass(uint64(positions[start + w]), left_bits, right_bits, keys)
            _walk(rows, count, num_rows, left_bits, right_bits, keys, outside)
            for w in range(count):
                out[start + w] = rows[w]

    return entry_point(run)


def shuffled_rows(positions: Tensor, num_rows: int, key: Key) -> Tensor:
    """See the operator's `shuffled_rows`: the order that the training step follows."""
    bits = (num_rows - 1).bit_length()
    rows = torch.empty_like(positions)
    _compiled()(
        positions.numpy(),
        uint64(num_rows),
        uint64(bits // 2),
        uint64(bits - bits // 2),
        np.array(round_keys(key), dtype=np.uint32),
        rows.numpy(),
    )
    return rows
