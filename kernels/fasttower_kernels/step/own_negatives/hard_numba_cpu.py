"""Hard negatives, compiled: of a pool of draws, those with the largest logits."""

from __future__ import annotations

import numpy as np

from fasttower_kernels.compiled import OPTIONS, Array, float32, njit, uint32, uint64
from fasttower_kernels.losses.numba_cpu import TILE


@njit(**OPTIONS)
def keep_largest(
    x: Array, norms: Array, items: Array, pool: int, kept: int, hits: Array, by_rank: int
) -> int:
    """Move the negatives with the largest logits to rows 1 .. kept, the largest first.

    Of equal ones the earlier comes first. One pass over the pool for each that is kept: the tile's positives
    lie side by side, so a pass vectorises.

    Args:
        x: (rows * TILE,), float32: logits; row 0 stays.
        norms: (2 * rows * TILE,), float32, or empty: moved along.
        items: (rows * TILE,), uint32: moved along.
        pool: uint64.
        kept: uint64, at most pool.
        hits: (rows * TILE,), uint32: begins with slots of rows 1 .. pool, which become the slots where these
            went.
        by_rank: uint64: how many slots.

    Returns:
        uint64: how many of the slots were kept.
    """
    tile = uint64(TILE)
    best = np.empty(TILE, dtype=np.float32)
    place = np.empty((kept + uint64(1)) * tile, dtype=np.uint32)
    left = np.empty((pool + uint64(1)) * tile, dtype=np.float32)
    left[:] = x[: len(left)]
    for rank in range(uint64(1), kept + uint64(1)):
        for w in range(tile):
            best[w] = float32(-np.inf)
            place[rank * tile + w] = uint32(tile + w)
        for k in range(uint64(1), pool + uint64(1)):
            for w in range(tile):
                larger = left[k * tile + w] > best[w]
                best[w] = left[k * tile + w] if larger else best[w]
                place[rank * tile + w] = uint32(k * tile + w) if larger else place[rank * tile + w]
        for w in range(tile):
            left[uint64(place[rank * tile + w])] = float32(-np.inf)
    _move(x, place, kept)
    for half in range(len(norms) // len(x)):
        _move(norms[half * len(x) : (half + 1) * len(x)], place, kept)
    _move(items, place, kept)
    remaining = uint64(0)
    for i in range(by_rank):
        for rank in range(uint64(1), kept + uint64(1)):
            slot = rank * tile + (uint64(hits[i]) & uint64(TILE - 1))
            if place[slot] == hits[i]:
                hits[remaining] = uint32(slot)
                remaining += uint64(1)
                break
    return remaining


@njit(**OPTIONS)
def _move(values: Array, place: Array, kept: int) -> None:
    """Gather rows 1 .. kept from the places of theirs."""
    tile = uint64(TILE)
    moved = np.empty(len(place), dtype=values.dtype)
    for slot in range(tile, (kept + uint64(1)) * tile):
        moved[slot] = values[uint64(place[slot])]
    values[tile : (kept + uint64(1)) * tile] = moved[tile:]
