"""Which positives a program has, and what their users' negatives leave out.

Every kernel that walks over a batch starts so, and finds the same positives and draws the same negatives.
"""

# Constants of a kernel are written in capitals, and arguments get their types when it is launched.
# ruff: noqa: N803
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from fasttower_kernels.negatives.membership_triton_gpu import exclusion_rows
from fasttower_kernels.shuffle.triton_gpu import shuffle_rows


@triton.jit
def batch_positives(
    block,
    step,
    user_index_ptr,
    item_index_ptr,
    words_ptr,
    num_rows,
    batch_size,
    steps,
    bits,
    BLOCK_B: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    """A block of a batch's positives.

    Args:
        block: int32 scalar, which one: the positions from ``block * BLOCK_B``.
        step: int64 scalar, t.
        user_index_ptr: as in `own_negatives_kernel`, like all that follows.
        item_index_ptr: of the positives.
        words_ptr: with the round keys of the order.
        num_rows: n.
        batch_size: B.
        steps: ceil(n / B).
        bits: of the shuffle.
        BLOCK_B: positives.
        SHUFFLE: whether rows are shuffled.

    Returns:
        b, int32; whether the batch has it; the batch's length, a scalar; and user and item, int64, 0 where
        there is no b.
    """
    begin = 0
    if SHUFFLE:
        # In 32 bits, as the step is in Philox's counter: a division of 64 bits is a call.
        begin = (step.to(tl.uint32) % steps.to(tl.uint32)).to(tl.int32) * batch_size
    length = tl.minimum(batch_size, num_rows - begin)
    b = block * BLOCK_B + tl.arange(0, BLOCK_B)
    there = b < length
    row = tl.where(there, b + begin, 0)
    if SHUFFLE:
        row = shuffle_rows(row.to(tl.uint32), num_rows, bits, words_ptr + 2).to(tl.int32)
    user_index = tl.load(user_index_ptr + row, mask=there, other=0).to(tl.int64)
    item_index = tl.load(item_index_ptr + row, mask=there, other=0).to(tl.int64)
    return b, there, length, user_index, item_index


@triton.jit
def batch_exclusion(there, user_index, num_items, indptr_ptr, known_items_ptr, bit_offsets_ptr, bits_ptr):
    """What the negatives of a block of positives leave out.

    Args:
        there: of `batch_positives`, like the next.
        user_index: of it too.
        num_items: I.
        indptr_ptr: as in `exclusion_arguments`, like the rest; None to leave nothing out.
        known_items_ptr: the items.
        bit_offsets_ptr: where rows of bits begin.
        bits_ptr: their words.

    Returns:
        Which positives count, those whose users have free items; and what `draw_quad` takes as ``known``.
    """
    live = there
    known = ()
    if indptr_ptr is not None:
        known = exclusion_rows(
            user_index, there, num_items, indptr_ptr, known_items_ptr, bit_offsets_ptr, bits_ptr
        )
        live = there & (known[1] < num_items)
    return live, known
