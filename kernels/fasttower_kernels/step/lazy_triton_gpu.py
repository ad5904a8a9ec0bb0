"""The update after a step where a table is lazy: one launch, as with dense Adam.

Of a lazy table it brings the rows that the next batch reads up to date, each of them once; a table that is
not lazy gets a whole update of dense Adam from other programs of the same launch. The first step of a call
finds all rows up to date, and the last one's launch, which looks at a batch that nobody may ask for, is
followed by one that brings up to date all rows of the lazy tables.

The kernel walks over the next batch as the fused kernel does after it: the same positives and, where the
items are lazy, the same negatives, drawn once more. Users are known from the positives only. Of a row that
many pairs want, one pair must do the work. Each pair exchanges the row's stamp for the number of the coming
step, which no stamp had before; atomic exchanges of an address happen one after another, so exactly one of
them, whatever the order, gets back an older stamp. That pair owns the row, and the older stamp tells it how
far the row is behind. The others get the new stamp, and neither read nor write the row here: so no two
programs touch the same element, and nothing but the exchange has to be atomic, or ordered. What the owner
has written is seen by the fused kernel because that is launched after. A row's new values depend only on the
row, not on who owns it, so the deterministic mode stays deterministic.

Costs of a lazy table: one 4-byte exchange per pair, and 32 bytes per parameter of the rows that the batch
reads; nothing of the size of the table. Nothing is collected in a list: (B, N + 1) indices are never in
memory. The exchanges of a popular row wait for each other as its gradients' additions do in the fused
kernel, a word instead of a row.
"""

# Constants of a kernel are written in capitals, and arguments get their types when it is launched.
# What is None is decided when a kernel is compiled, and gets a condition of its own: SIM102.
# ruff: noqa: N803, N806, SIM102
# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttower_kernels.adam.lazy_triton_gpu import catch_up_launch, catch_up_table_rows, epoch_clock
from fasttower_kernels.adam.triton_gpu import update_tables
from fasttower_kernels.negatives.triton_gpu import draw_quad
from fasttower_kernels.settings import LazyTables
from fasttower_kernels.step.batch_triton_gpu import batch_exclusion, batch_positives
from fasttower_kernels.step.state import TrainState
from fasttower_kernels.tables import ROW_ALIGNMENT, Tables
from fasttower_kernels.triton_launch import Launch
from fasttower_kernels.triton_tiles import warp_lanes


@triton.jit
def _claim(stamps_ptr, rows, asking, now):
    """Put the stamp ``now`` on some rows.

    They come in a tile of at least as many elements as the program has threads. Of fewer, several threads
    would hold the same element, and not every Triton gives all of them the result of an exchange.

    Args:
        stamps_ptr: of the rows.
        rows: int32 or int64 tile.
        asking: int1 tile: which of its elements want their rows.
        now: int32 scalar.

    Returns:
        int32 tile: the older stamps of rows that have become this program's own, elsewhere ``now``.
    """
    return tl.where(asking, tl.atomic_xchg(stamps_ptr + rows, now, mask=asking, sem="relaxed"), now)


@triton.jit(
    do_not_specialize=[
        "user_groups",
        "item_groups",
        "num_rows",
        "batch_size",
        "steps",
        "bits",
        "num_items",
        "num_drawn",
    ]
)
def lazy_update_kernel(
    users_ptr,
    user_gradients_ptr,
    user_moments_1_ptr,
    user_moments_2_ptr,
    items_ptr,
    item_gradients_ptr,
    item_moments_1_ptr,
    item_moments_2_ptr,
    bias_ptr,
    bias_gradients_ptr,
    bias_moments_1_ptr,
    bias_moments_2_ptr,
    rounded_users_ptr,
    rounded_items_ptr,
    user_stamps_ptr,
    item_stamps_ptr,
    rates_ptr,
    nodes_ptr,
    decays_ptr,
    user_index_ptr,
    item_index_ptr,
    indptr_ptr,
    known_items_ptr,
    bit_offsets_ptr,
    bits_ptr,
    threshold_ptr,
    alias_ptr,
    words_ptr,
    counters_ptr,
    user_groups,
    item_groups,
    num_rows,
    batch_size,
    steps,
    bits,
    num_items,
    num_drawn,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update whole tables, or the rows that the next step reads, to where dense Adam has them.

    The programs of the users and positives come first, then those of the negatives, four of each positive,
    if the items are lazy; then those of whole tables.

    Args:
        users_ptr: as in `catch_up_kernel`, like all that this does not name.
        user_gradients_ptr: zeroed where a row is updated, like the other gradients.
        user_moments_1_ptr: first moment.
        user_moments_2_ptr: second moment.
        items_ptr: the item table.
        item_gradients_ptr: zeroed likewise.
        item_moments_1_ptr: first moment.
        item_moments_2_ptr: second moment.
        bias_ptr: or None.
        bias_gradients_ptr: zeroed likewise.
        bias_moments_1_ptr: first moment.
        bias_moments_2_ptr: second moment.
        rounded_users_ptr: or None, like the next.
        rounded_items_ptr: of the items.
        user_stamps_ptr: (U,), int32; the rows of the next batch get its step's number in the epoch. None if
            the users are not lazy.
        item_stamps_ptr: (I,), int32, likewise.
        rates_ptr: (steps, 2), of `step_rates`.
        nodes_ptr: of `replay_nodes`.
        decays_ptr: (steps, 2), of `decays`.
        user_index_ptr: as in `own_negatives_kernel`, like all that follows.
        item_index_ptr: of the positives.
        indptr_ptr: of the exclusion.
        known_items_ptr: of the exclusion.
        bit_offsets_ptr: of the exclusion.
        bits_ptr: of the exclusion.
        threshold_ptr: of the draws.
        alias_ptr: of the draws.
        words_ptr: keys.
        counters_ptr: (2,), int64: t, which this kernel sets to the next step, and the count of steps, which
            it reads.
        user_groups: as in `adam_kernel`, like the next.
        item_groups: of the items.
        num_rows: n.
        batch_size: B.
        steps: ceil(n / B).
        bits: of the shuffle.
        num_items: I.
        num_drawn: negatives that are drawn per positive, those of a pool that are not kept among them.
        WIDTH: the padded width of a row.
        BLOCK_D: the power of two from it.
        BLOCK_B: positives per program.
        GROUP: as in `adam_kernel`.
        BLOCK: elements of whole tables per program.
    """
    program = tl.program_id(0)
    count, now, earlier = epoch_clock(counters_ptr, steps)
    blocks = (batch_size + BLOCK_B - 1) // BLOCK_B
    lazy_programs = blocks
    if item_stamps_ptr is not None:
        lazy_programs += (num_drawn + 3) // 4 * blocks
    if program < lazy_programs:
        # After the last step of an epoch, this is the first batch again, in the order that is over: rows
        # that are brought up to date for nobody.
        b, there, _, user_index, item_index = batch_positives(
            program % blocks,
            count,
            user_index_ptr,
            item_index_ptr,
            words_ptr,
            num_rows,
            batch_size,
            steps,
            bits,
            BLOCK_B,
            SHUFFLE=True,
        )
        # Of a tile to claim rows with, a thread has one element, or a few in small rows. More would cost a
        # register for each, and for each number that is derived from them.
        COLUMNS: tl.constexpr = 4 if BLOCK_D < 16 else (BLOCK_D // 4 if BLOCK_D < 128 else 32)
        column = tl.arange(0, COLUMNS)[None, :]
        if user_stamps_ptr is not None:
            if program < blocks:
                rows = user_index[:, None] + column * 0
                stamp = tl.min(_claim(user_stamps_ptr, rows, there[:, None] & (column == 0), now), axis=1)
                catch_up_table_rows(
                    users_ptr,
                    user_gradients_ptr,
                    user_moments_1_ptr,
                    user_moments_2_ptr,
                    None,
                    None,
                    None,
                    None,
                    rounded_users_ptr,
                    rates_ptr,
                    nodes_ptr,
                    decays_ptr,
                    user_index,
                    stamp,
                    now - stamp,
                    earlier,
                    WIDTH,
                    BLOCK_D,
                )
        if item_stamps_ptr is not None:
            # Column i has the items i.
            if program < blocks:
                item_rows = item_index.to(tl.int32)[:, None] + column * 0
                wanted = there
                items = 1
            else:
                quad = program // blocks - 1
                live, known = batch_exclusion(
                    there, user_index, num_items, indptr_ptr, known_items_ptr, bit_offsets_ptr, bits_ptr
                )
                table = ()
                if threshold_ptr is not None:
                    table = (threshold_ptr, alias_ptr)
                drawn = draw_quad(
                    b.to(tl.uint32),
                    quad,
                    count.to(tl.uint32),
                    tl.load(words_ptr).to(tl.uint32, bitcast=True),
                    tl.load(words_ptr + 1).to(tl.uint32, bitcast=True),
                    b * 0 + num_items,
                    num_drawn,
                    live,
                    known,
                    table,
                )
                item_rows = tl.where(column == 0, drawn[0][:, None], drawn[1][:, None])
                item_rows = tl.where(column == 2, drawn[2][:, None], item_rows)
                item_rows = tl.where(column == 3, drawn[3][:, None], item_rows)  # [BLOCK_B, COLUMNS]
                wanted = live
                items = tl.minimum(num_drawn - 4 * quad, 4)
            # One exchange for all of them, whose answers are waited for once.
            stamps = _claim(item_stamps_ptr, item_rows, wanted[:, None] & (column < items), now)
            for i in range(items):
                item = tl.max(tl.where(column == i, item_rows, 0), axis=1).to(tl.int64)
                stamp = tl.min(tl.where(column == i, stamps, now), axis=1)
                catch_up_table_rows(
                    items_ptr,
                    item_gradients_ptr,
                    item_moments_1_ptr,
                    item_moments_2_ptr,
                    bias_ptr,
                    bias_gradients_ptr,
                    bias_moments_1_ptr,
                    bias_moments_2_ptr,
                    rounded_items_ptr,
                    rates_ptr,
                    nodes_ptr,
                    decays_ptr,
                    item,
                    stamp,
                    now - stamp,
                    earlier,
                    WIDTH,
                    BLOCK_D,
                )
    else:
        update_tables(
            program - lazy_programs,
            users_ptr,
            user_gradients_ptr,
            user_moments_1_ptr,
            user_moments_2_ptr,
            items_ptr,
            item_gradients_ptr,
            item_moments_1_ptr,
            item_moments_2_ptr,
            bias_ptr,
            bias_gradients_ptr,
            bias_moments_1_ptr,
            bias_moments_2_ptr,
            rounded_users_ptr,
            rounded_items_ptr,
            user_groups,
            item_groups,
            num_items,
            tl.load(rates_ptr + 2 * (now - 1)),
            tl.load(rates_ptr + 2 * (now - 1) + 1),
            USERS=user_stamps_ptr is None,
            ITEMS=item_stamps_ptr is None,
            GROUP=GROUP,
            BLOCK=BLOCK,
        )
    if program == 0:
        tl.store(counters_ptr, count)


class LazyLaunches(NamedTuple):
    """Lazy Adam beside the launches of `own_negatives_kernel`.

    Attributes:
        stamps: of the rows of each lazy table; all get the number of the first step before it.
        update: after a step.
        at_the_end: of all steps.
    """

    stamps: tuple[Tensor, ...]
    update: Launch
    at_the_end: Launch


def lazy_launches(
    state: TrainState,
    bce: Launch,
    rates: Tensor,
    lazy: LazyTables,
    *,
    rounded: Tables | None = None,
    lanes: int | None = None,
) -> LazyLaunches:
    """What the lazy optimiser launches.

    Args:
        state: whose tables the steps update.
        bce: the fused kernel of the steps.
        rates: (steps, 2), of `step_rates`.
        lazy: which tables are lazy, one or both.
        rounded: bfloat16 users and items that the fused kernel reads in the place of the state's; or None.
        lanes: of a warp; this machine's if not given.
    """
    parameters = state.parameters
    tables: tuple[Tables, ...] = (parameters, state.gradients, state.moments_1, state.moments_2)
    user_stamps, item_stamps = (
        torch.zeros(len(table), dtype=torch.int32, device=rates.device) if of_table else None
        for table, of_table in zip((parameters.users, parameters.items), lazy, strict=True)
    )
    at_the_end = catch_up_launch(
        *tables,
        user_stamps=user_stamps,
        item_stamps=item_stamps,
        rates=rates,
        counters=bce.arguments["counters_ptr"],
        rounded=rounded,
        lanes=lanes,
    )
    # Like the kernel of whole tables: 8 elements per thread, 4 where they are rounded.
    block = (8 if rounded is None else ROW_ALIGNMENT) * (lanes or warp_lanes()) * bce.num_warps
    whole = ([] if lazy.users else [parameters.users]) + ([] if lazy.items else [*parameters][1:])
    parts = 1 + (triton.cdiv(bce.arguments["num_drawn"], 4) if lazy.items else 0)
    # Both have tables; the fused kernel's may be the rounded ones.
    shared = {
        **bce.arguments,
        **at_the_end.arguments,
        "user_groups": parameters.users.numel() // ROW_ALIGNMENT,
        "item_groups": parameters.items.numel() // ROW_ALIGNMENT,
        "GROUP": ROW_ALIGNMENT,
        "BLOCK": block,
    }
    update = Launch(
        lazy_update_kernel,
        parts * bce.programs + sum(triton.cdiv(table.numel(), block) for table in whole),
        {name: shared[name] for name in lazy_update_kernel.arg_names},
        bce.num_warps,
    )
    return LazyLaunches(
        tuple(stamps for stamps in (user_stamps, item_stamps) if stamps is not None), update, at_the_end
    )
