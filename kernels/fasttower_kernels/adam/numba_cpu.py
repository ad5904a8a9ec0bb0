"""Adam, compiled: one pass over memory, which also zeroes the gradient; and the same for some of the rows.

Which rows have gradients is told by one byte a row. The bytes are read eight at a time, as a word, so that
rows without one cost next to nothing.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np

from fasttower_kernels.adam.lazy_reference import MOST_REPLAYED
from fasttower_kernels.adam.reference import BETA_1, BETA_2, EPSILON
from fasttower_kernels.compiled import (
    FAST,
    OPTIONS,
    SOURCES,
    Array,
    entry_point,
    flat_arrays,
    float32,
    njit,
    uint32,
    uint64,
)
from fasttower_kernels.tables import Tables
from fasttower_kernels.vector_rows import (
    add_scaled,
    dot,
    filled,
    load_row,
    prefetch,
    product,
    quotient,
    scaled,
    square_root,
    store_row,
)

ROWS_A_WORD = 8
"""Rows whose bytes are one word."""

# So many rows ahead, they are asked for.
_PREFETCHED_ROWS = 4

_DECAY_1, _DECAY_2 = float32(BETA_1), float32(BETA_2)
_GAIN_1, _GAIN_2 = float32(1 - BETA_1), float32(1 - BETA_2)
_EPSILON = float32(EPSILON)


@njit(fastmath=FAST, **OPTIONS)
def adam_range(
    parameters: Array,
    gradients: Array,
    moments_1: Array,
    moments_2: Array,
    begin: int,
    end: int,
    step_size: float,
    inverse_root: float,
) -> None:
    """Elements begin .. end - 1 of flat arrays.

    Args:
        parameters: (n,), float32; so are the gradients and the moments.
        gradients: zeroed.
        moments_1: first moment.
        moments_2: second moment.
        begin: uint64.
        end: uint64.
        step_size: float32, ``learning_rate / (1 - beta_1**count)``.
        inverse_root: float32, ``1 / sqrt(1 - beta_2**count)``.
    """
    for i in range(begin, end):
        g = gradients[i]
        m = moments_1[i]
        m += _GAIN_1 * (g - m)
        v = _DECAY_2 * moments_2[i] + _GAIN_2 * (g * g)
        moments_1[i] = m
        moments_2[i] = v
        gradients[i] = float32(0)
        parameters[i] -= step_size * m / (math.sqrt(v) * inverse_root + _EPSILON)


@lru_cache
def _compiled(sources: int = SOURCES) -> Any:
    def run(
        parameters: Any, gradients: Any, moments_1: Any, moments_2: Any, step_size: float, inverse_root: float
    ) -> None:
        _ = sources
        for table in range(3):
            adam_range(
                parameters[table],
                gradients[table],
                moments_1[table],
                moments_2[table],
                uint64(0),
                uint64(len(parameters[table])),
                step_size,
                inverse_root,
            )

    return entry_point(run)


def adam_step(
    parameters: Tables,
    gradients: Tables,
    moments_1: Tables,
    moments_2: Tables,
    *,
    count: int,
    learning_rate: float,
) -> None:
    """See the operator's `adam_step`; on one thread."""
    tables = (parameters, gradients, moments_1, moments_2)
    _compiled()(*map(flat_arrays, tables), *step_scales(np.array([count]), learning_rate)[0])


def step_scales(counts: Array, learning_rate: float) -> Array:
    """The two scalars of each step, counted from 1: (S, 2), float32, step size and inverse root."""
    step_size = learning_rate / (1 - BETA_1**counts)
    inverse_root = 1 / np.sqrt(1 - BETA_2**counts)
    return np.stack([step_size, inverse_root], axis=1).astype(np.float32)


def decays(most: int) -> Array:
    """How moments decay: (most + 1, 3), float32; row k is beta_1**k, beta_2**k and beta_2**(k / 2)."""
    k = np.arange(most + 1)
    return np.stack([BETA_1**k, BETA_2**k, BETA_2 ** (k / 2)], axis=1).astype(np.float32)


@njit(**OPTIONS)
def touched_rows(touched: Array, begin: int, end: int, num_rows: int) -> Array:
    """The rows of words begin .. end - 1 whose byte is not 0, in order.

    Args:
        touched: (num_rows,) and on to a multiple of 8, uint8.
        begin: uint64.
        end: uint64.
        num_rows: uint64.
    """
    words = touched.view(np.uint64)
    rows = np.empty((end - begin) * uint64(ROWS_A_WORD), dtype=np.uint64)
    count = uint64(0)
    for word in range(begin, end):
        if words[word] != uint64(0):
            for row in range(word * uint64(ROWS_A_WORD), (word + uint64(1)) * uint64(ROWS_A_WORD)):
                rows[count] = row
                count += uint64(touched[row] != 0 and row < num_rows)
    return rows[:count]


@njit(fastmath=FAST, **OPTIONS)
def catch_up_rows(
    parameters: Array,
    moments_1: Array,
    moments_2: Array,
    last: Array,
    rows: Array,
    now: int,
    scales: Array,
    decay: Array,
    width: int,
) -> None:
    """Bring rows to where they are after ``now`` updates. See the reference's `catch_up`.

    Args:
        parameters: (n * width,), float32; so are the moments.
        moments_1: first moment.
        moments_2: second moment.
        last: (n,), uint32: how many updates each row has seen, counted like ``now``.
        rows: uint64, each once.
        now: uint64.
        scales: (updates, 2), float32, of `step_scales`: row i is that of the update that follows i others.
        decay: of `decays`.
        width: a literal.
    """
    epsilon = filled(_EPSILON, width)
    for i in range(uint64(len(rows))):
        upcoming = rows[min(i + uint64(_PREFETCHED_ROWS), uint64(len(rows) - 1))] * uint64(width)
        prefetch(parameters, upcoming, width)
        prefetch(moments_1, upcoming, width)
        prefetch(moments_2, upcoming, width)
        row = rows[i]
        gap = now - uint64(last[row])
        if gap == uint64(0):
            continue
        m = load_row(moments_1, row, width)
        v = load_row(moments_2, row, width)
        store_row(moments_1, row, scaled(decay[gap, 0], m))
        store_row(moments_2, row, scaled(decay[gap, 1], v))
        if dot(m, m) != float32(0):  # nothing moves a row that never had a gradient
            root = square_root(v)
            total = filled(float32(0), width)
            first = uint64(last[row]) - uint64(1)
            for k in range(uint64(1), min(gap, uint64(MOST_REPLAYED)) + uint64(1)):
                spread = add_scaled(epsilon, scales[first + k, 1] * decay[k, 2], root)
                total = add_scaled(total, scales[first + k, 0] * decay[k, 0], quotient(m, spread))
            store_row(parameters, row, add_scaled(load_row(parameters, row, width), float32(-1), total))
        last[row] = uint32(now)


@njit(fastmath=FAST, **OPTIONS)
def update_rows(
    parameters: Array,
    copies: Array,
    moments_1: Array,
    moments_2: Array,
    last: Array,
    rows: Array,
    now: int,
    scales: Array,
    width: int,
) -> None:
    """Adam on rows that are up to date; the gradient is the sum of the rows of ``copies``, (T, n), zeroed.

    The other arguments are those of `catch_up_rows`; ``now`` counts the updates before this one.
    """
    epsilon, zero = filled(_EPSILON, width), filled(float32(0), width)
    step_size, inverse_root = scales[now, 0], scales[now, 1]
    for i in range(uint64(len(rows))):
        upcoming = rows[min(i + uint64(_PREFETCHED_ROWS), uint64(len(rows) - 1))] * uint64(width)
        prefetch(parameters, upcoming, width)
        prefetch(moments_1, upcoming, width)
        prefetch(moments_2, upcoming, width)
        row = rows[i]
        g = zero
        for t in range(len(copies)):
            copy = copies[t]
            prefetch(copy, upcoming, width)
            g = add_scaled(load_row(copy, row, width), float32(1), g)
            store_row(copy, row, zero)
        m = add_scaled(scaled(_DECAY_1, load_row(moments_1, row, width)), _GAIN_1, g)
        v = add_scaled(scaled(_DECAY_2, load_row(moments_2, row, width)), _GAIN_2, product(g, g))
        store_row(moments_1, row, m)
        store_row(moments_2, row, v)
        spread = add_scaled(epsilon, inverse_root, square_root(v))
        moved = add_scaled(load_row(parameters, row, width), -step_size, quotient(m, spread))
        store_row(parameters, row, moved)
        last[row] = uint32(now + uint64(1))
