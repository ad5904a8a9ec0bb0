"""The sampling rule for a tile of positives, by a proposal whose name is a literal.

The first draws of the tile are vectorised over its positives. Those that hit a known positive are gathered
and drawn again together, attempt by attempt, so the redraws vectorise too.

A large membership is read from memory, so the rule has three parts: the training step asks for what the next
part will read, and computes in between. `draw_negatives` is all of them.
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
from fasttower_kernels.negatives.membership_numba_cpu import (
    Membership,
    bit_is_on,
    bits_row,
    items_row,
    membership_of,
    place,
    row_contains,
    untouched,
)
from fasttower_kernels.negatives.popularity import Popularity
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
        sizes: (TILE,), uint64: the numbers of their words; not used where all rows are bitmaps.
        free: (TILE,), uint32: how many items each user has not touched; with 0 the draws stay.
    """

    items: Array
    words: Array
    masks: Array
    rows: Array
    sizes: Array
    free: Array


class Sampling(NamedTuple):
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


def sampling_of(
    num_negatives: int, num_items: int, key: Key, popularity: Popularity | None = None
) -> Sampling:
    """What compiled code takes of the settings of the draws."""
    words, table = 1, (empty(np.uint32), empty(np.int32), empty(np.float32), empty(np.float32))
    if popularity is not None:
        threshold, *others = (array.numpy() for array in vars(popularity).values())
        words, table = 2, (threshold.view(np.uint32), *others)
    k0, k1 = key
    return Sampling(num_negatives, uint64(num_items), uint32(k0), uint32(k1), uint32(words), *table)


@njit(**OPTIONS)
def tile_draws(count: int) -> TileDraws:
    """Room for so many negatives of each positive, and the three more that `draw_tile` may write."""
    slots = (4 + count) * TILE
    return TileDraws(
        np.empty(slots, np.uint32),
        np.empty(slots, np.uint32),
        np.empty(slots, np.uint32),
        np.empty(TILE, np.uint64),
        np.empty(TILE, np.uint64),
        np.empty(TILE, np.uint32),
    )


def draw_tile(proposal: str) -> Callable[..., None]:
    """Of a literal name, ``(items, positions, start, first, count, sampling, step)``: attempt 0 of a tile.

    Draws negatives first .. first + count - 1 of each positive. ``items``: of `TileDraws`. ``positions``
    (B,), uint32: positions in the batch. ``start`` uint64: where the tile begins in it. ``first`` uint64, a
    multiple of 4. ``count`` uint64. ``sampling``: of `sampling_of`. ``step`` uint32.
    """
    raise NotImplementedError  # compiled code only


def drawn_item(proposal: str) -> Callable[..., int]:
    """Of a literal name, ``(position, k, step, attempt, sampling)``: negative k at an attempt, uint32."""
    raise NotImplementedError  # compiled code only


@njit(**OPTIONS)
def _word(sampling: Any, position: int, k: int, step: int, attempt: int) -> int:
    """Word k of a position's stream: lane k % 4 of its counter."""
    w0, w1, w2, w3 = philox4x32(sampling.k0, sampling.k1, position, k >> uint32(2), step, attempt)
    lane = k & uint32(3)
    return (w0 if lane == uint32(0) else w1) if lane < uint32(2) else (w2 if lane == uint32(2) else w3)


@njit(**OPTIONS)
def _by_alias(word: int, side: int, num_items: int, threshold: Array, alias: Array) -> int:
    cell = below(word, num_items)
    return cell if side < threshold[uint64(cell)] else uint32(alias[uint64(cell)])


@njit(**OPTIONS)
def _uniform_tile(
    items: Array, positions: Array, start: int, first: int, count: int, sampling: Any, step: int
) -> None:
    k0, k1, num_items = sampling.k0, sampling.k1, sampling.num_items
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
    items: Array, positions: Array, start: int, first: int, count: int, sampling: Any, step: int
) -> None:
    k0, k1, num_items = sampling.k0, sampling.k1, sampling.num_items
    for pair in range((count + uint64(1)) >> uint64(1)):
        counter = uint32((first >> uint64(1)) + pair)
        row = (uint64(1) + uint64(2) * pair) * uint64(TILE)
        for w in range(uint64(TILE)):
            w0, w1, w2, w3 = philox4x32(k0, k1, positions[start + w], counter, step, uint32(0))
            items[row + w] = _by_alias(w0, w1, num_items, sampling.threshold, sampling.alias)
            items[row + w + uint64(TILE)] = _by_alias(w2, w3, num_items, sampling.threshold, sampling.alias)


@njit(**OPTIONS)
def _uniform_item(position: int, k: int, step: int, attempt: int, sampling: Any) -> int:
    return below(_word(sampling, position, k, step, attempt), sampling.num_items)


@njit(**OPTIONS)
def _popularity_item(position: int, k: int, step: int, attempt: int, sampling: Any) -> int:
    first = k << uint32(1)
    word = _word(sampling, position, first, step, attempt)
    side = _word(sampling, position, first | uint32(1), step, attempt)
    return _by_alias(word, side, sampling.num_items, sampling.threshold, sampling.alias)


chosen(draw_tile, {"uniform": _uniform_tile, "popularity": _popularity_tile}.__getitem__)
chosen(drawn_item, {"uniform": _uniform_item, "popularity": _popularity_item}.__getitem__)


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
    # Fields that are used in a loop are named before it: each use would count a reference.
    items, words, masks, rows, sizes, free = draws
    starts, bitmap_words = known.starts, known.bitmap_words
    for w in range(uint64(TILE)):
        user = uint64(users[start + w])
        if exact:
            rows[w] = user * bitmap_words
        else:
            rows[w], sizes[w] = bits_row(user, starts)
        begin, end = items_row(user, starts)
        free[w] = uint32(num_items - (end - begin))
    if exact:  # a word and a mask are quickly had from the item
        return
    for k in range(uint64(1), count + uint64(1)):
        for w in range(uint64(TILE)):
            slot = k * uint64(TILE) + w
            words[slot], masks[slot] = place(items[slot], sizes[w], sizes[w] == bitmap_words)


@njit(**OPTIONS)
def fetch_bits(draws: TileDraws, w: int, count: int, known: Membership, exact: bool) -> None:
    """Ask for the words that the draws of positive w are looked up in."""
    items, words, _, rows, _, _ = draws
    bits, row = known.bits, rows[w]
    for k in range(uint64(1), count + uint64(1)):
        slot = k * uint64(TILE) + w
        prefetch(bits, row + uint64(items[slot] >> uint32(5) if exact else words[slot]), 1)


@njit(**OPTIONS)
def find_hits(draws: TileDraws, size: int, count: int, known: Membership, exact: bool, hits: Array) -> int:
    """Gather the slots of a tile's draws whose bits are on; return how many there are.

    The draws of users who have touched every item stay out.
    """
    items, words, masks, rows, _, free = draws
    bits = known.bits
    found = uint64(0)
    for w in range(size):
        if free[w] == uint32(0):
            continue
        row = rows[w]
        for k in range(uint64(1), count + uint64(1)):
            slot = k * uint64(TILE) + w
            hits[found] = uint32(slot)
            if exact:
                found += uint64(bit_is_on(bits, row, items[slot]))
            else:
                found += uint64(bits[row + uint64(words[slot])] & masks[slot] == masks[slot])
    return found


@njit(**OPTIONS)
def draw_again(
    proposal: str,
    hits: Array,
    count: int,
    drawn: Array,
    positions: Array,
    start: int,
    first: int,
    sampling: Any,
    step: int,
    attempt: int,
) -> None:
    """Write what another attempt draws: items, or at the last attempt the words that give ranks.

    Args:
        proposal: as in `draw_tile`.
        hits: (rows * TILE,), uint32: the slots of the draws to replace.
        count: uint64, how many there are.
        drawn: (rows * TILE,), uint32, out: for each of them.
        positions: (B,), uint32.
        start: as in `draw_tile`.
        first: as in `draw_tile`.
        sampling: as in `draw_tile`.
        step: uint32.
        attempt: uint32.
    """
    base = uint32(first) - uint32(1)  # of a slot's negative, with its row in the tile
    # The positions are gathered first: the loop that draws then vectorises.
    for i in range(count):
        drawn[i] = positions[start + uint64(hits[i] & uint32(TILE - 1))]
    if attempt == uint32(ATTEMPTS):
        for i in range(count):
            k = uint32(base + hits[i] // uint32(TILE))
            drawn[i] = _word(sampling, drawn[i], k * sampling.words, step, attempt)
        return
    for i in range(count):
        k = uint32(base + hits[i] // uint32(TILE))
        drawn[i] = drawn_item(proposal)(drawn[i], k, step, attempt, sampling)


# Of a sorted row that will be searched; few rows with a filter are longer.
_FETCHED_ITEMS = 256


@njit(**OPTIONS)
def fetch_hits(
    draws: TileDraws, hits: Array, count: int, drawn: Array, users: Array, start: int, known: Membership
) -> None:
    """Ask for what `redraw_touched` will read: rows to search in, and the bits of the draws after these."""
    rows, sizes = draws.rows, draws.sizes
    bits, starts, known_items, bitmap_words = known
    for i in range(count):
        w = uint64(hits[i] & uint32(TILE - 1))
        word, _ = place(drawn[i], sizes[w], sizes[w] == bitmap_words)
        prefetch(bits, rows[w] + uint64(word), 1)
        if sizes[w] != bitmap_words:
            begin, end = items_row(uint64(users[start + w]), starts)
            for p in range(begin, min(end, begin + uint64(_FETCHED_ITEMS)), uint64(16)):
                prefetch(known_items, p, 1)


@njit(**OPTIONS)
def draw_ahead(
    proposal: str,
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
    draw_tile(proposal)(draws.items, positions, start, first, count, sampling, step)
    if exclude:
        locate_bits(draws, users, start, count, sampling.num_items, known, exact)


@njit(**OPTIONS)
def look_up(
    proposal: str,
    draws: TileDraws,
    hits: Array,
    drawn: Array,
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
        proposal: as in `draw_tile`.
        draws: of `draw_ahead`.
        hits: (rows * TILE,), uint32, out: the slots of these draws.
        drawn: (rows * TILE,), uint32, out: for each of them the item of attempt 1.
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
        draw_again(proposal, hits, found, drawn, positions, start, first, sampling, step, uint32(1))
        if not exact:  # small bitmaps are near
            fetch_hits(draws, hits, found, drawn, users, start, known)
    return found


@njit(**OPTIONS)
def redraw_touched(
    proposal: str,
    draws: TileDraws,
    hits: Array,
    count: int,
    drawn: Array,
    positions: Array,
    users: Array,
    start: int,
    first: int,
    sampling: Any,
    step: int,
    known: Membership,
    exact: bool,
) -> int:
    """The last part of the rule: replace the draws that are known positives.

    The arguments are those of `look_up`, and ``count`` is what it returned. Hits and drawn are scratch.

    Returns:
        How many were found by their rank among the untouched items, uint64; ``hits`` begins with their slots.
    """
    items, _, _, rows, sizes, free = draws
    bits, starts, known_items, bitmap_words = known
    attempt = uint32(1)
    while count:
        if not exact:  # a filter's bits may be those of other items
            left = uint64(0)
            for i in range(count):
                slot = hits[i]
                w = uint64(slot & uint32(TILE - 1))
                begin, end = items_row(uint64(users[start + w]), starts)
                hits[left] = slot
                drawn[left] = drawn[i]
                is_bitmap = sizes[w] == bitmap_words
                left += uint64(is_bitmap or row_contains(begin, end, items[slot], known_items))
            count = left
        if attempt == uint32(ATTEMPTS):
            for i in range(count):
                w = uint64(hits[i] & uint32(TILE - 1))
                rank = below(drawn[i], uint64(free[w]))
                items[hits[i]] = untouched(uint64(users[start + w]), rank, starts, known_items)
            return count
        left = uint64(0)
        for i in range(count):
            slot = hits[i]
            w = uint64(slot & uint32(TILE - 1))
            item = drawn[i]
            items[slot] = item
            hits[left] = slot
            if exact:
                left += uint64(bit_is_on(bits, rows[w], item))
            else:
                word, mask = place(item, sizes[w], sizes[w] == bitmap_words)
                left += uint64(bits[rows[w] + uint64(word)] & mask == mask)
        count = left
        attempt = uint32(attempt + uint32(1))
        draw_again(proposal, hits, count, drawn, positions, start, first, sampling, step, attempt)
    return uint64(0)


@njit(**OPTIONS)
def draw_negatives(
    proposal: str,
    draws: TileDraws,
    hits: Array,
    drawn: Array,
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
    draw_ahead(proposal, draws, positions, users, start, first, count, sampling, step, known, exclude, exact)
    found = look_up(
        proposal,
        draws,
        hits,
        drawn,
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
    redraw_touched(
        proposal, draws, hits, found, drawn, positions, users, start, first, sampling, step, known, exact
    )


@lru_cache
def _compiled(proposal: str, exclude: bool, exact: bool, sources: int = SOURCES) -> Any:
    def run(positions: Array, users: Array, sampling: Any, step: int, known: Membership, out: Array) -> None:
        _ = sources
        num_negatives = uint64(out.shape[1])
        draws = tile_draws(out.shape[1])
        hits, drawn = np.empty(len(draws.items), np.uint32), np.empty(len(draws.items), np.uint32)
        for start in range(uint64(0), uint64(len(out)), uint64(TILE)):
            size = min(uint64(TILE), uint64(len(out)) - start)
            draw_negatives(
                proposal,
                draws,
                hits,
                drawn,
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
    popularity: Popularity | None = None,
    first_position: int = 0,
) -> Tensor:
    """The draws alone, as the training step makes them. See the reference's `sample_negatives`."""
    size = len(user_index)
    users = np.zeros(size + TILE, dtype=np.uint32)
    users[:size] = user_index.numpy()
    out = np.empty((size, num_negatives), dtype=np.int64)
    membership, exact = membership_of(known_positives)
    proposal = "uniform" if popularity is None else "popularity"
    _compiled(proposal, known_positives is not None, exact)(
        np.arange(first_position, first_position + size + TILE).astype(np.uint32),
        users,
        sampling_of(num_negatives, num_items, key, popularity),
        uint32(step),
        membership,
        out,
    )
    return torch.from_numpy(out)
