"""BCE, compiled."""

from __future__ import annotations

from typing import Any

from fasttower_kernels.compiled import FAST, OPTIONS, Array, njit, uint64
from fasttower_kernels.losses.tile_numba_cpu import TILE, softplus_rows


@njit(fastmath=FAST, **OPTIONS)
def slopes(x: Array, end: int, last: bool, tile: Any) -> None:
    """See `losses.numba_cpu.slopes`. The positive's term, softplus(-x+), is swept with the others."""
    begin = uint64(0) if last else uint64(1)
    if last:
        for w in range(uint64(TILE)):
            x[w] = -x[w]
    softplus_rows(x, begin, end, tile)
    if last:
        for w in range(uint64(TILE)):
            x[w] = -x[w]
