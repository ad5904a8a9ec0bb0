"""The bits of `membership` in compiled code, and the rows of items that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttower_kernels.compiled import OPTIONS, SOURCES, Array, empty, entry_point, njit, uint32, uint64
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.membership import HASH_MULTIPLIER, layout_of

BITMAP_LIMIT_BYTES = 64 << 20
"""Below it, bitmaps are read from the caches."""


class Membership(NamedTuple):
    """The bits of all users, and the rows that they stand for, as compiled code takes them.

    Attributes:
        bits: (words of all users,), uint32.
        starts: (2 * (U + 1),), int64: of each user, the first word, and the place of the first item. They
            are read together.
        items: (nnz,), int32.
        bitmap_words: the words of a bitmap, uint64.
    """

    bits: NDArray[np.uint32]
    starts: NDArray[np.int64]
    items: NDArray[np.int32]
    bitmap_words: int


def membership_of(known_positives: KnownPositives | None) -> tuple[Membership, bool]:
    """The bits of some known positives on the CPU, built at the first call and kept with them.

    Returns:
        The bits, and whether all rows are bitmaps. Without known positives, empty arrays.
    """
    if known_positives is None:
        return Membership(empty(np.uint32), empty(np.int64), empty(np.int32), uint64(0)), True
    built: tuple[Membership, bool] | None = known_positives.__dict__.get("_membership")
    if built is None:
        layout = layout_of(known_positives, BITMAP_LIMIT_BYTES)
        starts = np.stack([layout.offsets.numpy(), known_positives.indptr.numpy()], axis=1).reshape(-1)
        membership = Membership(
            np.zeros(layout.num_words, dtype=np.uint32),
            starts,
            known_positives.items.numpy(),
            uint64(layout.bitmap_words),
        )
        _set_bits()(membership)
        built = membership, layout.all_bitmaps
        known_positives.__dict__["_membership"] = built
    return built


@njit(**OPTIONS)
def bits_row(user: int, starts: Array) -> tuple[int, int]:
    """A user's (uint64) first word, and the number of words."""
    first = uint64(starts[uint64(2) * user])
    return first, uint64(starts[uint64(2) * user + uint64(2)]) - first


@njit(**OPTIONS)
def items_row(user: int, starts: Array) -> tuple[int, int]:
    """Where a user's (uint64) items begin and end."""
    return uint64(starts[uint64(2) * user + uint64(1)]), uint64(starts[uint64(2) * user + uint64(3)])


@njit(**OPTIONS)
def bit_is_on(bits: Array, row: int, item: int) -> bool:
    """Whether an item's (uint32) bit is on in the bitmap that begins at word ``row`` (uint64)."""
    return (bits[row + uint64(item >> uint32(5))] >> (item & uint32(31))) & uint32(1) != uint32(0)


@njit(**OPTIONS)
def place(item: int, words: int, is_bitmap: bool) -> tuple[int, int]:
    """Which of a row's words (uint64) is an item's (uint32), and which bits of it: word and mask, uint32."""
    product = uint64(uint32(item * uint32(HASH_MULTIPLIER))) * words
    rest = uint32(product)
    mask = uint32(1) << (rest >> uint32(27))
    mask |= uint32(1) << ((rest >> uint32(22)) & uint32(31))
    mask |= uint32(1) << ((rest >> uint32(17)) & uint32(31))
    word = item >> uint32(5) if is_bitmap else uint32(product >> uint64(32))
    return word, uint32(1) << (item & uint32(31)) if is_bitmap else mask


@lru_cache
def _set_bits(sources: int = SOURCES) -> Callable[..., None]:
    def run(known: Membership) -> None:
        _ = sources
        for user in range(uint64(len(known.starts) // 2 - 1)):
            first, words = bits_row(user, known.starts)
            begin, end = items_row(user, known.starts)
            for p in range(begin, end):
                word, mask = place(uint32(known.items[p]), words, words == known.bitmap_words)
                known.bits[first + uint64(word)] |= mask

    return entry_point(run)


@njit(**OPTIONS)
def row_contains(begin: int, end: int, item: int, items: Array) -> bool:
    """Whether an item (uint32) is in the sorted row from begin to end - 1, which is not empty."""
    length = end - begin
    while length > uint64(1):
        half = length >> uint64(1)
        begin += half if uint32(items[begin + half]) <= item else uint64(0)
        length -= half
    return uint32(items[begin]) == item


@njit(**OPTIONS)
def untouched(user: int, rank: int, starts: Array, items: Array) -> int:
    """The item (uint32) of that rank among those that the user (uint64) has not touched: the gap search."""
    begin, end = items_row(user, starts)
    low, high = uint64(0), end - begin
    while low < high:
        middle = (low + high) >> uint64(1)
        if uint64(items[begin + middle]) - middle <= uint64(rank):
            low = middle + uint64(1)
        else:
            high = middle
    return uint32(uint64(rank) + low)
