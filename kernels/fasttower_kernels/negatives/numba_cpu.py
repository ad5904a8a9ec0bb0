"""The sampling rule for a tile of positives, by a proposal whose name is a literal.

The first draws of the tile are vectorised over its positives. Those that hit a known positive are gathered
and drawn again together, attempt by attempt, so the redraws vectorise too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttower_kernels.compiled import (
    OPTIONS,
    SOURCES,
    Array,
    chosen,
    empty,
    entry_point,
    njit,
    uint32,
    uint64,
)
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.membership import known_arrays, membership_of, touched, untouched
from fasttower_kernels.negatives.popularity import Popularity
from fasttower_kernels.negatives.reference import ATTEMPTS
from fasttower_kernels.philox import Key
from fasttower_kernels.philox.numba_cpu import below, philox4x32

TILE = 64
"""Positives that are handled together: some vector registers of them; all buffers stay in the L1 cache."""


class Draws(NamedTuple):
    """Where draws come from.

    Attributes:
        count: N, of each positive, int64.
        num_items: I, uint64.
        k0: first word of the key, uint32.
        k1: second word.
        words: of a draw, uint32.
        threshold: (I,), uint32, of a `Popularity`; like the next two empty for uniform draws.
        alias: (I,), int32.
        log_p: (I,), float32.
        log_free_mass: (U,), float32.
    """

    count: int  # type: ignore[assignment]  # nobody calls a tuple's method of that name
    num_items: int
    k0: int
    k1: int
    words: int
    threshold: Array
    alias: Array
    log_p: Array
    log_free_mass: Array


def draws_of(num_negatives: int, num_items: int, key: Key, popularity: Popularity | None = None) -> Draws:
    """What compiled code takes of the settings of the draws."""
    words, table = 1, (empty(np.uint32), empty(np.int32), empty(np.float32), empty(np.float32))
    if popularity is not None:
        threshold, *others = (array.numpy() for array in vars(popularity).values())
        words, table = 2, (threshold.view(np.uint32), *others)
    k0, k1 = key
    return Draws(num_negatives, uint64(num_items), uint32(k0), uint32(k1), uint32(words), *table)


def draw_tile(proposal: str) -> Callable[..., None]:
    """Of a literal name, ``(items, positions, start, first, count, draws, step)``: attempt 0 of a tile.

    Draws negatives first .. first + count - 1 of each positive.

    ``items`` (rows * TILE,), uint32: draw k of positive w goes to ``items[(1 + k - first) * TILE + w]``;
    there are at least 1 + count rounded up to a multiple of 4 rows. ``positions`` (B,), uint32: in the batch.
    ``start`` uint64: where the tile begins in it. ``first`` uint64, a multiple of 4. ``count`` uint64.
    ``draws``: of `draws_of`. ``step`` uint32.
    """
    raise NotImplementedError  # compiled code only


def draw_again(proposal: str) -> Callable[..., int]:
    """Of a literal name, ``(position, k, step, attempt, draws)``: negative k at an attempt, uint32."""
    raise NotImplementedError  # compiled code only


@njit(**OPTIONS)
def _by_alias(word: int, side: int, num_items: int, threshold: Array, alias: Array) -> int:
    cell = below(word, num_items)
    return cell if side < threshold[uint64(cell)] else uint32(alias[uint64(cell)])


@njit(**OPTIONS)
def _uniform_tile(
    items: Array, positions: Array, start: int, first: int, count: int, draws: Any, step: int
) -> None:
    k0, k1, num_items = draws.k0, draws.k1, draws.num_items
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
def _popularity_tile(
    items: Array, positions: Array, start: int, first: int, count: int, draws: Any, step: int
) -> None:
    k0, k1, num_items = draws.k0, draws.k1, draws.num_items
    for pair in range((count + uint64(1)) >> uint64(1)):
        counter = uint32((first >> uint64(1)) + pair)
        row = (uint64(1) + uint64(2) * pair) * uint64(TILE)
        for w in range(uint64(TILE)):
            w0, w1, w2, w3 = philox4x32(k0, k1, positions[start + w], counter, step, uint32(0))
            items[row + w] = _by_alias(w0, w1, num_items, draws.threshold, draws.alias)
            items[row + w + uint64(TILE)] = _by_alias(w2, w3, num_items, draws.threshold, draws.alias)


@njit(**OPTIONS)
def _uniform_again(position: int, k: int, step: int, attempt: int, draws: Any) -> int:
    return below(_word(draws.k0, draws.k1, position, k, step, attempt), draws.num_items)


@njit(**OPTIONS)
def _popularity_again(position: int, k: int, step: int, attempt: int, draws: Any) -> int:
    first = k << uint32(1)
    word = _word(draws.k0, draws.k1, position, first, step, attempt)
    side = _word(draws.k0, draws.k1, position, first | uint32(1), step, attempt)
    return _by_alias(word, side, draws.num_items, draws.threshold, draws.alias)


chosen(draw_tile, {"uniform": _uniform_tile, "popularity": _popularity_tile}.__getitem__)
chosen(draw_again, {"uniform": _uniform_again, "popularity": _popularity_again}.__getitem__)


@njit(**OPTIONS)
def redraw_touched(
    proposal: str,
    items: Array,
    positions: Array,
    users: Array,
    free: Array,
    start: int,
    size: int,
    first: int,
    count: int,
    draws: Draws,
    step: int,
    known: Any,
    exact: bool,
    hits: Array,
    drawn: Array,
) -> int:
    """Replace the draws that are known positives, by the rule.

    Args:
        proposal: as in `draw_tile`.
        items: as `draw_tile` left it.
        positions: (B,), uint32.
        users: (B,), uint32.
        free: (TILE,), uint32: how many items each user has not touched; with 0 the draws stay.
        start: uint64: where the tile begins in both.
        size: uint64: positives in the tile.
        first: as in `draw_tile`.
        count: as in `draw_tile`.
        draws: as in `draw_tile`.
        step: uint32.
        known: bits, words, indptr and items of a `Membership`.
        exact: bool, its field.
        hits: (rows * TILE,), uint32, scratch.
        drawn: (rows * TILE,), uint32, scratch.

    Returns:
        uint64: how many were found by their rank among the untouched items; ``hits`` begins with their slots.
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
            drawn[i] = draw_again(proposal)(positions[start + w], k, step, attempt, draws)
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
        word = _word(draws.k0, draws.k1, positions[start + w], k * draws.words, step, uint32(ATTEMPTS))
        items[slot] = untouched(uint64(users[start + w]), below(word, uint64(free[w])), indptr, rows)
    return waiting


@njit(**OPTIONS)
def _word(k0: int, k1: int, position: int, k: int, step: int, attempt: int) -> int:
    """Word k of a position's stream: lane k % 4 of its counter."""
    w0, w1, w2, w3 = philox4x32(k0, k1, position, k >> uint32(2), step, attempt)
    lane = k & uint32(3)
    return (w0 if lane == uint32(0) else w1) if lane < uint32(2) else (w2 if lane == uint32(2) else w3)


@njit(**OPTIONS)
def count_free(free: Array, users: Array, start: int, size: int, num_items: int, known: Any) -> None:
    """Write how many items each user of a tile has not touched; ``known`` is of `known_arrays`."""
    indptr = known[2]
    for w in range(size):
        user = uint64(users[start + w])
        free[w] = uint32(num_items - uint64(indptr[user + uint64(1)] - indptr[user]))


@lru_cache
def _compiled(proposal: str, exclude: bool, exact: bool, sources: int = SOURCES) -> Any:
    def run(positions: Array, users: Array, draws: Any, step: int, known: Any, out: Array) -> None:
        _ = sources
        num_negatives = uint64(out.shape[1])
        rows = (uint64(4) + num_negatives) * uint64(TILE)
        items, hits, drawn = np.empty(rows, np.uint32), np.empty(rows, np.uint32), np.empty(rows, np.uint32)
        free = np.empty(TILE, np.uint32)
        for start in range(uint64(0), uint64(len(out)), uint64(TILE)):
            size = min(uint64(TILE), uint64(len(out)) - start)
            first = uint64(0)
            draw_tile(proposal)(items, positions, start, first, num_negatives, draws, step)
            if exclude:
                count_free(free, users, start, size, draws.num_items, known)
                redraw_touched(
                    proposal,
                    items,
                    positions,
                    users,
                    free,
                    start,
                    size,
                    first,
                    num_negatives,
                    draws,
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
    popularity: Popularity | None = None,
    first_position: int = 0,
) -> Tensor:
    """Only the draws, as the training step makes them. See the reference's `sample_negatives`."""
    size = len(user_index)
    users = np.zeros(size + TILE, dtype=np.uint32)
    users[:size] = user_index.numpy()
    out = np.empty((size, num_negatives), dtype=np.int64)
    exact = known_positives is None or membership_of(known_positives).exact
    proposal = "uniform" if popularity is None else "popularity"
    _compiled(proposal, known_positives is not None, exact)(
        np.arange(first_position, first_position + size + TILE).astype(np.uint32),
        users,
        draws_of(num_negatives, num_items, key, popularity),
        uint32(step),
        known_arrays(known_positives),
        out,
    )
    return torch.from_numpy(out)
