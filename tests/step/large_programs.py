"""Programs of a size that suits Triton's interpreter."""

import pytest

from fasttower_kernels import triton_tiles
from fasttower_kernels.step.shared_negatives import triton_gpu as shared


@pytest.fixture(autouse=True)
def large_programs(monkeypatch):
    """The interpreter's time goes by operations, not by elements."""
    for block in triton_tiles.TILES:
        monkeypatch.setitem(triton_tiles.TILES, block, triton_tiles.Tile(64, 1))
    for tiles in shared.TILES, shared.SPLIT_TILES:
        for block in tiles:
            monkeypatch.setitem(tiles, block, shared.ProductTile(32, 32, 4))
