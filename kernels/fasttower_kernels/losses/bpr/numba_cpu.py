"""BPR, compiled."""

from __future__ import annotations

from typing import Any

from fasttower_kernels.compiled import FAST, OPTIONS, Array, njit, uint64
from fasttower_kernels.losses.tile_numba_cpu import TILE, softplus_rows


@njit(fastmath=FAST, **OPTIONS)
def slopes(x: Array, end: int, last: bool, tile: Any) -> None:
    """See `losses.numba_cpu.slopes`. A negative's term is softplus(x_k - x+), the positive has none."""
    size = uint64(TILE)
    for k in range(uint64(1), end):
        for w in range(size):
            x[k * size + w] -= x[w]
    softplus_rows(x, uint64(1), end, tile)
    for k in range(uint64(1), end):
        for w in range(size):
            tile.total[w] += x[k * size + w]
    if last:
        for w in range(size):
            x[w] = -tile.total[w]
