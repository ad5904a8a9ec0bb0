"""A tile of a block's positives against the block's list: reading it, its logits, and its gradients.

The logits of a tile's positives and at most CHUNK items are all that there is of U V^T at any time. They
become slopes in place, and the gradients of both sides follow while they are in the cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fasttower_kernels.compiled import FAST, OPTIONS, Array, float32, njit, uint32, uint64
from fasttower_kernels.losses.numba_cpu import TILE
from fasttower_kernels.similarity_numba_cpu import inverse_norm, through_norm
from fasttower_kernels.step.shared_negatives.block_list_numba_cpu import group_up
from fasttower_kernels.step.shared_negatives.tile_matmul_numba_cpu import add_product
from fasttower_kernels.vector_rows import (
    add_scaled,
    count_bits,
    dot,
    filled,
    load_row,
    prefetch,
    replaced,
    scaled,
    store_row,
)

CHUNK = 1024
"""Items of a list that are handled together: their logits with a tile take 256 KB, of the L2 cache."""

_NEAR = 64
"""Items whose slopes and vectors are taken together from the L1 cache for the users' gradients."""


class UserTile(NamedTuple):
    """The positives of a tile, and their logits with a chunk.

    Attributes:
        x: ((1 + rows) * TILE,), float32: logits, then slopes; row 0 is the positives'.
        vectors: (TILE * P,), float32: users as read, zero beyond the last positive.
        columns: (P * TILE,), float32: the same, transposed.
        gradients: (TILE * P,), float32, of ``vectors``.
        inverse: (TILE,), float32: of each user's norm, with cosine similarity.
        own_rows: (TILE,), uint32: where the block's list has the positives' items.
    """

    x: Array
    vectors: Array
    columns: Array
    gradients: Array
    inverse: Array
    own_rows: Array


@njit(**OPTIONS)
def new_user_tile(longest: int, width: int) -> Any:
    """Room for a tile, and for its logits with the chunks of lists of at most so many items (uint64)."""
    rows = uint64(1) + group_up(min(longest, uint64(CHUNK)))
    return UserTile(
        np.empty(rows * uint64(TILE), dtype=np.float32),
        np.empty(uint64(TILE) * uint64(width), dtype=np.float32),
        np.empty(uint64(TILE) * uint64(width), dtype=np.float32),
        np.empty(uint64(TILE) * uint64(width), dtype=np.float32),
        np.empty(TILE, dtype=np.float32),
        np.empty(TILE, dtype=np.uint32),
    )


@njit(fastmath=FAST, **OPTIONS)
def read_users(
    tile: Any,
    user_table: Array,
    rows: Array,
    start: int,
    here: int,
    temperature: float,
    width: int,
    cosine: bool,
) -> None:
    """Gather the users of positives start .. start + here - 1, and zero what they get."""
    size = uint64(TILE)
    zero = filled(float32(0), width)
    for w in range(size):
        prefetch(user_table, uint64(rows[start + size + w]) * uint64(width), width)
        vector = zero
        if w < here:
            vector = load_row(user_table, uint64(rows[start + w]), width)
            if cosine:
                tile.inverse[w] = inverse_norm(vector)
                vector = scaled(tile.inverse[w] / temperature, vector)
        store_row(tile.vectors, w, vector)
        store_row(tile.gradients, w, zero)
    for d in range(uint64(width)):
        for w in range(size):
            tile.columns[d * size + w] = tile.vectors[w * uint64(width) + d]


@njit(fastmath=FAST, **OPTIONS)
def score_positives(
    tile: Any,
    items: Array,
    start: int,
    here: int,
    block_list: Any,
    item_bias: Array,
    width: int,
    has_bias: bool,
) -> None:
    """The logits of the positives: row 0 of ``x``, zero beyond the last one."""
    for w in range(uint64(TILE)):
        tile.x[w] = float32(0)
    for w in range(here):
        v = load_row(block_list.vectors, uint64(tile.own_rows[w]), width)
        tile.x[w] = dot(load_row(tile.vectors, w, width), v)
        if has_bias:
            tile.x[w] += item_bias[uint64(items[start + w])]


@njit(fastmath=FAST, **OPTIONS)
def score_chunk(tile: Any, block_list: Any, first: int, count: int, width: int) -> None:
    """Logits of rows first .. first + count - 1 of the list, with their offsets; -inf where masked."""
    for m in range(group_up(count)):
        row = filled(block_list.offset[first + m], TILE)
        if m < count:
            masked = block_list.masked[uint64(block_list.first_row[first + m])]
            row = replaced(row, masked, float32(-np.inf))
        store_row(tile.x, uint64(1) + m, row)
    add_product(
        tile.x,
        uint64(1),
        block_list.vectors,
        first * uint64(width),
        uint64(width),
        uint64(1),
        tile.columns,
        uint64(0),
        group_up(count),
        uint64(width),
        TILE,
    )


@njit(fastmath=FAST, **OPTIONS)
def add_chunk_gradients(
    tile: Any,
    active: int,
    here: int,
    block_list: Any,
    first: int,
    count: int,
    width: int,
    has_bias: bool,
    has_l2: bool,
) -> None:
    """Add the gradients of the chunk's items and of the tile's users, by the slopes in ``x``.

    Args:
        tile: a `UserTile`.
        active: uint64: bit w is on where positive w counts.
        here: uint64: positives in the tile.
        block_list: a `BlockList`.
        first: uint64: where the chunk begins in the list.
        count: uint64.
        width: P.
        has_bias: of a `Variant`.
        has_l2: the same.
    """
    size = uint64(TILE)
    add_product(
        block_list.gradients,
        first,
        tile.x,
        size,
        size,
        uint64(1),
        tile.vectors,
        uint64(0),
        group_up(count),
        here,
        width,
    )
    for near in range(uint64(0), count, uint64(_NEAR)):
        add_product(
            tile.gradients,
            uint64(0),
            tile.x,
            (uint64(1) + near) * size,
            uint64(1),
            size,
            block_list.vectors,
            first + near,
            group_up(here),
            min(uint64(_NEAR), count - near),
            width,
        )
    ones = filled(float32(1), TILE)
    for m in range(count):
        if has_bias:
            block_list.bias_gradients[first + m] += dot(load_row(tile.x, uint64(1) + m, TILE), ones)
        if has_l2:
            masked = block_list.masked[uint64(block_list.first_row[first + m])]
            block_list.counts[first + m] += uint32(count_bits(active & ~masked))


@njit(fastmath=FAST, **OPTIONS)
def finish_tile(
    tile: Any,
    weight: Array,
    rows: Array,
    start: int,
    here: int,
    block_list: Any,
    user_table: Array,
    user_gradient: Array,
    user_l2: float,
    temperature: float,
    width: int,
    has_l2: bool,
    cosine: bool,
) -> None:
    """Add what the positives' slopes give to both sides, and the users' gradients to their table's."""
    for w in range(here):
        if weight[w] == float32(0):
            continue
        g, own = tile.x[w], uint64(tile.own_rows[w])
        u, v = load_row(tile.vectors, w, width), load_row(block_list.vectors, own, width)
        store_row(block_list.gradients, own, add_scaled(load_row(block_list.gradients, own, width), g, u))
        block_list.bias_gradients[own] += g
        block_list.counts[own] += uint32(1)
        du = add_scaled(load_row(tile.gradients, w, width), g, v)
        if cosine:
            du = through_norm(du, u, tile.inverse[w], temperature)
        row = uint64(rows[start + w])
        if has_l2:
            du = add_scaled(du, user_l2, load_row(user_table, row, width))
        store_row(user_gradient, row, add_scaled(load_row(user_gradient, row, width), float32(1), du))
