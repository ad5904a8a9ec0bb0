"""The list that a block of positives is scored against: items, their vectors as read, and their gradients.

Vectors are gathered once for a block, and gradients leave the block once, so that the tiles of the block work
on rows that lie together. The positives' own vectors follow those of the list, where the list does not hold
them anyhow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fasttower_kernels.compiled import FAST, OPTIONS, Array, float32, njit, uint32, uint64
from fasttower_kernels.philox.numba_cpu import below, philox4x32
from fasttower_kernels.similarity_numba_cpu import inverse_norm, through_norm
from fasttower_kernels.step.shared_negatives.tile_matmul_numba_cpu import ROW_GROUP
from fasttower_kernels.vector_rows import add_scaled, filled, load_row, prefetch, scaled, store_row

_AHEAD = 8
"""Rows that are fetched before they are read."""


class ListSampling(NamedTuple):
    """Where lists come from.

    Attributes:
        block_size: uint64: positives that share a list.
        drawn: uint64: items that are drawn for it.
        in_batch: bool: whether the items of the block's positives are in it.
        num_items: I, uint64.
        k0: first word of the lists' key, uint32.
        k1: second word, uint32.
        rate: (I,), float32: see `Negatives.list_rates`.
        drawn_rate: float32.
    """

    block_size: int
    drawn: int
    in_batch: bool
    num_items: int
    k0: int
    k1: int
    rate: Array
    drawn_rate: float


class BlockList(NamedTuple):
    """Room for the list of a block of b positives, R rows.

    Attributes:
        items: (R,), uint32: those of the list, then, unless they are in it, those of the positives.
        vectors: (R * P,), float32, as read.
        inverse: (R,), float32: of each vector's norm, with cosine similarity.
        offset: (R,), float32: what is added to a negative's logits: bias, less log q if the loss asks.
        gradients: (R * P,), float32, of ``vectors``.
        bias_gradients: (R,), float32.
        counts: (R,), uint32: terms that the item has in the L2 term.
        first_row: (R,), uint32: of the rows with the same item, the first one.
        masked: (R,), uint64: bit w of a first row is on where the item must not be a negative of the tile's
            positive w.
        hits: (R,), uint32, scratch.
    """

    items: Array
    vectors: Array
    inverse: Array
    offset: Array
    gradients: Array
    bias_gradients: Array
    counts: Array
    first_row: Array
    masked: Array
    hits: Array


@njit(**OPTIONS)
def group_up(rows: int) -> int:
    """The next multiple of ROW_GROUP, uint64."""
    return (rows + uint64(ROW_GROUP - 1)) // uint64(ROW_GROUP) * uint64(ROW_GROUP)


@njit(**OPTIONS)
def new_list(sampling: Any, width: int) -> Any:
    """Room for any block's list."""
    rows = group_up(sampling.drawn + sampling.block_size) + sampling.block_size + uint64(ROW_GROUP)
    return BlockList(
        np.empty(rows, dtype=np.uint32),
        np.empty(rows * uint64(width), dtype=np.float32),
        np.empty(rows, dtype=np.float32),
        np.empty(rows, dtype=np.float32),
        np.empty(rows * uint64(width), dtype=np.float32),
        np.empty(rows, dtype=np.float32),
        np.empty(rows, dtype=np.uint32),
        np.empty(rows, dtype=np.uint32),
        np.empty(rows, dtype=np.uint64),
        np.empty(rows, dtype=np.uint32),
    )


@njit(**OPTIONS)
def draw_items(items: Array, number: int, sampling: Any, step: int) -> None:
    """Write the drawn items of a block's list to the first M places of ``items``, uint32, and up to 3 more.

    Args:
        items: (M + 3,) or longer.
        number: uint64: of the block in the batch.
        sampling: a `ListSampling`.
        step: uint32.
    """
    for quad in range((sampling.drawn + uint64(3)) >> uint64(2)):
        w0, w1, w2, w3 = philox4x32(sampling.k0, sampling.k1, uint32(number), uint32(quad), step, uint32(0))
        m = quad * uint64(4)
        items[m] = below(w0, sampling.num_items)
        items[m + uint64(1)] = below(w1, sampling.num_items)
        items[m + uint64(2)] = below(w2, sampling.num_items)
        items[m + uint64(3)] = below(w3, sampling.num_items)


@njit(**OPTIONS)
def fill_list(
    block_list: Any, number: int, positives: Array, begin: int, size: int, sampling: Any, step: int
) -> int:
    """Write the list's items; returns M, how many, uint64.

    Args:
        block_list: of `new_list`.
        number: uint64: of the block in the batch.
        positives: (B,), uint32: of the batch.
        begin: uint64: where the block begins in it.
        size: uint64: b.
        sampling: a `ListSampling`.
        step: uint32.
    """
    items = block_list.items
    draw_items(items, number, sampling, step)
    count = sampling.drawn
    if sampling.in_batch:
        for b in range(size):
            items[count + b] = positives[begin + b]
        count += size
    return count


@njit(fastmath=FAST, **OPTIONS)
def read_rows(block_list: Any, begin: int, end: int, item_table: Array, width: int, cosine: bool) -> None:
    """Gather the vectors of rows begin .. end - 1; zero what they get; zero vectors up to the next group."""
    items, vectors = block_list.items, block_list.vectors
    zero = filled(float32(0), width)
    for row in range(begin, end):
        ahead = min(row + uint64(_AHEAD), end - uint64(1))
        prefetch(item_table, uint64(items[ahead]) * uint64(width), width)
        vector = load_row(item_table, uint64(items[row]), width)
        if cosine:
            block_list.inverse[row] = inverse_norm(vector)
            vector = scaled(block_list.inverse[row], vector)
        store_row(vectors, row, vector)
    for row in range(end, group_up(end)):
        store_row(vectors, row, zero)
        block_list.offset[row] = float32(0)
    for row in range(begin, group_up(end)):
        store_row(block_list.gradients, row, zero)
        block_list.bias_gradients[row] = float32(0)
        block_list.counts[row] = uint32(0)


@njit(**OPTIONS)
def set_offsets(
    block_list: Any,
    count: int,
    size: int,
    sampling: Any,
    item_bias: Array,
    has_bias: bool,
    less_log_q: bool,
) -> None:
    """What is added to the logits of the list's rows; b is the block's size."""
    for row in range(count):
        item = uint64(block_list.items[row])
        offset = item_bias[item] if has_bias else float32(0)
        if less_log_q:
            offset -= np.log(float32(size) * sampling.rate[item] + sampling.drawn_rate)
        block_list.offset[row] = offset


@njit(**OPTIONS)
def look_up(block_list: Any, count: int, flags: Array, heads: Array) -> None:
    """Flag the items of the list, and find the first row of each.

    Args:
        block_list: with its items.
        count: uint64: M.
        flags: (I,), uint8, zero: gets 1 for items of the list.
        heads: (I,), uint32: gets the first row of each item of the list.
    """
    for row in range(count):
        item = uint64(block_list.items[row])
        if not flags[item]:
            heads[item] = row
            flags[item] = 1
        block_list.first_row[row] = heads[item]


@njit(**OPTIONS)
def forget(block_list: Any, count: int, flags: Array) -> None:
    """Leave the flags zero."""
    for row in range(count):
        flags[uint64(block_list.items[row])] = 0


@njit(**OPTIONS)
def mask_tile(
    block_list: Any,
    count: int,
    users: Array,
    positives: Array,
    start: int,
    here: int,
    known: Any,
    flags: Array,
    heads: Array,
    exclude: bool,
) -> None:
    """Write which items of the list each positive of a tile must not have as a negative.

    Args:
        block_list: after `look_up`; its ``masked`` is written.
        count: uint64: M.
        users: (B,), uint32.
        positives: (B,), uint32.
        start: uint64: where the tile begins in both.
        here: uint64: positives in the tile.
        known: indptr (U + 1,) and items (nnz,) of the known positives, or empty.
        flags: of `look_up`.
        heads: of `look_up`.
        exclude: whether there are known positives.
    """
    indptr, rows = known
    masked, hits = block_list.masked, block_list.hits
    for m in range(count):
        masked[m] = uint64(0)
    for w in range(here):
        own = positives[start + w]
        hits[0] = own
        found = uint64(flags[own])
        if exclude:
            user = uint64(users[start + w])
            for p in range(uint64(indptr[user]), uint64(indptr[user + uint64(1)])):
                item = uint32(rows[p])
                hits[found] = item
                found += uint64(flags[item])
        bit = uint64(1) << w
        for i in range(found):
            masked[uint64(heads[uint64(hits[i])])] |= bit


@njit(fastmath=FAST, **OPTIONS)
def scatter_rows(
    block_list: Any,
    begin: int,
    end: int,
    parameters: Any,
    gradients: Any,
    scales: Any,
    width: int,
    has_bias: bool,
    has_l2: bool,
    cosine: bool,
) -> None:
    """Add the gradients of rows begin .. end - 1 to those of the items."""
    _, item_table, item_bias = parameters
    _, item_gradient, bias_gradient = gradients
    for row in range(begin, end):
        ahead = uint64(block_list.items[min(row + uint64(_AHEAD), end - uint64(1))])
        prefetch(item_gradient, ahead * uint64(width), width)
        item = uint64(block_list.items[row])
        gradient = load_row(block_list.gradients, row, width)
        if cosine:
            read = load_row(block_list.vectors, row, width)
            gradient = through_norm(gradient, read, block_list.inverse[row], float32(1))
        terms = float32(block_list.counts[row])
        if has_l2:
            gradient = add_scaled(gradient, scales.item_l2 * terms, load_row(item_table, item, width))
        store_row(item_gradient, item, add_scaled(gradient, float32(1), load_row(item_gradient, item, width)))
        if has_bias:
            bias_gradient[item] += block_list.bias_gradients[row]
            if has_l2:
                bias_gradient[item] += scales.bias_l2 * terms * item_bias[item]
