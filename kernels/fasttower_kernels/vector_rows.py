"""Rows of a table as vector values inside numba functions.

A row of a width that is known at compile time is one value, ``<width x float>`` to LLVM, which splits it into
the registers that the CPU has. Against a loop over the row's elements this leaves nothing to the vectoriser:
no checks for overlap, no remainder loop, and a row that is used again stays in registers.

    u = load_row(users, user, width)
    x = dot(u, load_row(items, item, width))
    store_row(gradients, item, add_scaled(load_row(gradients, item, width), g, u))

Tables are one-dimensional arrays that hold their rows one after another. Offsets are unsigned 64-bit
products, so a table may have more than 2**31 elements.
"""

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import models, register_model

from fasttower_kernels.compiled import intrinsic

_FLOAT = ir.FloatType()
_CACHE_LINE_BYTES = 64
_FAST = ("reassoc", "contract", "nsz")


class Row(types.Type):
    """A vector of ``width`` float32 values."""

    def __init__(self, width: int) -> None:
        super().__init__(name=f"Row({width})")
        self.width = width


@register_model(Row)
class _RowModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(_FLOAT, fe_type.width))


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, row: Any, width: int) -> Any:
    """The address of a row, as a pointer to a vector."""
    data = context.make_array(array_type)(context, builder, array).data
    offset = builder.mul(row, ir.Constant(row.type, width))
    return builder.bitcast(builder.gep(data, [offset]), ir.VectorType(_FLOAT, width).as_pointer())


def splat(builder: Any, scalar: Any, width: int) -> Any:
    """A vector of copies of a value, in code generation."""
    one = builder.insert_element(
        ir.Constant(ir.VectorType(_FLOAT, width), ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0)
    )
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
    return builder.shuffle_vector(one, one, zeros)


@intrinsic(prefer_literal=True)
def load_row(typingctx: Any, array: Any, row: Any, width: Any) -> Any:
    """Row ``row`` (uint64) of a flat float32 array whose rows are ``width`` wide."""
    result = Row(width.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, array, args[0], args[1], result.width)
        return builder.load(pointer, align=4)

    return result(array, types.uint64, width), codegen


@intrinsic
def store_row(typingctx: Any, array: Any, row: Any, value: Any) -> Any:
    """Write row ``row`` (uint64)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, array, args[0], args[1], value.width)
        builder.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.uint64, value), codegen


@intrinsic(prefer_literal=True)
def prefetch(typingctx: Any, array: Any, index: Any, count: Any) -> Any:
    """Ask for elements index .. index + count - 1 (index uint64, count a literal) to be brought near."""
    item_bytes = array.dtype.bitwidth // 8
    last = count.literal_value - 1
    line = _CACHE_LINE_BYTES // item_bytes

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, args[0]).data
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag]), "llvm.prefetch.p0"
        )
        for offset in sorted({*range(0, last + 1, line), last}):
            position = builder.add(args[1], ir.Constant(args[1].type, offset))
            address = builder.bitcast(builder.gep(data, [position]), byte)
            # To read, into all caches, data.
            builder.call(function, [address, flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(array, types.uint64, count), codegen


@intrinsic
def scaled(typingctx: Any, scale: Any, row: Any) -> Any:
    """``scale * row``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(splat(builder, args[0], row.width), args[1], flags=_FAST)

    return row(types.float32, row), codegen


@intrinsic
def add_scaled(typingctx: Any, row: Any, scale: Any, other: Any) -> Any:
    """``row + scale * other``, rounded once where the CPU can."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scaled = builder.fmul(splat(builder, args[1], row.width), args[2], flags=_FAST)
        return builder.fadd(args[0], scaled, flags=_FAST)

    return row(row, types.float32, other), codegen


@intrinsic(prefer_literal=True)
def filled(typingctx: Any, value: Any, width: Any) -> Any:
    """A row of ``width`` (a literal) values, all the same."""
    result = Row(width.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return splat(builder, args[0], result.width)

    return result(types.float32, width), codegen


@intrinsic
def replaced(typingctx: Any, row: Any, bits: Any, value: Any) -> Any:
    """A row of 64 values with ``value`` where ``bits`` (uint64) has its bits on; bit 0 is value 0's."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        on = builder.bitcast(args[1], ir.VectorType(ir.IntType(1), row.width))
        return builder.select(on, splat(builder, args[2], row.width), args[0])

    return row(row, types.uint64, types.float32), codegen


@intrinsic
def count_bits(typingctx: Any, bits: Any) -> Any:
    """How many bits of a uint64 are on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


@intrinsic
def product(typingctx: Any, left: Any, right: Any) -> Any:
    """``left * right``, value by value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(*args, flags=_FAST)

    return left(left, right), codegen


@intrinsic
def quotient(typingctx: Any, left: Any, right: Any) -> Any:
    """``left / right``, value by value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fdiv(*args)

    return left(left, right), codegen


@intrinsic
def square_root(typingctx: Any, row: Any) -> Any:
    """The square root of each value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = args[0].type
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector]), f"llvm.sqrt.v{row.width}f32"
        )
        return builder.call(function, args)

    return row(row), codegen


@intrinsic
def dot(typingctx: Any, left: Any, right: Any) -> Any:
    """The sum of the products of two rows, in any order."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        product = builder.fmul(*args, flags=_FAST)
        vector = product.type
        reduce = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_FLOAT, [_FLOAT, vector]),
            f"llvm.vector.reduce.fadd.v{left.width}f32",
        )
        return builder.call(reduce, [ir.Constant(_FLOAT, 0.0), product], fastmath=_FAST)

    return types.float32(left, right), codegen


@intrinsic
def float_of_bits(typingctx: Any, bits: Any) -> Any:
    """The float32 that an int32's bits mean."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _FLOAT)

    return types.float32(types.int32), codegen


@intrinsic
def bits_of_float(typingctx: Any, value: Any) -> Any:
    """The bits of a float32 as an int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen
