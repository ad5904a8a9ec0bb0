"""Bits that answer "has the user touched the item?" on the CPU.

While users x items bits stay small, one bit a pair is the answer. Beyond that, each user has a fixed number
of hashed bits: a bit that is off means no, a bit that is on leads to a binary search in the user's sorted
row. Both answer the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasttower_kernels.compiled import OPTIONS, SOURCES, Array, empty, entry_point, njit, uint32, uint64
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.vector_rows import prefetch

BITMAP_LIMIT_BYTES = 256 << 20
"""Above this size the hashed bits save much memory and cost little: a step takes 7% longer at 463 MB."""

PREFETCHED_WORDS = 256
"""Words of a user's bits that are prefetched at most: of longer rows, few draws hit the same line."""

FILTER_BITS = 2048
"""Hashed bits a user."""

_FILTER_WORDS = FILTER_BITS // 32
_FILTER_SHIFT = 32 - FILTER_BITS.bit_length() + 1


@dataclass(frozen=True)
class Membership:
    """The bits of all users, and the rows that they stand for.

    Attributes:
        bits: (U * words,), uint32.
        words: of a user.
        exact: whether a bit that is on is the answer already.
        indptr: (U + 1,), int64.
        items: (nnz,), int32.
    """

    bits: NDArray[np.uint32]
    words: int
    exact: bool
    indptr: NDArray[np.int64]
    items: NDArray[np.int32]


def membership_of(known_positives: KnownPositives) -> Membership:
    """The bits of some known positives on the CPU, built at the first call and kept with them."""
    built = known_positives.__dict__.get("_membership")
    if built is None:
        built = build_membership(known_positives, BITMAP_LIMIT_BYTES)
        known_positives.__dict__["_membership"] = built
    return built


def build_membership(known_positives: KnownPositives, limit_bytes: int) -> Membership:
    """The bitmap where it takes at most so many bytes, else the hashed bits."""
    words = -(-known_positives.num_items // 32)
    exact = known_positives.num_users * words * 4 <= limit_bytes
    if not exact:
        words = _FILTER_WORDS
    indptr, items = known_positives.indptr.numpy(), known_positives.items.numpy()
    bits = np.zeros(known_positives.num_users * words, dtype=np.uint32)
    _set_bits()(bits, words, exact, indptr, items)
    return Membership(bits, words, exact, indptr, items)


def known_arrays(known_positives: KnownPositives | None) -> tuple[Any, ...]:
    """What compiled code takes of a membership: bits, words, indptr and items; empty arrays without one."""
    if known_positives is None:
        return empty(np.uint32), uint64(0), empty(np.int64), empty(np.int32)
    membership = membership_of(known_positives)
    return membership.bits, uint64(membership.words), membership.indptr, membership.items


@njit(**OPTIONS)
def _bit_index(item: int, exact: bool) -> int:
    return item if exact else uint32(item * uint32(2654435761)) >> uint32(_FILTER_SHIFT)


@lru_cache
def _set_bits(sources: int = SOURCES) -> Callable[..., None]:
    def run(bits: Array, words: int, exact: bool, indptr: Array, items: Array) -> None:
        _ = sources
        for user in range(len(indptr) - 1):
            for p in range(indptr[user], indptr[user + 1]):
                bit = _bit_index(uint32(items[p]), exact)
                bits[user * words + (bit >> uint32(5))] |= uint32(1) << (bit & uint32(31))

    return entry_point(run)


@njit(**OPTIONS)
def touched(user: int, item: int, bits: Array, words: int, exact: bool, indptr: Array, items: Array) -> bool:
    """Whether a user (uint64) has touched an item (uint32)."""
    bit = _bit_index(item, exact)
    on = (bits[user * words + uint64(bit >> uint32(5))] >> (bit & uint32(31))) & uint32(1) != uint32(0)
    if exact or not on:
        return on
    low, high = uint64(indptr[user]), uint64(indptr[user + uint64(1)])
    end = high
    while low < high:
        middle = (low + high) >> uint64(1)
        if uint32(items[middle]) < item:
            low = middle + uint64(1)
        else:
            high = middle
    return low < end and uint32(items[low]) == item


@njit(**OPTIONS)
def prefetch_bits(known: tuple[Array, ...], users: Array, start: int, size: int) -> None:
    """Fetch what the draws of some users, ``users[start : start + size]``, are looked up in."""
    bits, words, _, _ = known
    for w in range(size):
        row = uint64(users[start + w]) * words
        for word in range(uint64(0), min(words, uint64(PREFETCHED_WORDS)), uint64(16)):
            prefetch(bits, row + word, 1)


@njit(**OPTIONS)
def untouched(user: int, rank: int, indptr: Array, items: Array) -> int:
    """The item (uint32) of that rank among those that the user (uint64) has not touched: the gap search."""
    begin = uint64(indptr[user])
    low, high = uint64(0), uint64(indptr[user + uint64(1)]) - begin
    while low < high:
        middle = (low + high) >> uint64(1)
        if uint64(items[begin + middle]) - middle <= uint64(rank):
            low = middle + uint64(1)
        else:
            high = middle
    return uint32(uint64(rank) + low)
