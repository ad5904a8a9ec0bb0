"""The K best of a row as integers, which are ordered as entries are: by (score descending, item ascending).

A row has room for more than K keys. When it is full, the K largest are selected, the least of which says
what later scores have to be above. A heap, which says so after every key, was no faster for K = 10 and slower
for more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from fasttower_kernels.compiled import (
    OPTIONS,
    SOURCES,
    Array,
    entry_point,
    int32,
    njit,
    uint32,
    uint64,
)
from fasttower_kernels.vector_rows import bits_of_float, float_of_bits

_FEWEST_SLOTS = 32


def slots(k: int) -> int:
    """How many keys a row has room for."""
    return max(_FEWEST_SLOTS, 2 * k)


@njit(**OPTIONS)
def key_of(score: float, item: int) -> int:
    """A uint64 that is larger for the better entry; never 0 for a finite score, which is not -0.0."""
    bits = uint32(bits_of_float(score))
    # Positive floats are ordered as their bits are, negative ones the other way round.
    flipped = uint32(0x80000000) | (uint32(0) - (bits >> uint32(31)))
    return (uint64(bits ^ flipped) << uint64(32)) | uint64(~uint32(item))


@njit(**OPTIONS)
def score_of(key: int) -> float:
    """The score of a key."""
    ordered = uint32(key >> uint64(32))
    was_negative = (ordered >> uint32(31)) ^ uint32(1)
    return float_of_bits(int32(ordered ^ (uint32(0x80000000) | (uint32(0) - was_negative))))


@njit(**OPTIONS)
def select(keys: Array, begin: int, end: int, size: int) -> None:
    """Put the largest keys from begin to end, so many, first, and the least of these last among them.

    Quickselect; the keys are distinct.
    """
    low, high = begin, end
    last = begin + size - uint64(1)
    while high - low > uint64(1):
        first, middle, final = keys[low], keys[(low + high) >> uint64(1)], keys[high - uint64(1)]
        pivot = max(min(first, middle), min(max(first, middle), final))
        # Without a branch: each key changes places with that at the border, which moves on behind the larger.
        border = low
        for i in range(low, high):
            key = keys[i]
            keys[i] = keys[border]
            keys[border] = key
            border += uint64(key > pivot)
        if last < border:
            high = border
            continue
        place = border
        while keys[place] != pivot:
            place += uint64(1)
        keys[place] = keys[border]
        keys[border] = pivot
        low = border + uint64(1)
        if last == border:
            break


@lru_cache
def finish_rows(sources: int = SOURCES) -> Callable[..., None]:
    """The compiled end of the scans: what is left is sorting the first K keys of each row."""

    def run(keys: Array, counts: Array, size: int) -> None:
        """Put the K largest of each row's keys first, and zeros where they are fewer.

        Args:
            keys: (C, S), uint64, S >= K.
            counts: (C,), int64: how many keys there are.
            size: K.
        """
        _ = sources
        flat, stride, wanted = keys.reshape(-1), uint64(keys.shape[1]), uint64(size)
        for r in range(uint64(len(counts))):
            begin, count = r * stride, uint64(counts[r])
            if count > wanted:
                select(flat, begin, begin + count, wanted)
            for i in range(count, wanted):
                flat[begin + i] = uint64(0)

    return entry_point(run)


@lru_cache
def unpack(sources: int = SOURCES) -> Callable[..., None]:
    """The compiled way from keys to items and scores."""

    def run(keys: Array, items: Array, scores: Array) -> None:
        """Write the entries of keys other than 0, best first.

        Args:
            keys: (C, S), uint64, whose first K are in ascending order.
            items: (C, K), int32.
            scores: (C, K), float32.
        """
        _ = sources
        size = uint64(items.shape[1])
        for r in range(uint64(len(items))):
            for i in range(size):
                key = keys[r, size - uint64(1) - i]
                if key != uint64(0):
                    items[r, i] = int32(~uint32(key))
                    scores[r, i] = score_of(key)

    return entry_point(run)
