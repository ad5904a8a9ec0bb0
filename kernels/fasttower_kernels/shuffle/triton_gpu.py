"""The keyed bijection in Triton, computed where a kernel needs a row."""

# Constants of a kernel are written in capitals, and arguments get their types when it is launched.
# ruff: noqa: N803
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.philox import Key
from fasttower_kernels.shuffle.reference import round_keys
from fasttower_kernels.triton_launch import Launch, device_scope, signed_word

MAX_ROWS = 2**31 - 1
_BLOCK = 256


@triton.jit
def _mix(x, key):
    h = (x ^ key) * 0x85EBCA6B
    h = (h ^ (h >> 15)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _pass(rows, left_bits, right_bits, k0, k1, k2, k3, k4, k5, k6, k7):
    one = (right_bits * 0 + 1).to(tl.uint32)
    left_mask = (one << left_bits) - 1
    right_mask = (one << right_bits) - 1
    left = rows >> right_bits
    right = rows & right_mask
    right ^= _mix(left, k0) & right_mask
    left ^= _mix(right, k1) & left_mask
    right ^= _mix(left, k2) & right_mask
    left ^= _mix(right, k3) & left_mask
    right ^= _mix(left, k4) & right_mask
    left ^= _mix(right, k5) & left_mask
    right ^= _mix(left, k6) & right_mask
    left ^= _mix(right, k7) & left_mask
    return (left << right_bits) | right


@triton.jit
def load_word(words_ptr, index: tl.constexpr):
    """A 32-bit word of an int32 array, as uint32."""
    return tl.load(words_ptr + index).to(tl.uint32, bitcast=True)


@triton.jit
def shuffle_rows(positions, num_rows, bits, round_keys_ptr):
    """The rows at some positions of the order.

    Args:
        positions: uint32 block, each below ``num_rows``.
        num_rows: n, int32 scalar.
        bits: ``(n - 1).bit_length()``, int32 scalar.
        round_keys_ptr: the 8 round keys, int32.

    Returns:
        uint32 block.
    """
    limit = num_rows.to(tl.uint32)
    left_bits = (bits >> 1).to(tl.uint32)
    right_bits = bits.to(tl.uint32) - left_bits
    k0 = load_word(round_keys_ptr, 0)
    k1 = load_word(round_keys_ptr, 1)
    k2 = load_word(round_keys_ptr, 2)
    k3 = load_word(round_keys_ptr, 3)
    k4 = load_word(round_keys_ptr, 4)
    k5 = load_word(round_keys_ptr, 5)
    k6 = load_word(round_keys_ptr, 6)
    k7 = load_word(round_keys_ptr, 7)
    rows = _pass(positions, left_bits, right_bits, k0, k1, k2, k3, k4, k5, k6, k7)
    outside = tl.max((rows >= limit).to(tl.int32), axis=0)
    while outside > 0:
        walked = _pass(rows, left_bits, right_bits, k0, k1, k2, k3, k4, k5, k6, k7)
        rows = tl.where(rows >= limit, walked, rows)
        outside = tl.max((rows >= limit).to(tl.int32), axis=0)
    return rows


@triton.jit(do_not_specialize=["count", "num_rows", "bits"])
def shuffle_kernel(positions_ptr, rows_ptr, round_keys_ptr, count, num_rows, bits, BLOCK: tl.constexpr):
    """Rows of an array of positions: the bijection alone, as `shuffled_rows` computes it."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    positions = tl.load(positions_ptr + index, mask=mask, other=0).to(tl.uint32)
    rows = shuffle_rows(positions, num_rows, bits, round_keys_ptr)
    tl.store(rows_ptr + index, rows.to(tl.int64), mask=mask)


def row_bits(num_rows: int) -> int:
    """The width of the numbers that are shuffled.

    Raises:
        FastTowerError: more rows than the kernels number.
    """
    if num_rows > MAX_ROWS:
        raise FastTowerError(
            f"{num_rows} interactions; the triton backend takes at most {MAX_ROWS}: choose backend torch."
        )
    return (num_rows - 1).bit_length()


def signed_round_keys(key: Key) -> list[int]:
    """The round keys as int32 values."""
    return [signed_word(word) for word in round_keys(key)]


def shuffled_rows(positions: Tensor, num_rows: int, key: Key) -> Tensor:
    """See the reference's `shuffled_rows`: the same rows, bit for bit."""
    rows = torch.empty_like(positions)
    launch = Launch(
        shuffle_kernel,
        triton.cdiv(len(positions), _BLOCK),
        {
            "positions_ptr": positions,
            "rows_ptr": rows,
            "round_keys_ptr": torch.tensor(
                signed_round_keys(key), dtype=torch.int32, device=positions.device
            ),
            "count": len(positions),
            "num_rows": num_rows,
            "bits": row_bits(num_rows),
            "BLOCK": _BLOCK,
        },
        num_warps=4,
    )
    if len(positions):
        with device_scope(positions.device):
            launch()
    return rows
