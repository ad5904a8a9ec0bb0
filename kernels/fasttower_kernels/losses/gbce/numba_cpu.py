"""Generalised BCE, compiled."""

from __future__ import annotations

from typing import Any

from fasttower_kernels.compiled import FAST, OPTIONS, Array, float32, njit, uint64
from fasttower_kernels.losses.tile_numba_cpu import TILE, softplus_rows
from fasttower_kernels.vector_math import exp_negative, log1p_positive


@njit(fastmath=FAST, **OPTIONS)
def slopes(x: Array, end: int, last: bool, tile: Any) -> None:
    """See `losses.numba_cpu.slopes`. The positive's term is beta softplus(-x+)."""
    softplus_rows(x, uint64(1), end, tile)
    if last:
        for w in range(uint64(TILE)):
            z = -x[w]
            e = exp_negative(-abs(z))
            softplus = (float32(0) if z < float32(0) else z) + log1p_positive(e)
            tile.value[w] += tile.beta[w] * softplus
            r = tile.beta[w] * tile.weight[w] / (float32(1) + e)
            x[w] = -(e * r if z < float32(0) else r)
