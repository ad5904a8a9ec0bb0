"""The scan of a tile of scores for what is among the K best of each row, compiled.

It compares the largest score of a block with the K-th best so far. Nearly every score is so read once, from
the cache, many an instruction, and that is all that happens to it. The K best so far are a heap in the result
itself, whose root is the worst of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from fasttower_kernels.compiled import (
    OPTIONS,
    SOURCES,
    Array,
    entry_point,
    float32,
    int32,
    intrinsic,
    njit,
    uint64,
)
from fasttower_kernels.vector_rows import add_scaled, load_row

_LANES = 64
BLOCK = 4 * _LANES
"""Scores whose maximum is compared with the K-th best at once; the rows of a tile are a multiple of it."""


@intrinsic
def _larger(typingctx: Any, left: Any, right: Any) -> Any:
    """The larger of two rows, value by value; neither holds NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return left(left, right), codegen


def _above(builder: Any, row: Any, threshold: Any, width: int) -> Any:
    vector = ir.VectorType(ir.FloatType(), width)
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), threshold, ir.IntType(32)(0))
    return builder.fcmp_ordered(">", row, builder.shuffle_vector(one, one, zeros))


@intrinsic
def _any_above(typingctx: Any, row: Any, threshold: Any) -> Any:
    """Whether a value of the row is above the threshold."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        above = _above(builder, args[0], args[1], row.width)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.IntType(1), [above.type]),
            f"llvm.vector.reduce.or.v{row.width}i1",
        )
        return builder.call(function, [above])

    return types.boolean(row, types.float32), codegen


@intrinsic
def _bits_above(typingctx: Any, row: Any, threshold: Any) -> Any:
    """A uint64 whose bit i says whether value i of a row of 64 is above the threshold."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(_above(builder, args[0], args[1], _LANES), ir.IntType(64))

    return types.uint64(row, types.float32), codegen


@intrinsic
def _lowest_bit(typingctx: Any, bits: Any) -> Any:
    """The position of the lowest bit that is on; there is one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(1))

    return types.uint64(types.uint64), codegen


@njit(**OPTIONS)
def _worse(score: float, item: int, other_score: float, other_item: int) -> bool:
    return score < other_score or (score == other_score and item > other_item)


@njit(**OPTIONS)
def _replace_root(scores: Array, items: Array, size: int, score: float, item: int) -> None:
    """Put an entry where the worst of the heap is, and restore the heap's order."""
    hole, child = uint64(0), uint64(1)
    while child < size:
        right = child + uint64(1)
        if right < size and _worse(scores[right], items[right], scores[child], items[child]):
            child = right
        if not _worse(scores[child], items[child], score, item):
            break
        scores[hole], items[hole] = scores[child], items[child]
        hole, child = child, uint64(2) * child + uint64(1)
    scores[hole], items[hole] = score, item


@njit(**OPTIONS)
def _position(index: Array, item: int) -> int:
    """The place (uint64) of the first entry that is not below the item; there is one."""
    low, high = uint64(0), uint64(len(index) - 1)
    while low < high:
        middle = (low + high) >> uint64(1)
        if index[middle] < item:
            low = middle + uint64(1)
        else:
            high = middle
    return low


@njit(**OPTIONS)
def _leave_out(
    tile: Array,
    begin: int,
    width: int,
    first: int,
    index: Array,
    gathered: bool,
    seen_items: Array,
    entry: int,
    end: int,
) -> int:
    """Make -inf of the seen items' scores in a row that begins there; returns the entry to go on from."""
    last = index[width - 1] if gathered else first + width - 1
    while entry < end and seen_items[entry] <= last:
        item = seen_items[entry]
        if gathered:
            column = _position(index, item)
            if index[column] == item:
                tile[begin + column] = float32(-np.inf)
        else:
            tile[begin + uint64(item - first)] = float32(-np.inf)
        entry += 1
    return entry


@njit(**OPTIONS)
def _load(tile: Array, at: int, bias: Array, column: int, has_bias: bool) -> Any:
    """Sixty-four scores, from multiples of as many."""
    x = load_row(tile, at // uint64(_LANES), _LANES)
    if has_bias:
        x = add_scaled(x, float32(1), load_row(bias, column // uint64(_LANES), _LANES))
    return x


@lru_cache
def scan_tile(has_bias: bool, gathered: bool, sources: int = SOURCES) -> Callable[..., None]:
    """The compiled scan of a tile, with a bias or without, and with an index of its columns or without."""

    def run(
        tile: Array,
        stride: int,
        width: int,
        bias: Array,
        first: int,
        index: Array,
        cursors: Array,
        ends: Array,
        seen_items: Array,
        items: Array,
        scores: Array,
    ) -> None:
        """Put what is among the K best of each row into its heap.

        Args:
            tile: (C * stride,), float32: the scores; what is seen and what follows the width becomes -inf.
            stride: of the tile's rows, a multiple of BLOCK.
            width: W, the columns that hold scores.
            bias: (>= W rounded up to BLOCK,), float32, added to the scores.
            first: the item of the first column.
            index: (W,), int64: the items of the columns, if gathered.
            cursors: (C,), int64: each row's first entry of ``seen_items`` beyond the tiles before; advanced.
            ends: (C,), int64: the ends of the rows' entries.
            seen_items: (nnz,), int32.
            items: (C, K), int32: the heaps.
            scores: (C, K), float32.
        """
        _ = sources
        lanes, size = uint64(_LANES), uint64(items.shape[1])
        padded = (uint64(width) + uint64(BLOCK - 1)) // uint64(BLOCK) * uint64(BLOCK)
        for r in range(uint64(len(items))):
            begin = r * uint64(stride)
            cursors[r] = _leave_out(
                tile, begin, width, first, index, gathered, seen_items, cursors[r], ends[r]
            )
            for column in range(uint64(width), padded):
                tile[begin + column] = float32(-np.inf)

            row_scores, row_items = scores[r], items[r]
            kth = row_scores[0]
            for block in range(uint64(0), padded, uint64(BLOCK)):
                at = begin + block
                x0 = _load(tile, at, bias, block, has_bias)
                x1 = _load(tile, at + lanes, bias, block + lanes, has_bias)
                x2 = _load(tile, at + lanes * uint64(2), bias, block + lanes * uint64(2), has_bias)
                x3 = _load(tile, at + lanes * uint64(3), bias, block + lanes * uint64(3), has_bias)
                if not _any_above(_larger(_larger(x0, x1), _larger(x2, x3)), kth):
                    continue
                for part in range(block, block + uint64(BLOCK), lanes):
                    bits = _bits_above(_load(tile, begin + part, bias, part, has_bias), kth)
                    while bits:
                        column = part + _lowest_bit(bits)
                        bits &= bits - uint64(1)
                        score = tile[begin + column]
                        if has_bias:
                            score += bias[column]
                        # Items come in ascending order: one that equals the K-th score stays out.
                        if score > kth:
                            item = int32(index[column]) if gathered else int32(uint64(first) + column)
                            # Adding 0.0 makes 0.0 of -0.0.
                            _replace_root(row_scores, row_items, size, score + float32(0), item)
                            kth = row_scores[0]

    return entry_point(run)


@lru_cache
def sort_heaps(sources: int = SOURCES) -> Callable[..., None]:
    """The compiled end of the scans."""

    def run(items: Array, scores: Array) -> None:
        """Order each heap by (score descending, item ascending)."""
        _ = sources
        for r in range(uint64(len(items))):
            row_scores, row_items = scores[r], items[r]
            for n in range(items.shape[1] - 1, 0, -1):
                size = uint64(n)
                score, item = row_scores[size], row_items[size]
                row_scores[size], row_items[size] = row_scores[0], row_items[0]
                _replace_root(row_scores, row_items, size, score, item)

    return entry_point(run)
