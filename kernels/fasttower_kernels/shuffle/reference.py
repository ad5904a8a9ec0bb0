"""The keyed bijection in plain torch.

Rows are numbers of ``bits = (n - 1).bit_length()`` bits, split into a left part of ``bits // 2`` and a right
part of the rest. Round r of 8 changes the right part (even r) or the left part (odd r):

    right ^= mix(left, round_key[r])  mod 2**right_bits        (even r; odd r with the parts exchanged)
    mix(x, k): h = (x ^ k) * 0x85EBCA6B; h ^= h >> 15; h *= 0xC2B2AE35; h ^= h >> 16, all mod 2**32

Round keys 0 to 3 are the words of Philox(key; counter 0, 0, 0, 0), 4 to 7 those of (1, 0, 0, 0). A result
that is not below n goes through the rounds again (cycle walking): at most half of the numbers are not, so a
row takes less than two passes on average, and the result is a bijection of 0 .. n - 1.

Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), section 4; Mitchell, Stokes,
Frank and Holmes, "Bandwidth-Optimal Random Shuffling for GPUs" (TOPC 2022), section 4.
"""

import torch
from torch import Tensor

from fasttower_kernels.philox import Key, philox4x32

ROUNDS = 8
_WORD = 0xFFFFFFFF


def round_keys(key: Key) -> tuple[int, ...]:
    """The eight 32-bit words that key the rounds."""
    return philox4x32(key, (0, 0, 0, 0)) + philox4x32(key, (1, 0, 0, 0))


def shuffled_rows(positions: Tensor, num_rows: int, key: Key) -> Tensor:
    """The row at each position of the shuffled order.

    Args:
        positions: (m,), int64, in [0, num_rows).
        num_rows: n, the number of rows that are shuffled.
        key: of this order.

    Returns:
        (m,), int64, in [0, num_rows); the whole of 0 .. n - 1 maps onto itself.
    """
    bits = (num_rows - 1).bit_length()
    keys = round_keys(key)
    rows = _pass(positions, bits, keys)
    outside = (rows >= num_rows).nonzero(as_tuple=True)[0]
    while len(outside):
        walked = _pass(rows[outside], bits, keys)
        rows[outside] = walked
        outside = outside[walked >= num_rows]
    return rows


def _pass(rows: Tensor, bits: int, keys: tuple[int, ...]) -> Tensor:
    left_bits = bits // 2
    right_bits = bits - left_bits
    left, right = rows >> right_bits, rows & ((1 << right_bits) - 1)
    for r in range(0, ROUNDS, 2):
        right = right ^ (_mix(left, keys[r]) & ((1 << right_bits) - 1))
        left = left ^ (_mix(right, keys[r + 1]) & ((1 << left_bits) - 1))
    return (left << right_bits) | right


def _mix(x: Tensor, key: int) -> Tensor:
    h = torch.bitwise_and((x ^ key) * 0x85EBCA6B, _WORD)
    h = torch.bitwise_and((h ^ (h >> 15)) * 0xC2B2AE35, _WORD)
    return h ^ (h >> 16)
