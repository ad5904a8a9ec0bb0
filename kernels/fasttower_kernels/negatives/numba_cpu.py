"""The sampling rule for a tile of positives.

The first draws of the tile are vectorised over its positives. Those that hit a known positive are gathered
and drawn again together, attempt by attempt, so the redraws vectorise too.

A large membership is read from memory, so the rule has three parts: the training step asks for what the next
part will read, and computes in between. `draw_negatives` is all of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttower_kernels.compiled import OPTIONS, SOURCES, Array, entry_point, njit, uint32, uint64
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives.membership_numba_cpu import (
    Membership,
    bits_row,
    items_row,
    membership_of,
    place,
    row_contains,
    untouched,
)
from fasttower_kernels.negatives.reference import ATTEMPTS
from fasttower_kernels.philox import Key
from fasttower_kernels.philox.numba_cpu import below, philox4x32
from fasttower_kernels.vector_rows import prefetch

TILE = 64
"""Positives that are handled together: some vector registers of them; all buffers stay in the L1 cache."""


class TileDraws(NamedTuple):
    """The draws of a tile of positives, and where the bits are that they are looked up in.

    Draw k of positive w has slot (1 + k - first) * TILE + w of the first three arrays, where ``first`` is the
    first of the draws that are handled together.

    Attributes:
        items: (rows * TILE,), uint32; row 0 is for the positives.
        words: (rows * TILE,), uint32: in the user's row; not used where all rows are bitmaps.
        masks: the same.
        rows: (TILE,), uint64: the first words of the users' rows.
        free: (TILE,), uint32: how many items each user has not touched; with 0 the draws stay.
    """

    items: Array
    words: Array
    masks: Array
    rows: Array
    free: Array


@njit(**OPTIONS)
def tile_draws(count: int) -> TileDraws:
    """Room for so many negatives of each positive, and the three more that `draw_tile` may write."""
    slots = (4 + count) * TILE
    return TileDraws(
        np.empty(slots, np.uint32),
        np.empty(slots, np.uint32),
        np.empty(slots, np.uint32),
        np.empty(TILE, np.uint64),
        np.empty(TILE, np.uint32),
    )


@njit(**OPTIONS)
def draw_tile(
    items: Array, positions: Array, start: int, first: int, count: int, sampling: Any, step: int
) -> None:
    """Draw negatives first .. first + count - 1 of each positive of the tile, attempt 0.

    Args:
        items: of `TileDraws`.
        positions: (B,), uint32: positions in the batch.
        start: uint64: where the tile begins in it.
        first: uint64, a multiple of 4.
        count: uint64.
        sampling: N as int64, I as uint64, two words of the key as uint32.
        step: uint32.
    """
    _, num_items, k0, k1 = sampling
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
def locate_bits(
    draws: TileDraws, users: Array, start: int, count: int, num_items: int, known: Membership, exact: bool
) -> None:
    """Write what a tile's draws have to be looked up in.

    Args:
        draws: its items as `draw_tile` left them; the other fields are written.
        users: (B,), uint32.
        start: as in `draw_tile`.
        count: as in `draw_tile`.
        num_items: uint64.
        known: the membership.
        exact: whether all its rows are bitmaps.
    """
    sizes = np.empty(TILE, np.uint64)
    for w in range(uint64(TILE)):
        user = uint64(users[start + w])
        draws.rows[w], sizes[w] = bits_row(user, known.starts)
        begin, end = items_row(user, known.starts)
        draws.free[w] = uint32(num_items - (end - begin))
    if exact:  # a word and a mask are quickly had from the item
        return
    for k in range(uint64(1), count + uint64(1)):
        for w in range(uint64(TILE)):
            slot = k * uint64(TILE) + w
            is_bitmap = sizes[w] == known.bitmap_words
            draws.words[slot], draws.masks[slot] = place(draws.items[slot], sizes[w], is_bitmap)


@njit(**OPTIONS)
def _located(draws: TileDraws, slot: int, exact: bool) -> tuple[int, int]:
    """The word in the user's row, and the mask, of a draw."""
    if exact:
        return place(draws.items[slot], uint64(0), exact)
    return draws.words[slot], draws.masks[slot]


@njit(**OPTIONS)
def fetch_bits(draws: TileDraws, w: int, count: int, known: Membership, exact: bool) -> None:
    """Ask for the words that the draws of positive w are looked up in."""
    for k in range(uint64(1), count + uint64(1)):
        word, _ = _located(draws, k * uint64(TILE) + w, exact)
        prefetch(known.bits, draws.rows[w] + uint64(word), 1)


@njit(**OPTIONS)
def find_hits(draws: TileDraws, size: int, count: int, known: Membership, exact: bool, hits: Array) -> int:
    """Gather the slots of a tile's draws whose bits are on; return how many there are.

    The draws of users who have touched every item stay out.
    """
    found = uint64(0)
    for w in range(size):
        if draws.free[w] == uint32(0):
            continue
        for k in range(uint64(1), count + uint64(1)):
            slot = k * uint64(TILE) + w
            word, mask = _located(draws, slot, exact)
            hits[found] = uint32(slot)
            found += uint64(known.bits[draws.rows[w] + uint64(word)] & mask == mask)
    return found


@njit(**OPTIONS)
def draw_again(
    hits: Array,
    count: int,
    words: Array,
    positions: Array,
    start: int,
    first: int,
    sampling: Any,
    step: int,
    attempt: int,
) -> None:
    """Write the words of another attempt.

    Args:
        hits: (rows * TILE,), uint32: the slots of the draws to replace.
        count: uint64, how many there are.
        words: (rows * TILE,), uint32, out: for each of them, the random word.
        positions: (B,), uint32.
        start: as in `draw_tile`.
        first: as in `draw_tile`.
        sampling: as in `draw_tile`.
        step: uint32.
        attempt: uint32.
    """
    _, _, k0, k1 = sampling
    base = uint32(first) - uint32(1)  # of a slot's negative, with its row in the tile
    for i in range(count):
        position = positions[start + uint64(hits[i] & uint32(TILE - 1))]
        k = uint32(base + hits[i] // uint32(TILE))
        w0, w1, w2, w3 = philox4x32(k0, k1, position, k >> uint32(2), step, attempt)
        lane = k & uint32(3)
        words[i] = (
            (w0 if lane == uint32(0) else w1) if lane < uint32(2) else (w2 if lane == uint32(2) else w3)
        )


@njit(**OPTIONS)
def fetch_hits(
    hits: Array,
    count: int,
    words: Array,
    users: Array,
    start: int,
    num_items: int,
    known: Membership,
    exact: bool,
) -> None:
    """Ask for what `redraw_touched` will read: rows to search in, and the bits of the draws after these."""
    for i in range(count):
        user = uint64(users[start + uint64(hits[i] & uint32(TILE - 1))])
        row, size = bits_row(user, known.starts)
        word, _ = place(below(words[i], num_items), size, exact or size == known.bitmap_words)
        prefetch(known.bits, row + uint64(word), 1)
        if not exact:
            begin, end = items_row(user, known.starts)
            quarter = (end - begin) >> uint64(2)
            for part in range(uint64(1), uint64(4)):
                prefetch(known.items, begin + part * quarter, 1)


@njit(**OPTIONS)
def draw_ahead(
    draws: TileDraws,
    positions: Array,
    users: Array,
    start: int,
    first: int,
    count: int,
    sampling: Any,
    step: int,
    known: Membership,
    exclude: bool,
    exact: bool,
) -> None:
    """The first part of the rule: attempt 0, and where to look it up."""
    draw_tile(draws.items, positions, start, first, count, sampling, step)
    if exclude:
        locate_bits(draws, users, start, count, sampling[1], known, exact)


@njit(**OPTIONS)
def look_up(
    draws: TileDraws,
    hits: Array,
    words: Array,
    positions: Array,
    users: Array,
    start: int,
    size: int,
    first: int,
    count: int,
    sampling: Any,
    step: int,
    known: Membership,
    exclude: bool,
    exact: bool,
) -> int:
    """The second part: gather the draws whose bits are on, and draw for them again.

    Args:
        draws: of `draw_ahead`.
        hits: (rows * TILE,), uint32, out: the slots of these draws.
        words: (rows * TILE,), uint32, out: for each of them the random word of attempt 1.
        positions: (B,), uint32.
        users: (B,), uint32.
        start: uint64: where the tile begins in both.
        size: uint64: positives in the tile.
        first: as in `draw_tile`.
        count: as in `draw_tile`.
        sampling: as in `draw_tile`.
        step: uint32.
        known: the membership.
        exclude: whether known positives are left out.
        exact: whether all rows of the membership are bitmaps.

    Returns:
        How many there are, uint64.
    """
    found = uint64(0)
    if exclude:
        found = find_hits(draws, size, count, known, exact, hits)
        draw_again(hits, found, words, positions, start, first, sampling, step, uint32(1))
        fetch_hits(hits, found, words, users, start, sampling[1], known, exact)
    return found


@njit(**OPTIONS)
def redraw_touched(
    draws: TileDraws,
    hits: Array,
    count: int,
    words: Array,
    positions: Array,
    users: Array,
    start: int,
    first: int,
    sampling: Any,
    step: int,
    known: Membership,
    exact: bool,
) -> None:
    """The last part of the rule: replace the draws that are known positives.

    The arguments are those of `look_up`, and ``count`` is what it returned. Hits and words are scratch.
    """
    num_items = sampling[1]
    attempt = uint32(1)
    while count:
        if not exact:  # a filter's bits may be others'
            left = uint64(0)
            for i in range(count):
                slot = hits[i]
                user = uint64(users[start + uint64(slot & uint32(TILE - 1))])
                _, size = bits_row(user, known.starts)
                begin, end = items_row(user, known.starts)
                hits[left] = slot
                words[left] = words[i]
                is_touched = size == known.bitmap_words
                is_touched = is_touched or row_contains(begin, end, draws.items[slot], known.items)
                left += uint64(is_touched)
            count = left
        if attempt == uint32(ATTEMPTS):
            for i in range(count):
                w = uint64(hits[i] & uint32(TILE - 1))
                rank = below(words[i], uint64(draws.free[w]))
                draws.items[hits[i]] = untouched(uint64(users[start + w]), rank, known)
            break
        left = uint64(0)
        for i in range(count):
            slot = hits[i]
            item = below(words[i], num_items)
            row, size = bits_row(uint64(users[start + uint64(slot & uint32(TILE - 1))]), known.starts)
            word, mask = place(item, size, exact or size == known.bitmap_words)
            draws.items[slot] = item
            hits[left] = slot
            left += uint64(known.bits[row + uint64(word)] & mask == mask)
        count = left
        attempt = uint32(attempt + uint32(1))
        draw_again(hits, count, words, positions, start, first, sampling, step, attempt)


@njit(**OPTIONS)
def draw_negatives(
    draws: TileDraws,
    hits: Array,
    words: Array,
    positions: Array,
    users: Array,
    start: int,
    size: int,
    first: int,
    count: int,
    sampling: Any,
    step: int,
    known: Membership,
    exclude: bool,
    exact: bool,
) -> None:
    """The three parts of the rule, one after another; the arguments are those of `look_up`."""
    draw_ahead(draws, positions, users, start, first, count, sampling, step, known, exclude, exact)
    found = look_up(
        draws,
        hits,
        words,
        positions,
        users,
        start,
        size,
        first,
        count,
        sampling,
        step,
        known,
        exclude,
        exact,
    )
    redraw_touched(draws, hits, found, words, positions, users, start, first, sampling, step, known, exact)


@lru_cache
def _compiled(exclude: bool, exact: bool, sources: int = SOURCES) -> Any:
    def run(positions: Array, users: Array, sampling: Any, step: int, known: Membership, out: Array) -> None:
        _ = sources
        num_negatives = uint64(out.shape[1])
        draws = tile_draws(out.shape[1])
        hits, words = np.empty(len(draws.items), np.uint32), np.empty(len(draws.items), np.uint32)
        for start in range(uint64(0), uint64(len(out)), uint64(TILE)):
            size = min(uint64(TILE), uint64(len(out)) - start)
            draw_negatives(
                draws,
                hits,
                words,
                positions,
                users,
                start,
                size,
                uint64(0),
                num_negatives,
                sampling,
                step,
                known,
                exclude,
                exact,
            )
            for w in range(size):
                for k in range(num_negatives):
                    out[start + w, k] = draws.items[(k + uint64(1)) * uint64(TILE) + w]

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
    membership, exact = membership_of(known_positives)
    _compiled(known_positives is not None, exact)(
        np.arange(first_position, first_position + size + TILE).astype(np.uint32),
        users,
        (num_negatives, uint64(num_items), uint32(key[0]), uint32(key[1])),
        uint32(step),
        membership,
        out,
    )
    return torch.from_numpy(out)
