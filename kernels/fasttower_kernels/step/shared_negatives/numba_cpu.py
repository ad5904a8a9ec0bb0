"""Shared negatives, compiled: a tile of a block's positives against the block's list, a chunk at a time.

The logits of 64 positives and at most CHUNK items are all that there is of U V^T at any time; they become
slopes in place, and the gradients of both sides follow while they are in the cache. A loss that needs all
logits of a positive first sweeps a list of several chunks twice.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttower_kernels.compiled import (
    FAST,
    OPTIONS,
    SOURCES,
    Array,
    empty,
    entry_point,
    flat_arrays,
    float32,
    njit,
    uint32,
    uint64,
)
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.losses.numba_cpu import NORMALISED, TILE, accumulate, begin_tile, new_tile, slopes
from fasttower_kernels.losses.scales_numba_cpu import factors_of, scales_of
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.negatives.reference import list_key
from fasttower_kernels.philox import Key
from fasttower_kernels.settings import LossSettings
from fasttower_kernels.similarity_numba_cpu import inverse_norm, through_norm
from fasttower_kernels.step.shared_negatives.block_list_numba_cpu import (
    ListSampling,
    fill_list,
    forget,
    group_up,
    look_up,
    mask_tile,
    new_list,
    read_rows,
    scatter_rows,
    set_offsets,
)
from fasttower_kernels.step.shared_negatives.tile_matmul_numba_cpu import add_product
from fasttower_kernels.step.variant_numba_cpu import Variant, variant_of
from fasttower_kernels.tables import Interactions, Tables
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


class Similarity(NamedTuple):
    """What a logit and a positive's term depend on.

    Attributes:
        temperature: of cosine similarity, float32.
        beta: of gbce, float32; 1 for other losses.
    """

    temperature: float
    beta: float


@njit(fastmath=FAST, **OPTIONS)
def _read_users(
    vectors: Array,
    columns: Array,
    inverse: Array,
    user_table: Array,
    rows: Array,
    start: int,
    here: int,
    temperature: float,
    width: int,
    cosine: bool,
) -> None:
    """Gather the users of a tile: (TILE, P) row by row in ``vectors`` and transposed in ``columns``."""
    tile = uint64(TILE)
    for w in range(tile):
        prefetch(user_table, uint64(rows[start + tile + w]) * uint64(width), width)
        vector = filled(float32(0), width)
        if w < here:
            vector = load_row(user_table, uint64(rows[start + w]), width)
            if cosine:
                inverse[w] = inverse_norm(vector)
                vector = scaled(inverse[w] / temperature, vector)
        store_row(vectors, w, vector)
    for d in range(uint64(width)):
        for w in range(tile):
            columns[d * tile + w] = vectors[w * uint64(width) + d]


@njit(fastmath=FAST, **OPTIONS)
def _score_chunk(x: Array, columns: Array, block_list: Any, first: int, count: int, width: int) -> None:
    """Logits of rows first .. first + count - 1 of the list, with their offsets; -inf where masked."""
    for m in range(group_up(count)):
        row = filled(block_list.offset[first + m], TILE)
        if m < count:
            row = replaced(row, block_list.masked[uint64(block_list.first_row[first + m])], float32(-np.inf))
        store_row(x, uint64(1) + m, row)
    a = first * uint64(width)
    add_product(
        x,
        uint64(1),
        block_list.vectors,
        a,
        uint64(width),
        uint64(1),
        columns,
        uint64(0),
        group_up(count),
        uint64(width),
        TILE,
    )


@njit(fastmath=FAST, **OPTIONS)
def _chunk_gradients(
    x: Array,
    vectors: Array,
    user_gradients: Array,
    active: int,
    block_list: Any,
    first: int,
    count: int,
    width: int,
    has_bias: bool,
    has_l2: bool,
) -> None:
    """Add the gradients of the chunk's items and of the tile's users, whose slopes are in ``x``."""
    tile = uint64(TILE)
    add_product(
        block_list.gradients,
        first,
        x,
        tile,
        tile,
        uint64(1),
        vectors,
        uint64(0),
        group_up(count),
        tile,
        width,
    )
    for near in range(uint64(0), count, uint64(_NEAR)):
        add_product(
            user_gradients,
            uint64(0),
            x,
            (uint64(1) + near) * tile,
            uint64(1),
            tile,
            block_list.vectors,
            first + near,
            tile,
            min(uint64(_NEAR), count - near),
            width,
        )
    ones = filled(float32(1), TILE)
    for m in range(count):
        if has_bias:
            block_list.bias_gradients[first + m] += dot(load_row(x, uint64(1) + m, TILE), ones)
        if has_l2:
            masked = block_list.masked[uint64(block_list.first_row[first + m])]
            block_list.counts[first + m] += uint32(count_bits(active & ~masked))


@njit(fastmath=FAST, **OPTIONS)
def _positive_gradients(
    x: Array,
    vectors: Array,
    user_gradients: Array,
    inverse: Array,
    weight: Array,
    rows: Array,
    start: int,
    here: int,
    own_rows: Array,
    block_list: Any,
    user_table: Array,
    user_gradient: Array,
    scales: Any,
    temperature: float,
    width: int,
    has_l2: bool,
    cosine: bool,
) -> None:
    """Add what the tile's positives get, and write the users' gradients to their table."""
    for w in range(here):
        if weight[w] == float32(0):
            continue
        g, own = x[w], uint64(own_rows[w])
        u, v = load_row(vectors, w, width), load_row(block_list.vectors, own, width)
        store_row(block_list.gradients, own, add_scaled(load_row(block_list.gradients, own, width), g, u))
        block_list.bias_gradients[own] += g
        block_list.counts[own] += uint32(1)
        du = add_scaled(load_row(user_gradients, w, width), g, v)
        if cosine:
            du = through_norm(du, u, inverse[w], temperature)
        row = uint64(rows[start + w])
        if has_l2:
            du = add_scaled(du, scales.user_l2, load_row(user_table, row, width))
        store_row(user_gradient, row, add_scaled(load_row(user_gradient, row, width), float32(1), du))


@njit(fastmath=FAST, **OPTIONS)
def add_shared_batch(
    parameters: Any,
    gradients: Any,
    own: Array,
    size: int,
    positives: Array,
    batch_size: int,
    first_block: int,
    known: Any,
    flags: Array,
    heads: Array,
    sampling: Any,
    similarity: Any,
    step: int,
    scales: Any,
    width: int,
    has_bias: bool,
    exclude: bool,
    has_l2: bool,
    cosine: bool,
    loss: str,
    normalised: bool,
    gathered: bool,
) -> float:
    """Add the gradients of some positives of a batch; return the sum of their losses as float64.

    Args:
        parameters: users (U * P,), items (I * P,), item bias (I,) or empty, float32.
        gradients: the same, or all empty for the losses only; no option of the compiler, so that training and
            the validation loss share the compiled code.
        own: (3, size + 2 * TILE), uint32: positions in the batch, ascending, users, items. What lies beyond
            ``size`` is ignored, but the users there are valid: they are prefetched.
        size: uint64: how many positives.
        positives: (batch_size,) or longer, uint32: the items of the whole batch, which lists are made of.
        batch_size: uint64.
        first_block: uint64: number of the block at position 0.
        known: indptr and items of the known positives, or empty arrays.
        flags: (I,), uint8, zero, and left zero.
        heads: (I,), uint32, scratch.
        sampling: a `ListSampling`.
        similarity: a `Similarity`.
        step: t as uint32.
        scales: of `scales_of`.
        width: of a `Variant`; this one and the next are literals.
        has_bias: the same.
        exclude: the same.
        has_l2: the same.
        cosine: the same.
        loss: the same.
        normalised: whether the loss is one of NORMALISED.
        gathered: whether row b of the user table belongs to position b of the batch, whoever the user is.
    """
    user_table, item_table, item_bias = parameters
    positions, users, own_positives = own[0], own[1], own[2]
    rows = positions if gathered else users
    indptr = known[0]
    tile = uint64(TILE)
    longest = sampling.drawn + (sampling.block_size if sampling.in_batch else uint64(0))
    room = group_up(min(longest, uint64(CHUNK)))

    block_list = new_list(sampling, width)
    state = new_tile()
    state.beta[:] = similarity.beta
    x = np.empty((uint64(1) + room) * tile, dtype=np.float32)
    vectors = np.empty(tile * uint64(width), dtype=np.float32)
    columns = np.empty(tile * uint64(width), dtype=np.float32)
    user_gradients = np.empty(tile * uint64(width), dtype=np.float32)
    inverse = np.empty(TILE, dtype=np.float32)
    own_rows = np.empty(TILE, dtype=np.uint32)

    total = 0.0
    end = uint64(0)
    for begin in range(uint64(0), batch_size, sampling.block_size):
        b = min(sampling.block_size, batch_size - begin)
        start, end = end, end
        while end < size and uint64(positions[end]) < begin + b:
            end += uint64(1)
        if start == end:
            continue
        number = first_block + begin // sampling.block_size
        count = fill_list(block_list, number, positives, begin, b, sampling, step)
        read_rows(block_list, uint64(0), count, item_table, width, cosine)
        set_offsets(block_list, count, b, sampling, item_bias, has_bias, normalised)
        look_up(block_list, count, flags, heads)
        # Where the rows of the positives are.
        own_begin = sampling.drawn if sampling.in_batch else group_up(count)
        if not sampling.in_batch:
            for i in range(end - start):
                block_list.items[own_begin + i] = own_positives[start + i]
            read_rows(block_list, own_begin, own_begin + end - start, item_table, width, cosine)

        for first_positive in range(start, end, tile):
            here = min(tile, end - first_positive)
            _read_users(
                vectors,
                columns,
                inverse,
                user_table,
                rows,
                first_positive,
                here,
                similarity.temperature,
                width,
                cosine,
            )
            active = uint64(0)
            for w in range(tile):
                state.weight[w] = float32(0)
                x[w] = float32(0)
            for w in range(here):
                at = first_positive + w
                own_rows[w] = own_begin + (uint64(positions[at]) - begin if sampling.in_batch else at - start)
                x[w] = dot(
                    load_row(vectors, w, width), load_row(block_list.vectors, uint64(own_rows[w]), width)
                )
                if has_bias:
                    x[w] += item_bias[uint64(own_positives[at])]
                user = uint64(users[at])
                free = True
                if exclude:
                    free = uint64(indptr[user + uint64(1)] - indptr[user]) < sampling.num_items
                if free:
                    state.weight[w] = scales.weight
                    active |= uint64(1) << w
            for i in range(len(user_gradients)):
                user_gradients[i] = float32(0)
            begin_tile(x, state)
            mask_tile(
                block_list,
                count,
                users,
                own_positives,
                first_positive,
                here,
                known,
                flags,
                heads,
                exclude,
            )

            sweeps = uint64(2) if normalised and count > uint64(CHUNK) else uint64(1)
            for sweep in range(sweeps):
                first = uint64(0)
                while True:
                    chunk = min(uint64(CHUNK), count - first)
                    last = first + chunk == count
                    _score_chunk(x, columns, block_list, first, chunk, width)
                    if sweep == uint64(0):
                        accumulate(loss)(x, uint64(1) + chunk, state)
                    if sweep == sweeps - uint64(1):
                        slopes(loss)(x, uint64(1) + chunk, last, state)
                        for w in range(here):
                            if state.weight[w] != float32(0):
                                total += state.value[w]
                        if len(gradients[0]):
                            _chunk_gradients(
                                x,
                                vectors,
                                user_gradients,
                                active,
                                block_list,
                                first,
                                chunk,
                                width,
                                has_bias,
                                has_l2,
                            )
                    first += chunk
                    if last:
                        break
            if len(gradients[0]):
                _positive_gradients(
                    x,
                    vectors,
                    user_gradients,
                    inverse,
                    state.weight,
                    rows,
                    first_positive,
                    here,
                    own_rows,
                    block_list,
                    user_table,
                    gradients[0],
                    scales,
                    similarity.temperature,
                    width,
                    has_l2,
                    cosine,
                )
        if len(gradients[0]):
            scatter_rows(
                block_list, uint64(0), count, parameters, gradients, scales, width, has_bias, has_l2, cosine
            )
            if not sampling.in_batch:
                scatter_rows(
                    block_list,
                    own_begin,
                    own_begin + end - start,
                    parameters,
                    gradients,
                    scales,
                    width,
                    has_bias,
                    has_l2,
                    cosine,
                )
        forget(block_list, count, flags)
    return total


def sampling_of(negatives: Negatives, key: Key) -> ListSampling:
    """What compiled code takes of the settings of the lists."""
    settings = negatives.settings
    rate, drawn_rate = negatives.list_rates
    k0, k1 = list_key(key)
    return ListSampling(
        uint64(settings.block_size),
        uint64(settings.drawn),
        settings.proposal != "shared",
        uint64(negatives.num_items),
        uint32(k0),
        uint32(k1),
        rate.numpy(),
        float32(drawn_rate),
    )


def similarity_of(negatives: Negatives, loss: LossSettings) -> Similarity:
    """What compiled code takes of the loss besides its variant."""
    share = min(negatives.list_rates[1], 1.0)
    beta = 1 - loss.calibration * (1 - share) if loss.name == "gbce" else 1.0
    return Similarity(float32(loss.temperature), float32(beta))


def known_rows(known_positives: KnownPositives | None) -> tuple[Array, Array]:
    """What compiled code takes of known positives: indptr and items; empty arrays without them."""
    if known_positives is None:
        return empty(np.int64), empty(np.int32)
    return known_positives.indptr.numpy(), known_positives.items.numpy()


@lru_cache
def _compiled(variant: Variant, gathered: bool, sources: int = SOURCES) -> Any:
    width, has_bias, exclude, _, has_l2, similarity_name, _, loss = variant
    cosine, normalised = similarity_name == "cosine", loss in NORMALISED

    def run(
        parameters: Any,
        gradients: Any,
        user_index: Array,
        item_index: Array,
        first_block: int,
        known: Any,
        sampling: Any,
        similarity: Any,
        step: int,
        factors: Any,
    ) -> float:
        _ = sources
        size = uint64(len(user_index))
        own = np.zeros((3, len(user_index) + 2 * TILE), dtype=np.uint32)
        for b in range(size):
            own[0, b] = b
            own[1, b] = user_index[b]
            own[2, b] = item_index[b]
        return add_shared_batch(
            parameters,
            gradients,
            own,
            size,
            own[2],
            size,
            first_block,
            known,
            np.zeros(sampling.num_items, dtype=np.uint8),
            np.empty(sampling.num_items, dtype=np.uint32),
            sampling,
            similarity,
            step,
            scales_of(max(size, uint64(1)), factors),
            width,
            has_bias,
            exclude,
            has_l2,
            cosine,
            loss,
            normalised,
            gathered,
        )

    return entry_point(run)


def run_batch(
    parameters: Tables,
    gradients: Tables | None,
    batch: Interactions,
    negatives: Negatives,
    loss: LossSettings,
    *,
    key: Key,
    step: int,
    first_position: int = 0,
    gathered: bool = False,
) -> Tensor:
    """Add the gradients of a batch's loss, or none; see `own_negatives.numba_cpu.run_batch`."""
    total = _compiled(variant_of(parameters, negatives, loss), gathered)(
        flat_arrays(parameters),
        (empty(np.float32),) * 3 if gradients is None else flat_arrays(gradients),
        batch.user_index.numpy(),
        batch.item_index.numpy(),
        uint64(first_position // negatives.settings.block_size),
        known_rows(negatives.known_positives),
        sampling_of(negatives, key),
        similarity_of(negatives, loss),
        uint32(step),
        factors_of(loss, negatives.settings.scored),
    )
    return torch.tensor(total, dtype=torch.float64)
