"""The scan of a tile of scores for what is among the K best of each row, compiled.

It compares the largest score of a block with the K-th best so far. Nearly every score is so read once, from
the cache, many an instruction, and that is all that happens to it. What is above becomes a key of its row.
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
    intrinsic,
    njit,
    uint64,
)
from fasttower_kernels.topk.keys_numba_cpu import key_of, score_of, select
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
        keys: Array,
        counts: Array,
        thresholds: Array,
        size: int,
    ) -> None:
        """Put what may be among the K best of each row into its keys.

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
            keys: (>= C, S), uint64, S > K: the K best of each row so far are among its first keys.
            counts: (>= C,), int64: how many keys each row has, fewer than S.
            thresholds: (>= C,), float32: what a score has to be above.
            size: K.
        """
        _ = sources
        lanes, wanted = uint64(_LANES), uint64(size)
        flat, slots = keys.reshape(-1), uint64(keys.shape[1])
        padded = (uint64(width) + uint64(BLOCK - 1)) // uint64(BLOCK) * uint64(BLOCK)
        for r in range(uint64(len(cursors))):
            begin = r * uint64(stride)
            cursors[r] = _leave_out(
                tile, begin, width, first, index, gathered, seen_items, cursors[r], ends[r]
            )
            for column in range(uint64(width), padded):
                tile[begin + column] = float32(-np.inf)

            row, count, threshold = r * slots, uint64(counts[r]), thresholds[r]
            for block in range(uint64(0), padded, uint64(BLOCK)):
                at = begin + block
                x0 = _load(tile, at, bias, block, has_bias)
                x1 = _load(tile, at + lanes, bias, block + lanes, has_bias)
                x2 = _load(tile, at + lanes * uint64(2), bias, block + lanes * uint64(2), has_bias)
                x3 = _load(tile, at + lanes * uint64(3), bias, block + lanes * uint64(3), has_bias)
                if not _any_above(_larger(_larger(x0, x1), _larger(x2, x3)), threshold):
                    continue
                for part in range(block, block + uint64(BLOCK), lanes):
                    bits = _bits_above(_load(tile, begin + part, bias, part, has_bias), threshold)
                    while bits:
                        column = part + _lowest_bit(bits)
                        bits &= bits - uint64(1)
                        score = tile[begin + column]
                        if has_bias:
                            score += bias[column]
                        # Items come in ascending order: one that equals the K-th score stays out.
                        if score > threshold:
                            item = index[column] if gathered else uint64(first) + column
                            # Adding 0.0 makes 0.0 of -0.0.
                            flat[row + count] = key_of(score + float32(0), item)
                            count += uint64(1)
                            if count == slots:
                                select(flat, row, row + slots, wanted)
                                count = wanted
                                threshold = score_of(flat[row + wanted - uint64(1)])
            counts[r], thresholds[r] = count, threshold

    return entry_point(run)
