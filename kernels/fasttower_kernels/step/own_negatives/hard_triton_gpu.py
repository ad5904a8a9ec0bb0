"""Hard negatives in Triton: of a pool of draws, those with the largest logits.

A launch before the fused kernel draws and scores the pool and writes the (B, N) items that are kept, 4 bytes
each; the fused kernel reads them in the place of drawing. To choose again there would take the M scores a
second time.

A program holds the kept ones of its positives, and a new draw takes the place of the lowest where it is
above. What is compared is one integer: the bits of the logit, in the order of floats, above the number of the
draw, counted down. So no two are equal, and of equal logits the earlier draw is kept.
"""

# Constants of a kernel are written in capitals, and arguments get their types when it is launched.
# ruff: noqa: N803, N806
# Tuples grow by an element a lane, in loops that are unrolled.
# mypy: disallow-untyped-defs=False, disable-error-code="assignment,index"

from __future__ import annotations

import triton
import triton.language as tl

from fasttower_kernels.negatives.triton_gpu import draw_quad
from fasttower_kernels.step.batch_triton_gpu import batch_exclusion, batch_positives
from fasttower_kernels.step.own_negatives.scores_triton_gpu import load_items, load_users, score
from fasttower_kernels.triton_launch import Launch

_LOWEST = tl.constexpr(-(1 << 63))
_HIGHEST = tl.constexpr((1 << 63) - 1)
_KEPT_PER_PROGRAM = 256
"""Of all positives of a program, for 8 of a thread; a positive's own N may be more."""


@triton.jit
def kept_quad(kept_ptr, b, quad, num_negatives, live):
    """Four kept negatives of a block of positives, and whether each came from the gap search."""
    items = ()
    by_rank = ()
    for lane in tl.static_range(4):
        k = b * 0 + quad * 4 + lane
        place = b.to(tl.int64) * num_negatives + k
        kept = tl.load(kept_ptr + place, mask=live & (k < num_negatives), other=0)
        items += (tl.where(kept < 0, -1 - kept, kept),)
        by_rank += (kept < 0,)
    return items + by_rank


@triton.jit
def _order(x):
    """Integers [R], int64, in the order of floats."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "batch_size",
        "steps",
        "bits",
        "first_position",
        "num_items",
        "num_negatives",
        "num_drawn",
    ]
)
def hard_kernel(
    users_ptr,
    items_ptr,
    bias_ptr,
    user_index_ptr,
    item_index_ptr,
    indptr_ptr,
    known_items_ptr,
    bit_offsets_ptr,
    bits_ptr,
    threshold_ptr,
    alias_ptr,
    kept_ptr,
    words_ptr,
    counters_ptr,
    num_rows,
    batch_size,
    steps,
    bits,
    first_position,
    num_items,
    num_negatives,
    num_drawn,
    temperature,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHUFFLE: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """Choose the negatives of a batch.

    Args:
        users_ptr: as in `own_negatives_kernel`, like all that this does not name.
        items_ptr: the item table.
        bias_ptr: or None.
        user_index_ptr: of the positives.
        item_index_ptr: of the positives.
        indptr_ptr: of the exclusion.
        known_items_ptr: of the exclusion.
        bit_offsets_ptr: of the exclusion.
        bits_ptr: of the exclusion.
        threshold_ptr: of the draws.
        alias_ptr: of the draws.
        kept_ptr: (B, N), int32: the items, or ``-1 - item`` of those from the gap search where there is a
            table; in no order.
        words_ptr: keys.
        counters_ptr: t, which the fused kernel reads after this.
        num_rows: n.
        batch_size: B.
        steps: ceil(n / B).
        bits: of the shuffle.
        first_position: b of the batch's first positive.
        num_items: I.
        num_negatives: N.
        num_drawn: M.
        temperature: of cosine similarity, or None.
        WIDTH: the padded width of a row.
        BLOCK_D: the power of two from it.
        BLOCK_B: positives per program.
        BLOCK_N: the power of two from N.
        SHUFFLE: whether rows are shuffled.
        GATHERED: row b of the user table belongs to position b of the batch.
    """
    step = tl.load(counters_ptr)
    b, there, _, user_index, _ = batch_positives(
        tl.program_id(0),
        step,
        user_index_ptr,
        item_index_ptr,
        words_ptr,
        num_rows,
        batch_size,
        steps,
        bits,
        BLOCK_B,
        SHUFFLE,
    )
    live, known = batch_exclusion(
        there, user_index, num_items, indptr_ptr, known_items_ptr, bit_offsets_ptr, bits_ptr
    )
    table = ()
    if threshold_ptr is not None:
        table = (threshold_ptr, alias_ptr)
    if GATHERED:
        user_index = b.to(tl.int64)
    user = load_users(users_ptr, user_index, live, temperature, WIDTH, BLOCK_D)[0]
    key_0 = tl.load(words_ptr).to(tl.uint32, bitcast=True)
    key_1 = tl.load(words_ptr + 1).to(tl.uint32, bitcast=True)
    COSINE: tl.constexpr = temperature is not None

    # Places that are still empty are below any draw, each of them at its own number.
    n = tl.arange(0, BLOCK_N)[None, :]
    best = tl.where(n < num_negatives, _LOWEST + n.to(tl.int64), _HIGHEST) + (b * 0)[:, None]
    kept = n * 0 + (b * 0)[:, None]
    for quad in range((num_drawn + 3) // 4):
        drawn = draw_quad(
            (b + first_position).to(tl.uint32),
            quad,
            step.to(tl.uint32),
            key_0,
            key_1,
            b * 0 + num_items,
            num_drawn,
            live,
            known,
            table,
        )
        logits = ()
        for lane in tl.static_range(4):
            counted = live & (b * 0 + quad * 4 + lane < num_drawn)
            item, bias = load_items(items_ptr, bias_ptr, drawn[lane].to(tl.int64), counted, WIDTH, BLOCK_D)
            logits += (score(user, item, COSINE)[0] + bias,)
        for lane in tl.static_range(4):
            k = quad * 4 + lane
            place = (_order(logits[lane]) << 32) + (0x7FFFFFFF - k)
            place = tl.where(b * 0 + k < num_drawn, place, _LOWEST)
            item = drawn[lane]
            if len(table) > 0:
                item = tl.where(drawn[4 + lane], -1 - item, item)
            lowest = tl.min(best, axis=1)
            taken = (best == lowest[:, None]) & (place > lowest)[:, None]
            best = tl.where(taken, place[:, None], best)
            kept = tl.where(taken, item[:, None], kept)
    places = b.to(tl.int64)[:, None] * num_negatives + n
    tl.store(kept_ptr + places, kept, mask=there[:, None] & (n < num_negatives))


def hard_launch(step: Launch) -> Launch:
    """What chooses the negatives that a launch of the fused kernel reads."""
    arguments = step.arguments
    block_n = triton.next_power_of_2(max(arguments["num_negatives"], 1))
    block_b = min(arguments["BLOCK_B"], max(1, _KEPT_PER_PROGRAM // block_n))
    shared = arguments | {"BLOCK_B": block_b, "BLOCK_N": block_n}
    return Launch(
        hard_kernel,
        triton.cdiv(arguments["batch_size"], block_b),
        {name: shared[name] for name in hard_kernel.arg_names},
        step.num_warps,
    )
