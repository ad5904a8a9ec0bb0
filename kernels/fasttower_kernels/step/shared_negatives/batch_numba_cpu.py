"""Shared negatives of a batch, compiled: block by block, and in a block tile by tile."""

from __future__ import annotations

from typing import Any, NamedTuple

from fasttower_kernels.compiled import FAST, OPTIONS, Array, float32, njit, uint64
from fasttower_kernels.losses.numba_cpu import TILE, accumulate, begin_tile, new_tile, slopes
from fasttower_kernels.step.shared_negatives.block_list_numba_cpu import (
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
from fasttower_kernels.step.shared_negatives.user_tile_numba_cpu import (
    CHUNK,
    add_chunk_gradients,
    finish_tile,
    new_user_tile,
    read_users,
    score_chunk,
    score_positives,
)
from fasttower_kernels.vector_rows import prefetch

_FETCHED = 1024
"""Known positives of a user that are fetched ahead at most; those after them come by themselves."""


class Lists(NamedTuple):
    """What the lists of a batch are made of.

    Attributes:
        items: (batch_size,) or longer, uint32: the positives of the whole batch.
        batch_size: uint64.
        first_block: uint64: number of the block at position 0.
        flags: (I,), uint8, zero, and left zero.
        heads: (I,), uint32, scratch.
    """

    items: Array
    batch_size: int
    first_block: int
    flags: Array
    heads: Array


class LossConstants(NamedTuple):
    """Attributes: temperature of cosine similarity, and beta of gbce, 1 for other losses; float32."""

    temperature: float
    beta: float


class Block(NamedTuple):
    """Attributes, uint64.

    begin: its first position.
    size: b.
    start: where the positives begin that are this thread's.
    end: and where they end.
    length: M, the items of its list.
    own_begin: the row of the list with the item of position ``begin``, or, if the list doesn't hold the
        positives, the one after it with that of positive ``start``.
    """

    begin: int
    size: int
    start: int
    end: int
    length: int
    own_begin: int


class Workspace(NamedTuple):
    """Attributes: a `BlockList`, a `UserTile` and a `LossTile`."""

    block_list: Any
    tile: Any
    state: Any


@njit(fastmath=FAST, **OPTIONS)
def _begin_block(
    begin: int,
    start: int,
    end: int,
    items: Array,
    lists: Any,
    sampling: Any,
    step: int,
    parameters: Any,
    block_list: Any,
    width: int,
    has_bias: bool,
    cosine: bool,
    less_log_q: bool,
) -> Any:
    """Make the list of a `Block`."""
    size = min(sampling.block_size, lists.batch_size - begin)
    number = lists.first_block + begin // sampling.block_size
    length = fill_list(block_list, number, lists.items, begin, size, sampling, step)
    read_rows(block_list, uint64(0), length, parameters[1], width, cosine)
    set_offsets(block_list, length, size, sampling, parameters[2], has_bias, less_log_q)
    look_up(block_list, length, lists.flags, lists.heads)
    own_begin = sampling.drawn if sampling.in_batch else group_up(length)
    if not sampling.in_batch:
        for i in range(end - start):
            block_list.items[own_begin + i] = items[start + i]
        read_rows(block_list, own_begin, own_begin + end - start, parameters[1], width, cosine)
    return Block(begin, size, start, end, length, own_begin)


@njit(**OPTIONS)
def _begin_positives(
    block: Any,
    positions: Array,
    users: Array,
    first: int,
    here: int,
    known: Any,
    sampling: Any,
    weight: float,
    workspace: Any,
    exclude: bool,
) -> int:
    """Weigh a tile's positives and find their rows; returns the bits (uint64) of those that count."""
    tile, state = workspace.tile, workspace.state
    indptr, rows = known
    active = uint64(0)
    for w in range(uint64(TILE)):
        state.weight[w] = float32(0)
        if exclude:  # fetch where the next tile's known positives begin
            upcoming = uint64(users[first + uint64(TILE) + w])
            begin, end = uint64(indptr[upcoming]), uint64(indptr[upcoming + uint64(1)])
            for p in range(begin, min(end, begin + uint64(_FETCHED)), uint64(16)):
                prefetch(rows, p, 1)
    for w in range(here):
        at = first + w
        offset = uint64(positions[at]) - block.begin if sampling.in_batch else at - block.start
        tile.own_rows[w] = block.own_begin + offset
        user = uint64(users[at])
        if not exclude or uint64(indptr[user + uint64(1)] - indptr[user]) < sampling.num_items:
            state.weight[w] = weight
            active |= uint64(1) << w
    return active


@njit(fastmath=FAST, **OPTIONS)
def _sweep_list(
    length: int,
    active: int,
    here: int,
    workspace: Any,
    with_gradients: bool,
    width: int,
    has_bias: bool,
    has_l2: bool,
    loss: str,
    normalised: bool,
) -> float:
    """Score a tile against the list and take the slopes; returns the sum of its losses."""
    block_list, tile, state = workspace.block_list, workspace.tile, workspace.state
    total = 0.0
    sweeps = uint64(2) if normalised and length > uint64(CHUNK) else uint64(1)
    for sweep in range(uint64(1), sweeps + uint64(1)):
        first = uint64(0)
        while True:
            chunk = min(uint64(CHUNK), length - first)
            last = first + chunk == length
            score_chunk(tile, block_list, first, chunk, width)
            if sweep == uint64(1):
                accumulate(loss)(tile.x, uint64(1) + chunk, state)
            if sweep == sweeps:
                slopes(loss)(tile.x, uint64(1) + chunk, last, state)
                for w in range(here):
                    if state.weight[w] != float32(0):
                        total += state.value[w]
                if with_gradients:
                    add_chunk_gradients(tile, active, here, block_list, first, chunk, width, has_bias, has_l2)
            first += chunk
            if last:
                break
    return total


@njit(fastmath=FAST, **OPTIONS)
def add_shared_batch(
    parameters: Any,
    gradients: Any,
    own: Array,
    size: int,
    lists: Any,
    known: Any,
    sampling: Any,
    constants: Any,
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
        lists: a `Lists`, of the whole batch.
        known: indptr and items of the known positives, or empty arrays.
        sampling: a `ListSampling`.
        constants: a `LossConstants`.
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
    user_table = parameters[0]
    positions, users, items = own[0], own[1], own[2]
    rows = positions if gathered else users
    longest = sampling.drawn + (sampling.block_size if sampling.in_batch else uint64(0))
    workspace = Workspace(new_list(sampling, width), new_user_tile(longest, width), new_tile())
    block_list, tile, state = workspace.block_list, workspace.tile, workspace.state
    state.beta[:] = constants.beta
    with_gradients = len(gradients[0]) > 0

    total = 0.0
    end = uint64(0)
    for begin in range(uint64(0), lists.batch_size, sampling.block_size):
        start = end
        while end < size and uint64(positions[end]) < begin + sampling.block_size:
            end += uint64(1)
        if start == end:
            continue
        block = _begin_block(
            begin,
            start,
            end,
            items,
            lists,
            sampling,
            step,
            parameters,
            block_list,
            width,
            has_bias,
            cosine,
            normalised,
        )
        for first in range(start, end, uint64(TILE)):
            here = min(uint64(TILE), end - first)
            active = _begin_positives(
                block, positions, users, first, here, known, sampling, scales.weight, workspace, exclude
            )
            read_users(tile, user_table, rows, first, here, constants.temperature, width, cosine)
            score_positives(tile, items, first, here, block_list, parameters[2], width, has_bias)
            begin_tile(tile.x, state)
            mask_tile(
                block_list, block.length, users, items, first, here, known, lists.flags, lists.heads, exclude
            )
            total += _sweep_list(
                block.length,
                active,
                here,
                workspace,
                with_gradients,
                width,
                has_bias,
                has_l2,
                loss,
                normalised,
            )
            if with_gradients:
                finish_tile(
                    tile,
                    state.weight,
                    rows,
                    first,
                    here,
                    block_list,
                    user_table,
                    gradients[0],
                    scales.user_l2,
                    constants.temperature,
                    width,
                    has_l2,
                    cosine,
                )
        if with_gradients:
            scatter_rows(
                block_list,
                uint64(0),
                block.length,
                parameters,
                gradients,
                scales,
                width,
                has_bias,
                has_l2,
                cosine,
            )
            if not sampling.in_batch:
                scatter_rows(
                    block_list,
                    block.own_begin,
                    block.own_begin + end - start,
                    parameters,
                    gradients,
                    scales,
                    width,
                    has_bias,
                    has_l2,
                    cosine,
                )
        forget(block_list, block.length, lists.flags)
    return total
