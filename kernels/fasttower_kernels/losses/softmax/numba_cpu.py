"""Sampled softmax, compiled: the largest logit and the sum of powers first, then the slopes.

With m the largest logit of a positive and its negatives, ``T = sum_k exp(x_k - m)`` and ``P = exp(x+ - m)``,
the value is ``m - x+ + log(T + P)``, a negative's slope ``exp(x_k - m) / (T + P)``, the positive's
``-T / (T + P)``.
"""

from __future__ import annotations

from typing import Any

from fasttower_kernels.compiled import FAST, OPTIONS, Array, float32, njit, uint64
from fasttower_kernels.losses.tile_numba_cpu import TILE
from fasttower_kernels.vector_math import exp_negative, log1p_positive


@njit(fastmath=FAST, **OPTIONS)
def accumulate(x: Array, end: int, tile: Any) -> None:
    """See `losses.numba_cpu.accumulate`."""
    maximum, total, before = tile.maximum, tile.total, tile.product
    size = uint64(TILE)
    for w in range(size):
        before[w] = maximum[w]
    for k in range(uint64(1), end):
        for w in range(size):
            maximum[w] = x[k * size + w] if x[k * size + w] > maximum[w] else maximum[w]
    for w in range(size):
        total[w] *= exp_negative(before[w] - maximum[w])
    for k in range(uint64(1), end):
        for w in range(size):
            total[w] += exp_negative(x[k * size + w] - maximum[w])


@njit(fastmath=FAST, **OPTIONS)
def slopes(x: Array, end: int, last: bool, tile: Any) -> None:
    """See `losses.numba_cpu.slopes`."""
    maximum, total, scale = tile.maximum, tile.total, tile.product
    size = uint64(TILE)
    for w in range(size):
        scale[w] = tile.weight[w] / (total[w] + exp_negative(x[w] - maximum[w]))
    for k in range(uint64(1), end):
        for w in range(size):
            x[k * size + w] = exp_negative(x[k * size + w] - maximum[w]) * scale[w]
    for w in range(size):
        below = x[w] - maximum[w]
        # T + P less 1, exactly: P is 1 where the positive is the largest, and T at least 1 where it is not.
        others = total[w] if below == float32(0) else total[w] - float32(1) + exp_negative(below)
        tile.value[w] = log1p_positive(others) - below if last else float32(0)
    if last:
        for w in range(size):
            x[w] = -total[w] * scale[w]
