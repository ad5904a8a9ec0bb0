"""Lazy Adam in Triton: a row's updates wait, its last gradient's among them, until the row is read again.

Each row has a stamp s: it has seen the updates of the epoch before number s (counted from 0), and the
gradient of update s waits in the gradients, zero if there was none. To catch up with update ``now`` is to
take update s with that gradient, and then those up to ``now - 1`` without one, in registers: the sum that
moves the parameters with the terms of `replay_nodes`, the decay of the moments in closed form. So a row is
read and written once each time that it is used, 32 bytes per parameter, and rows that are not used cost
nothing. A table without stamps is not lazy, and left alone here.
"""

# Constants of a kernel are written in capitals, and arguments get their types when it is launched.
# What is None is decided when a kernel is compiled, and gets a condition of its own: SIM102.
# ruff: noqa: N803, SIM102
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttower_kernels.adam.lazy_reference import MOST_REPLAYED
from fasttower_kernels.adam.reference import BETA_1, BETA_2, EPSILON
from fasttower_kernels.adam.replay_nodes import NODES, replay_nodes
from fasttower_kernels.adam.triton_gpu import store_parameters, table_arguments, updated
from fasttower_kernels.tables import Tables
from fasttower_kernels.triton_launch import Launch
from fasttower_kernels.triton_tiles import tile_of, warp_lanes

_LOG2_OF_BETA_1 = tl.constexpr(math.log2(BETA_1))
_EPSILON = tl.constexpr(EPSILON)
_MOST_REPLAYED = tl.constexpr(MOST_REPLAYED)
_NODES = tl.constexpr(NODES)
_MANY_UPDATES = tl.constexpr(1 << 20)  # and more: beta_1 to that power is 0


@triton.jit
def epoch_clock(counters_ptr, steps):
    """Where the updates are after the last step.

    Args:
        counters_ptr: (2,), int64; the second says how many steps there were.
        steps: of an epoch.

    Returns:
        How many updates there were, int64; how many of them in this epoch, int32; and how many before it,
        int32, `_MANY_UPDATES` for more.
    """
    count = tl.load(counters_ptr + 1)
    now = ((count - 1).to(tl.uint32) % steps.to(tl.uint32)).to(tl.int32) + 1
    return count, now, tl.minimum(count - now, _MANY_UPDATES).to(tl.int32)


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
    earlier,
    rates_ptr,
    nodes_ptr,
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
        earlier: int32 scalar, of `epoch_clock`: updates before the epoch.
        rates_ptr: (updates, 2), float32, of `step_rates`.
        nodes_ptr: of `replay_nodes`.
        decays_ptr: (updates, 2), float32, of `decays`.
    """
    p = tl.load(parameters_ptr + offsets, mask=mask, other=0.0)
    g = tl.load(gradients_ptr + offsets, mask=mask, other=0.0)
    m = tl.load(moments_1_ptr + offsets, mask=mask, other=0.0)
    v = tl.load(moments_2_ptr + offsets, mask=mask, other=0.0)
    wanted = behind > 0
    step_size = tl.load(rates_ptr + 2 * stamp, mask=wanted, other=0.0)
    inverse_root = tl.load(rates_ptr + 2 * stamp + 1, mask=wanted, other=1.0)
    p, m, v = updated(p, g, m, v, step_size, inverse_root)

    # What the loop does not need is stored before it, and leaves its registers.
    closing_ptr = decays_ptr + 2 * (behind - 1)
    root = tl.sqrt(v)
    tl.store(gradients_ptr + offsets, tl.zeros_like(g), mask=mask)
    tl.store(moments_2_ptr + offsets, v * tl.load(closing_ptr + 1, mask=wanted, other=0.0), mask=mask)

    own = earlier + stamp + 1  # n of `replay_nodes`
    replayed = tl.minimum(behind - 1, _MOST_REPLAYED)
    one_by_one = own < _MOST_REPLAYED
    terms = tl.where(one_by_one, replayed, tl.minimum(replayed, _NODES))
    first = tl.where(one_by_one, 0, _MOST_REPLAYED + _NODES * (replayed - 1))
    # Nothing moves a row that never had a gradient.
    most = tl.max(tl.where(m != 0.0, terms + tl.zeros_like(offsets).to(tl.int32), 0))
    decayed = tl.exp2(own.to(tl.float32) * _LOG2_OF_BETA_1)  # beta_1**n
    learning_rate = step_size * (1.0 - decayed)
    correction = 1.0 / (inverse_root * inverse_root)  # 1 - beta_2**n
    moved = tl.zeros_like(p)
    for term in range(most):
        # A row whose terms are done adds 0.
        due = term < terms
        node_ptr = nodes_ptr + 2 * (first + term)
        growth = tl.load(node_ptr, mask=due, other=0.0)
        weight = tl.load(node_ptr + 1, mask=due, other=0.0)
        scale = learning_rate * weight / (1.0 - weight * decayed)
        moved += scale / (root * tl.rsqrt(correction + growth) + _EPSILON)
    store_parameters(parameters_ptr, rounded_ptr, offsets, mask, p - m * moved)
    tl.store(moments_1_ptr + offsets, m * tl.load(closing_ptr, mask=wanted, other=0.0), mask=mask)


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
    nodes_ptr,
    decays_ptr,
    row,
    stamp,
    behind,
    earlier,
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
        nodes_ptr: likewise.
        decays_ptr: likewise.
        row: int64 block.
        stamp: int32 block, s of each row.
        behind: int32 block, ``now - s``; 0 for a row that stays as it is.
        earlier: as in `catch_up_rows`.
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
        earlier,
        rates_ptr,
        nodes_ptr,
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
            earlier,
            rates_ptr,
            nodes_ptr,
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
    nodes_ptr,
    decays_ptr,
    counters_ptr,
    num_users,
    num_items,
    steps,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Bring all rows of the lazy tables to where dense Adam has them after the steps so far.

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
        user_stamps_ptr: (U,), int32, left as they are; or None.
        item_stamps_ptr: (I,), int32, likewise.
        rates_ptr: (steps, 2), of `step_rates`.
        nodes_ptr: of `replay_nodes`.
        decays_ptr: (steps, 2), of `decays`.
        counters_ptr: as in `epoch_clock`.
        num_users: U.
        num_items: I.
        steps: of an epoch.
        WIDTH: the padded width of a row.
        BLOCK_D: the power of two from it.
        BLOCK_R: rows per program.
    """
    program = tl.program_id(0)
    _, now, earlier = epoch_clock(counters_ptr, steps)
    if user_stamps_ptr is not None:
        if program < (num_users + BLOCK_R - 1) // BLOCK_R:
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
                nodes_ptr,
                decays_ptr,
                row,
                stamp,
                now - stamp,
                earlier,
                WIDTH,
                BLOCK_D,
            )
        program -= (num_users + BLOCK_R - 1) // BLOCK_R
    if item_stamps_ptr is not None:
        if program >= 0:
            row = program.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
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
                nodes_ptr,
                decays_ptr,
                row,
                stamp,
                now - stamp,
                earlier,
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
    user_stamps: Tensor | None,
    item_stamps: Tensor | None,
    rates: Tensor,
    counters: Tensor,
    rounded: Tables | None = None,
    lanes: int | None = None,
) -> Launch:
    """The kernel with its arguments; see `catch_up_kernel`."""
    num_users, width = parameters.users.shape
    num_items = len(parameters.items)
    block_d, tile = tile_of(width, lanes or warp_lanes())
    rows = ((user_stamps, num_users), (item_stamps, num_items))
    return Launch(
        catch_up_kernel,
        sum(triton.cdiv(count, tile.rows) for stamps, count in rows if stamps is not None),
        {
            **table_arguments(parameters, gradients, moments_1, moments_2, rounded),
            "user_stamps_ptr": user_stamps,
            "item_stamps_ptr": item_stamps,
            "rates_ptr": rates,
            "nodes_ptr": replay_nodes().to(rates.device),
            "decays_ptr": decays(len(rates)).to(rates.device),
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
