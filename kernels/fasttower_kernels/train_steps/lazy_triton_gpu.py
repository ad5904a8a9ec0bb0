"""Before a step of lazy Adam: the rows that its batch reads are brought up to date, each of them once.

The kernel walks over the batch as the fused kernel does after it: the same positives, the same negatives
drawn again. Of a row that many pairs want, one pair must do the work. Each pair exchanges the row's stamp
for the number of this step, which no stamp had before; atomic exchanges of an address happen one after
another, so exactly one of them, whatever the order, gets back an older stamp. That pair owns the row, and
the older stamp tells it how far the row is behind. The others get the new stamp, and neither read nor write
the row here: so no two programs touch the same element, and nothing but the exchange has to be atomic, or
ordered. What the owner has written is seen by the fused kernel because that is launched after. A row's new
values depend on the row alone, not on who owns it, so the deterministic mode stays deterministic.

Costs: the draws of the negatives once more, one 4-byte exchange a pair, and 32 bytes a parameter of the
rows that the batch reads; nothing of the size of the tables. Nothing is collected in a list: (B, N + 1)
indices are never in memory. The exchanges of a popular row wait for each other as its gradients' additions
do in the fused kernel, a word instead of a row.
"""

# Constants of a kernel are written in capitals, and arguments get their types when it is launched.
# ruff: noqa: ANN001, ANN201, ANN202, N803
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttower_kernels.adam.lazy_triton_gpu import catch_up_launch, catch_up_table_rows, decays
from fasttower_kernels.negatives.triton_gpu import draw_quad
from fasttower_kernels.sampled_bce.triton_batch import batch_exclusion, batch_positives
from fasttower_kernels.tables import Tables
from fasttower_kernels.train_steps.state import TrainState
from fasttower_kernels.triton_launch import Launch


@triton.jit
def _claim(stamps_ptr, rows, asking, now):
    """Put the stamp ``now`` on some rows.

    They come in a tile as large as one of the tables' rows. In a block as short as the rows themselves
    several threads would hold the same element, and not every Triton gives all of them the result of an
    exchange.

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
        "num_rows",
        "batch_size",
        "steps",
        "bits",
        "num_items",
        "num_negatives",
    ]
)
def catch_up_batch_kernel(
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
    decays_ptr,
    user_index_ptr,
    item_index_ptr,
    indptr_ptr,
    known_items_ptr,
    bit_offsets_ptr,
    bits_ptr,
    words_ptr,
    counters_ptr,
    num_rows,
    batch_size,
    steps,
    bits,
    num_items,
    num_negatives,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Bring the rows that step t reads to where dense Adam has them after t updates.

    The programs of the users and positives come first, then those of the negatives, four of each positive.

    Args:
        users_ptr: as in `catch_up_kernel`, like all that this does not name.
        user_gradients_ptr: zeroed where a row is caught up, like the other gradients.
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
        user_stamps_ptr: (U,), int32; the rows of the batch get the number of t's step in its epoch.
        item_stamps_ptr: (I,), int32, likewise.
        rates_ptr: (steps, 2), of `step_rates`.
        decays_ptr: (steps, 2), of `decays`.
        user_index_ptr: as in `sampled_bce_kernel`, like all that follows.
        item_index_ptr: of the positives.
        indptr_ptr: of the exclusion.
        known_items_ptr: of the exclusion.
        bit_offsets_ptr: of the exclusion.
        bits_ptr: of the exclusion.
        words_ptr: keys.
        counters_ptr: (2,), int64: t, which this kernel sets for the fused one, and how many steps there
            were, which it reads as t.
        num_rows: n.
        batch_size: B.
        steps: ceil(n / B).
        bits: of the shuffle.
        num_items: I.
        num_negatives: N.
        WIDTH: the padded width of a row.
        BLOCK_D: the power of two from it.
        BLOCK_B: positives a program.
    """
    program = tl.program_id(0)
    blocks = (batch_size + BLOCK_B - 1) // BLOCK_B
    step = tl.load(counters_ptr + 1)
    now = (step.to(tl.uint32) % steps.to(tl.uint32)).to(tl.int32)
    b, there, _, user_index, item_index = batch_positives(
        program % blocks,
        step,
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
    live, known = batch_exclusion(
        there, user_index, num_items, indptr_ptr, known_items_ptr, bit_offsets_ptr, bits_ptr
    )
    d = tl.arange(0, BLOCK_D)[None, :]
    if program < blocks:
        rows = user_index[:, None] + d * 0
        stamp = tl.min(_claim(user_stamps_ptr, rows, live[:, None] & (d == 0), now), axis=1)
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
            decays_ptr,
            user_index,
            stamp,
            now - stamp,
            WIDTH,
            BLOCK_D,
        )
        item_rows = item_index.to(tl.int32)[:, None] + d * 0
        items = 1
    else:
        quad = program // blocks - 1
        item_0, item_1, item_2, item_3 = draw_quad(
            b.to(tl.uint32),
            quad,
            step.to(tl.uint32),
            tl.load(words_ptr).to(tl.uint32, bitcast=True),
            tl.load(words_ptr + 1).to(tl.uint32, bitcast=True),
            b * 0 + num_items,
            num_negatives,
            live,
            known,
        )
        item_rows = tl.where(d == 0, item_0[:, None], tl.where(d == 1, item_1[:, None], item_2[:, None]))
        item_rows = tl.where(d == 3, item_3[:, None], item_rows)
        items = tl.minimum(num_negatives - 4 * quad, 4)
    # Column i has the items i; one exchange for all of them, whose answers are waited for once.
    stamps = _claim(item_stamps_ptr, item_rows, live[:, None] & (d < items), now)
    for i in range(items):
        item = tl.max(tl.where(d == i, item_rows, 0), axis=1).to(tl.int64)
        stamp = tl.min(tl.where(d == i, stamps, now), axis=1)
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
            decays_ptr,
            item,
            stamp,
            now - stamp,
            WIDTH,
            BLOCK_D,
        )
    if program == 0:
        tl.store(counters_ptr, step)


class LazyLaunches(NamedTuple):
    """Lazy Adam around the launches of `sampled_bce_kernel`.

    Attributes:
        stamps: of the rows of users and items; all get the number of the first step before it.
        before: a step.
        at_the_end: of all steps.
    """

    stamps: tuple[Tensor, Tensor]
    before: Launch
    at_the_end: Launch


def lazy_launches(
    state: TrainState,
    bce: Launch,
    rates: Tensor,
    *,
    rounded: Tables | None = None,
    lanes: int | None = None,
) -> LazyLaunches:
    """What the lazy optimiser launches.

    Args:
        state: whose tables the steps update.
        bce: the fused kernel of the steps.
        rates: (steps, 2), of `step_rates`.
        rounded: bfloat16 users and items that the fused kernel reads in the place of the state's; or None.
        lanes: of a warp; this machine's if not given.
    """
    tables: tuple[Tables, ...] = (state.parameters, state.gradients, state.moments_1, state.moments_2)
    device = rates.device
    stamps = (
        torch.zeros(len(state.parameters.users), dtype=torch.int32, device=device),
        torch.zeros(len(state.parameters.items), dtype=torch.int32, device=device),
    )
    at_the_end = catch_up_launch(
        *tables,
        user_stamps=stamps[0],
        item_stamps=stamps[1],
        rates=rates,
        decays=decays(len(rates)).to(device),
        counters=bce.arguments["counters_ptr"],
        rounded=rounded,
        lanes=lanes,
    )
    # Both have tables; the fused kernel's may be the rounded ones.
    shared = {**bce.arguments, **at_the_end.arguments}
    parts = 1 + triton.cdiv(bce.arguments["num_negatives"], 4)
    before = Launch(
        catch_up_batch_kernel,
        parts * bce.programs,
        {name: shared[name] for name in catch_up_batch_kernel.arg_names},
        bce.num_warps,
    )
    return LazyLaunches(stamps, before, at_the_end)
