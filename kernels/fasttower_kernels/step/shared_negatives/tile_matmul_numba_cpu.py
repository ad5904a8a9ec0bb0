"""Matrix products of a tile, in registers: the three of shared negatives are one kernel.

A group of rows of the result stays in registers while the inner index runs, so that a load of a row of the
right matrix serves the whole group, and a number of the left one as many lanes as the row has:

    C[i, :] += sum_t A[i, t] B[t, :]

The order of the sum is that of t whatever the CPU's registers hold. With vectors wider than a register LLVM
takes several; how many rows and lanes go together is chosen so that all stay in registers.

Source: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (ACM TOMS 2008).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from fasttower_kernels.compiled import intrinsic
from fasttower_kernels.vector_rows import splat

ROW_GROUP = 16
"""A product has a multiple of so many rows."""

_FLOAT, _INDEX = ir.FloatType(), ir.IntType(64)
_FAST = ("contract", "nsz")


def _blocking(features: str, columns: int) -> tuple[int, int]:
    """Rows and lanes that are summed up together, by the CPU's features and the result's columns."""
    wide = "+avx512f" in features
    lanes = min(columns, 64 if wide else 16)
    accumulators = 64 * 4 if wide else 16 * 4  # numbers in flight: half of the registers or somewhat less
    rows = 4
    while rows < ROW_GROUP and 2 * rows * lanes <= accumulators:
        rows *= 2
    return rows, lanes


@intrinsic(prefer_literal=True)
def add_product(
    typingctx: Any,
    c: Any,
    c_row: Any,
    a: Any,
    a_begin: Any,
    a_row: Any,
    a_inner: Any,
    b: Any,
    b_row: Any,
    rows: Any,
    inner: Any,
    columns: Any,
) -> Any:
    """``C += A B`` for flat float32 arrays; A may be transposed.

    Args:
        typingctx: numba's.
        c: rows of ``columns`` elements; the result is from row ``c_row`` on.
        c_row: uint64.
        a: A[i, t] is ``a[a_begin + i * a_row + t * a_inner]``.
        a_begin: uint64.
        a_row: uint64.
        a_inner: uint64.
        b: rows of ``columns`` elements; B[t] is row ``b_row + t``.
        b_row: uint64.
        rows: uint64, a multiple of ROW_GROUP.
        inner: uint64.
        columns: a literal.
    """
    width = columns.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        features = context.codegen().magic_tuple()[2]
        group, most = _blocking(features, width)
        pointer_c, pointer_a, pointer_b = (
            context.make_array(array)(context, builder, args[i]).data for i, array in ((0, c), (2, a), (6, b))
        )
        _, c_row, _, a_begin, a_row, a_inner, _, b_row, rows, inner, _ = args

        def constant(value: int) -> Any:
            return ir.Constant(_INDEX, value)

        def vector_at(pointer: Any, row: Any, first: int, lanes: int) -> Any:
            offset = builder.add(builder.mul(row, constant(width)), constant(first))
            return builder.bitcast(builder.gep(pointer, [offset]), ir.VectorType(_FLOAT, lanes).as_pointer())

        with cgutils.for_range_slice(builder, constant(0), rows, constant(group), intp=_INDEX) as (i, _):
            begins = [
                builder.add(a_begin, builder.mul(builder.add(i, constant(r)), a_row)) for r in range(group)
            ]
            for first in range(0, width, most):
                lanes = min(most, width - first)
                results = [
                    vector_at(pointer_c, builder.add(builder.add(c_row, i), constant(r)), first, lanes)
                    for r in range(group)
                ]
                sums = [cgutils.alloca_once(builder, ir.VectorType(_FLOAT, lanes)) for _ in results]
                for sum_, result in zip(sums, results, strict=True):
                    builder.store(builder.load(result, align=4), sum_)
                with cgutils.for_range(builder, inner, intp=_INDEX) as loop:
                    t = loop.index
                    right = builder.load(vector_at(pointer_b, builder.add(b_row, t), first, lanes), align=4)
                    step = builder.mul(t, a_inner)
                    for sum_, begin in zip(sums, begins, strict=True):
                        left = builder.load(builder.gep(pointer_a, [builder.add(begin, step)]))
                        product = builder.fmul(splat(builder, left, lanes), right, flags=_FAST)
                        builder.store(builder.fadd(builder.load(sum_), product, flags=_FAST), sum_)
                for sum_, result in zip(sums, results, strict=True):
                    builder.store(builder.load(sum_), result, align=4)
        return context.get_dummy_value()

    index = types.uint64
    signature = types.void(c, index, a, index, index, index, b, index, index, index, columns)
    return signature, codegen
