"""Lazy Adam in Triton: a row's updates wait, its last gradient's among them, until the row is read again.

Each row has a stamp s: it has seen the updates of the epoch before number s (counted from 0), and the
gradient of update s waits in the gradients, zero if there was none. To catch up with update ``now`` is to
take update s with that gradient, and then those up to ``now - 1`` without one, by the rule of
`lazy_reference`: the first `MOST_REPLAYED` of them in registers, the decay of the moments in closed form.
So a row is read and written once each time that it is used, 32 bytes a parameter, and rows that are not
used cost nothing.

Replaying is no memory traffic but time: of a parameter that is used every R-th update, R - 1 terms, some 15
instructions each. An H100 does them at about 5% of the time that a dense update takes to move its 32 bytes
from and to memory (arithmetic, not a measurement). A single row waits up to `MOST_REPLAYED` terms, one
after another.
"""

# Constants of a kernel are written in capitals, and arguments get their types when it is launched.
# ruff: noqa: ANN001, ANN201, N803
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttower_kernels.adam.lazy_reference import MOST_REPLAYED
from fasttower_kernels.adam.reference import BETA_1, BETA_2, EPSILON
from fasttower_kernels.adam.triton_gpu import store_parameters, table_arguments, updated
from fasttower_kernels.tables import Tables
from fasttower_kernels.triton_launch import Launch
from fasttower_kernels.triton_tiles import tile_of, warp_lanes

_BETA_1 = tl.constexpr(BETA_1)
_ROOT_OF_BETA_2 = tl.constexpr(math.sqrt(BETA_2))
_EPSILON = tl.constexpr(EPSILON)
_MOST_REPLAYED = tl.constexpr(MOST_REPLAYED)
_UNROLLED = tl.constexpr(2)


@triton.jit
def catch_up_rows(
    parameters_ptr,
    gradients_ptr,
    moments_1_ptr,
    moments_2_ptr,
    rounded_ptr,
    offsets,
    mask,
    stamp,
    behind,
    rates_ptr,
    decays_ptr,
):
    """Bring elements of rows that no other program has up to date, and zero their gradients.

    Args:
        parameters_ptr: float32, like the next three.
        gradients_ptr: zeroed.
        moments_1_ptr: first moment.
        moments_2_ptr: second moment.
        rounded_ptr: bfloat16, gets the rounded parameters; or None.
        offsets: int64 block, each element once.
        mask: which of them.
        stamp: int32 block that broadcasts to the offsets: s.
        behind: likewise ``now - s``; 1 or more where the mask is set, 0 elsewhere.
        rates_ptr: (updates, 2), float32, of `step_rates`.
        decays_ptr: (updates, 2), float32, of `decays`.
    """
    p = tl.load(parameters_ptr + offsets, mask=mask, other=0.0)
    g = tl.load(gradients_ptr + offsets, mask=mask, other=0.0)
    m = tl.load(moments_1_ptr + offsets, mask=mask, other=0.0)
    v = tl.load(moments_2_ptr + offsets, mask=mask, other=0.0)
    own_rate_ptr = rates_ptr + 2 * stamp
    wanted = behind > 0
    step_size = tl.load(own_rate_ptr, mask=wanted, other=0.0)
    inverse_root = tl.load(own_rate_ptr + 1, mask=wanted, other=0.0)
    p, m, v = updated(p, g, m, v, step_size, inverse_root)

    root = tl.sqrt(v)
    moved = tl.zeros_like(p)
    # Nothing moves a row that never had a gradient.
    replayed = tl.minimum(behind - 1, _MOST_REPLAYED)
    most = tl.max(tl.where(m != 0.0, replayed + tl.zeros_like(offsets).to(tl.int32), 0))
    k = 1
    decay = 1.0
    spread = 1.0
    while k <= most:
        # A row whose terms are done goes on with a step size of 0. Two at a time wait for their loads and
        # divisions together; more would spill.
        for _ in tl.static_range(_UNROLLED):
            due = k <= replayed
            step_size = tl.load(own_rate_ptr + 2 * k, mask=due, other=0.0)
            inverse_root = tl.load(own_rate_ptr + 2 * k + 1, mask=due, other=0.0)
            decay *= _BETA_1
            spread *= _ROOT_OF_BETA_2
            moved += (step_size * decay) * m / (root * (inverse_root * spread) + _EPSILON)
            k += 1
    closing_ptr = decays_ptr + 2 * (behind - 1)
    m *= tl.load(closing_ptr, mask=wanted, other=0.0)
    v *= tl.load(closing_ptr + 1, mask=wanted, other=0.0)
    store_parameters(parameters_ptr, rounded_ptr, offsets, mask, p - moved)
    tl.store(gradients_ptr + offsets, tl.zeros_like(g), mask=mask)
    tl.store(moments_1_ptr + offsets, m, mask=mask)
    tl.store(moments_2_ptr + offsets, v, mask=mask)


@triton.jit
def catch_up_table_rows(
    parameters_ptr,
    gradients_ptr,
    moments_1_ptr,
    moments_2_ptr,
    bias_ptr,
    bias_gradients_ptr,
    bias_moments_1_ptr,
    bias_moments_2_ptr,
    rounded_ptr,
    rates_ptr,
    decays_ptr,
    row,
    stamp,
    behind,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`catch_up_rows` of whole rows, and of their bias where there is one.

    Args:
        parameters_ptr: (rows, WIDTH), like the next three.
        gradients_ptr: zeroed.
        moments_1_ptr: first moment.
        moments_2_ptr: second moment.
        bias_ptr: (rows,), like the next three, or None.
        bias_gradients_ptr: zeroed.
        bias_moments_1_ptr: first moment.
        bias_moments_2_ptr: second moment.
        rounded_ptr: (rows, WIDTH), as in `catch_up_rows`.
        rates_ptr: likewise.
        decays_ptr: likewise.
        row: int64 block.
        stamp: int32 block, s of each row.
        behind: int32 block, ``now - s``; 0 for a row that stays as it is.
        WIDTH: the padded width of a row.
        BLOCK_D: the power of two from it.
    """
    d = tl.arange(0, BLOCK_D)
    catch_up_rows(
        parameters_ptr,
        gradients_ptr,
        moments_1_ptr,
        moments_2_ptr,
        rounded_ptr,
        row[:, None] * WIDTH + d[None, :],  # [R, BLOCK_D]
        (behind > 0)[:, None] & (d < WIDTH)[None, :],
        stamp[:, None],
        behind[:, None],
        rates_ptr,
        decays_ptr,
    )
    if bias_ptr is not None:
        catch_up_rows(
            bias_ptr,
            bias_gradients_ptr,
            bias_moments_1_ptr,
            bias_moments_2_ptr,
            None,
            row,
            behind > 0,
            stamp,
            behind,
            rates_ptr,
            decays_ptr,
        )


@triton.jit(do_not_specialize=["num_users", "num_items", "steps"])
def catch_up_kernel(
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
    counters_ptr,
    num_users,
    num_items,
    steps,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Bring all rows to where dense Adam has them after the steps so far.

    Args:
        users_ptr: as in `adam_kernel`, like all of the tables.
        user_gradients_ptr: zeroed.
        user_moments_1_ptr: first moment.
        user_moments_2_ptr: second moment.
        items_ptr: the item table.
        item_gradients_ptr: zeroed.
        item_moments_1_ptr: first moment.
        item_moments_2_ptr: second moment.
        bias_ptr: or None.
        bias_gradients_ptr: zeroed.
        bias_moments_1_ptr: first moment.
        bias_moments_2_ptr: second moment.
        rounded_users_ptr: or None, like the next.
        rounded_items_ptr: of the items.
        user_stamps_ptr: (U,), int32; they are old when this is done.
        item_stamps_ptr: (I,), int32, likewise.
        rates_ptr: (steps, 2), of `step_rates`.
        decays_ptr: (steps, 2), of `decays`.
        counters_ptr: (2,), int64; the second says how many steps there were.
        num_users: U.
        num_items: I.
        steps: of an epoch.
        WIDTH: the padded width of a row.
        BLOCK_D: the power of two from it.
        BLOCK_R: rows a program.
    """
    program = tl.program_id(0)
    last = (tl.load(counters_ptr + 1) - 1).to(tl.uint32) % steps.to(tl.uint32)
    now = last.to(tl.int32) + 1
    user_programs = (num_users + BLOCK_R - 1) // BLOCK_R
    if program < user_programs:
        row = program.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        stamp = tl.load(user_stamps_ptr + row, mask=row < num_users, other=now)
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
            row,
            stamp,
            now - stamp,
            WIDTH,
            BLOCK_D,
        )
    else:
        row = (program - user_programs).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        stamp = tl.load(item_stamps_ptr + row, mask=row < num_items, other=now)
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
            row,
            stamp,
            now - stamp,
            WIDTH,
            BLOCK_D,
        )


def decays(updates: int) -> Tensor:
    """What the moments keep: (updates, 2), float32, on the CPU; row k is ``beta_1**k`` and ``beta_2**k``."""
    k = torch.arange(updates, dtype=torch.float64)[:, None]
    return torch.pow(torch.tensor([BETA_1, BETA_2], dtype=torch.float64), k).float()


def catch_up_launch(
    parameters: Tables,
    gradients: Tables,
    moments_1: Tables,
    moments_2: Tables,
    *,
    user_stamps: Tensor,
    item_stamps: Tensor,
    rates: Tensor,
    decays: Tensor,
    counters: Tensor,
    rounded: Tables | None = None,
    lanes: int | None = None,
) -> Launch:
    """The kernel with its arguments; see `catch_up_kernel`."""
    num_users, width = parameters.users.shape
    num_items = len(parameters.items)
    block_d, tile = tile_of(width, lanes or warp_lanes())
    return Launch(
        catch_up_kernel,
        triton.cdiv(num_users, tile.rows) + triton.cdiv(num_items, tile.rows),
        {
            **table_arguments(parameters, gradients, moments_1, moments_2, rounded),
            "user_stamps_ptr": user_stamps,
            "item_stamps_ptr": item_stamps,
            "rates_ptr": rates,
            "decays_ptr": decays,
            "counters_ptr": counters,
            "num_users": num_users,
            "num_items": num_items,
            "steps": len(rates),
            "WIDTH": width,
            "BLOCK_D": block_d,
            "BLOCK_R": tile.rows,
        },
        tile.num_warps,
    )
