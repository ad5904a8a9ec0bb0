"""The sampling rule for a tile of positives.

The first draws of the tile are vectorised over its positives. Those that hit a known positive are gathered
and drawn again together, attempt by attempt, so the redraws vectorise too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttower_kernels.compiled import OPTIONS, SOURCES, Array, entry_point, njit, uint32, uint64
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.membership import known_arrays, membership_of, touched, untouched
from fasttower_kernels.negatives.reference import ATTEMPTS
from fasttower_kernels.philox import Key
from fasttower_kernels.philox.numba_cpu import below, philox4x32

TILE = 64
"""Positives that are handled together: some vector registers of them; all buffers stay in the L1 cache."""


@njit(**OPTIONS)
def draw_tile(
    items: Array,
    positions: Array,
    start: int,
    first: int,
    count: int,
    num_items: int,
    k0: int,
    k1: int,
    step: int,
) -> None:
    """Draw negatives first .. first + count - 1 of each positive of the tile, attempt 0.

    Args:
        items: (rows * TILE,), uint32: draw k of positive w goes to ``items[(1 + k - first) * TILE + w]``;
            there are at least 1 + count rounded up to a multiple of 4 rows.
        positions: (B,), uint32: positions in the batch.
        start: uint64: where the tile begins in it.
        first: uint64, a multiple of 4.
        count: uint64.
        num_items: uint64.
        k0: first word of the key.
        k1: second word.
        step: uint32.
    """
    for quad in range((count + uint64(3)) >> uint64(2)):
        counter = uint32((first >> uint64(2)) + quad)
        row = (uint64(1) + uint64(4) * quad) * uint64(TILE)
        for w in range(uint64(TILE)):
            w0, w1, w2, w3 = philox4x32(k0, k1, positions[start + w], counter, step, uint32(0))
            items[row + w] = below(w0, num_items)
            items[row + w + uint64(TILE)] = below(w1, num_items)
            items[row + w + uint64(2 * TILE)] = below(w2, num_items)
            items[row + w + uint64(3 * TILE)] = below(w3, num_items)


@njit(**OPTIONS)
def redraw_touched(
    items: Array,
    positions: Array,
    users: Array,
    free: Array,
    start: int,
    size: int,
    first: int,
    count: int,
    num_items: int,
    k0: int,
    k1: int,
    step: int,
    known: Any,
    exact: bool,
    hits: Array,
    drawn: Array,
) -> None:
    """Replace the draws that are known positives, by the rule.

    Args:
        items: as `draw_tile` left it.
        positions: (B,), uint32.
        users: (B,), uint32.
        free: (TILE,), uint32: how many items each user has not touched; with 0 the draws stay.
        start: uint64: where the tile begins in both.
        size: uint64: positives in the tile.
        first: as in `draw_tile`.
        count: as in `draw_tile`.
        num_items: uint64.
        k0: first word of the key.
        k1: second word.
        step: uint32.
        known: bits, words, indptr and items of a `Membership`.
        exact: bool, its field.
        hits: (rows * TILE,), uint32, scratch.
        drawn: (rows * TILE,), uint32, scratch.
    """
    bits, words, indptr, rows = known
    waiting = uint64(0)
    for w in range(size):
        if free[w] == uint32(0):
            continue
        user = uint64(users[start + w])
        for k in range(uint64(1), count + uint64(1)):
            slot = k * uint64(TILE) + w
            hits[waiting] = uint32(slot)
            waiting += uint64(touched(user, items[slot], bits, words, exact, indptr, rows))
    base = uint32(first) - uint32(1)  # of a slot's negative, with its row in the tile
    attempt = uint32(1)
    while waiting and attempt < uint32(ATTEMPTS):
        for i in range(waiting):
            w = uint64(hits[i] & uint32(TILE - 1))
            k = uint32(base + hits[i] // uint32(TILE))
            drawn[i] = below(_word(k0, k1, positions[start + w], k, step, attempt), num_items)
        left_over = uint64(0)
        for i in range(waiting):
            slot = hits[i]
            items[slot] = drawn[i]
            hits[left_over] = slot
            user = uint64(users[start + (slot & uint32(TILE - 1))])
            left_over += uint64(touched(user, drawn[i], bits, words, exact, indptr, rows))
        waiting = left_over
        attempt = uint32(attempt + uint32(1))
    for i in range(waiting):
        slot = hits[i]
        w = uint64(slot & uint32(TILE - 1))
        k = uint32(base + slot // uint32(TILE))
        word = _word(k0, k1, positions[start + w], k, step, uint32(ATTEMPTS))
        items[slot] = untouched(uint64(users[start + w]), below(word, uint64(free[w])), indptr, rows)


@njit(**OPTIONS)
def _word(k0: int, k1: int, position: int, k: int, step: int, attempt: int) -> int:
    """The word of negative k: lane k % 4 of its counter."""
    w0, w1, w2, w3 = philox4x32(k0, k1, position, k >> uint32(2), step, attempt)
    lane = k & uint32(3)
    return (w0 if lane == uint32(0) else w1) if lane < uint32(2) else (w2 if lane == uint32(2) else w3)


@njit(**OPTIONS)
def count_free(free: Array, users: Array, start: int, size: int, num_items: int, indptr: Array) -> None:
    """Write how many items each user of a tile has not touched."""
    for w in range(size):
        user = uint64(users[start + w])
        free[w] = uint32(num_items - uint64(indptr[user + uint64(1)] - indptr[user]))


@lru_cache
def _compiled(exclude: bool, exact: bool, sources: int = SOURCES) -> Any:
    def run(
        positions: Array, users: Array, num_items: int, k0: int, k1: int, step: int, known: Any, out: Array
    ) -> None:
        _ = sources
        num_negatives = uint64(out.shape[1])
        rows = (uint64(4) + num_negatives) * uint64(TILE)
        items, hits, drawn = np.empty(rows, np.uint32), np.empty(rows, np.uint32), np.empty(rows, np.uint32)
        free = np.empty(TILE, np.uint32)
        for start in range(uint64(0), uint64(len(out)), uint64(TILE)):
            size = min(uint64(TILE), uint64(len(out)) - start)
            first = uint64(0)
            draw_tile(items, positions, start, first, num_negatives, num_items, k0, k1, step)
            if exclude:
                count_free(free, users, start, size, num_items, known[2])
                redraw_touched(
                    items,
                    positions,
                    users,
                    free,
                    start,
                    size,
                    first,
                    num_negatives,
                    num_items,
                    k0,
                    k1,
                    step,
                    known,
                    exact,
                    hits,
                    drawn,
                )
            for w in range(size):
                for k in range(num_negatives):
                    out[start + w, k] = items[(k + uint64(1)) * uint64(TILE) + w]

    return entry_point(run)


def sample_negatives(
    user_index: Tensor,
    num_negatives: int,
    num_items: int,
    *,
    key: Key,
    step: int,
    known_positives: KnownPositives | None = None,
    first_position: int = 0,
) -> Tensor:
    """The draws alone, as the training step makes them. See the reference's `sample_negatives`."""
    size = len(user_index)
    users = np.zeros(size + TILE, dtype=np.uint32)
    users[:size] = user_index.numpy()
    out = np.empty((size, num_negatives), dtype=np.int64)
    exact = known_positives is None or membership_of(known_positives).exact
    _compiled(known_positives is not None, exact)(
        np.arange(first_position, first_position + size + TILE).astype(np.uint32),
        users,
        uint64(num_items),
        uint32(key[0]),
        uint32(key[1]),
        uint32(step),
        known_arrays(known_positives),
        out,
    )
    return torch.from_numpy(out)
