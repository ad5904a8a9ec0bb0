"""The shape of the programs that work on rows of the tables."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from fasttower_kernels.errors import FastTowerError

MAX_WIDTH = 512


class Tile(NamedTuple):
    """The shape of a program."""

    rows: int
    num_warps: int


# By the width of a row, rounded up to a power of two, for warps of 32 lanes; those of 64 take twice the
# rows. A thread holds 4 floats of each vector, one 16-byte load, and 8 of vectors with more than 128. One
# warp per program makes its votes on whether to loop on free of barriers, and a program waits only for its
# own few rows. Past 256 dimensions the registers of one warp do not suffice for the rows that are read ahead.
TILES = {
    4: Tile(32, 1),
    8: Tile(16, 1),
    16: Tile(8, 1),
    32: Tile(4, 1),
    64: Tile(2, 1),
    128: Tile(1, 1),
    256: Tile(1, 1),
    512: Tile(1, 2),
}


def warp_lanes() -> int:
    """Lanes of a warp on this machine's GPUs."""
    return 32 if torch.version.hip is None else 64


def tile_of(width: int, lanes: int) -> tuple[int, Tile]:
    """The power of two that holds a row, and the shape of a program for warps of some lanes.

    Raises:
        FastTowerError: the row is too wide.
    """
    if width > MAX_WIDTH:
        raise FastTowerError(
            f"vectors have {width} dimensions; the triton backend takes {MAX_WIDTH}: choose backend torch."
        )
    block_d = triton.next_power_of_2(width)
    rows, num_warps = TILES[block_d]
    return block_d, Tile(rows * lanes // 32, num_warps)
