"""Dense Adam in Triton: one launch over all tables, which also zeroes the gradients.

The floor is memory: four arrays read and four written, 32 bytes per parameter.
"""

# Constants of a kernel are written in capitals, and arguments get their types when it is launched.
# What is None is decided when a kernel is compiled, and gets a condition of its own: SIM102.
# ruff: noqa: N803, SIM102
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttower_kernels.adam.reference import BETA_1, BETA_2, EPSILON
from fasttower_kernels.tables import ROW_ALIGNMENT, Tables
from fasttower_kernels.triton_launch import Launch, device_scope
from fasttower_kernels.triton_tiles import warp_lanes

_BLOCK = 1024
_NUM_WARPS = 4
_BETA_1, _BETA_2 = tl.constexpr(BETA_1), tl.constexpr(BETA_2)
_EPSILON = tl.constexpr(EPSILON)


@triton.jit
def updated(p, g, m, v, step_size, inverse_root):
    """Parameters and moments after an update with gradient g."""
    m += (1 - _BETA_1) * (g - m)
    v = _BETA_2 * v + (1 - _BETA_2) * (g * g)
    return p - step_size * m / (tl.sqrt(v) * inverse_root + _EPSILON), m, v


@triton.jit
def store_parameters(parameters_ptr, rounded_ptr, offsets, mask, p):
    """Store parameters, and rounded to bfloat16 where there is a table of them."""
    tl.store(parameters_ptr + offsets, p, mask=mask)
    if rounded_ptr is not None:
        tl.store(rounded_ptr + offsets, p.to(tl.bfloat16), mask=mask)


@triton.jit
def _update(
    parameters_ptr,
    gradients_ptr,
    moments_1_ptr,
    moments_2_ptr,
    rounded_ptr,
    offsets,
    mask,
    step_size,
    inverse_root,
):
    p = tl.load(parameters_ptr + offsets, mask=mask, other=0.0)
    g = tl.load(gradients_ptr + offsets, mask=mask, other=0.0)
    m = tl.load(moments_1_ptr + offsets, mask=mask, other=0.0)
    v = tl.load(moments_2_ptr + offsets, mask=mask, other=0.0)
    p, m, v = updated(p, g, m, v, step_size, inverse_root)
    store_parameters(parameters_ptr, rounded_ptr, offsets, mask, p)
    tl.store(gradients_ptr + offsets, tl.zeros_like(g), mask=mask)
    tl.store(moments_1_ptr + offsets, m, mask=mask)
    tl.store(moments_2_ptr + offsets, v, mask=mask)


@triton.jit
def update_tables(
    program,
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
    step_size,
    inverse_root,
    USERS: tl.constexpr,
    ITEMS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One update of whole tables; programs take the user table, then the item table, then the bias.

    Args:
        program: int32 scalar, from 0.
        users_ptr: as in `adam_kernel`, like all that this does not name.
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
        user_groups: U * P / GROUP.
        item_groups: I * P / GROUP.
        num_items: I.
        step_size: float32 scalar, of `step_rates`.
        inverse_root: float32 scalar, likewise.
        USERS: whether to update the users.
        ITEMS: whether to update the items and their bias.
        GROUP: floats in 16 bytes.
        BLOCK: elements per program.
    """
    index = tl.arange(0, BLOCK)
    if USERS:
        size = user_groups.to(tl.int64) * GROUP
        programs = ((size + BLOCK - 1) // BLOCK).to(tl.int32)
        if program < programs:
            offsets = program.to(tl.int64) * BLOCK + index
            _update(
                users_ptr,
                user_gradients_ptr,
                user_moments_1_ptr,
                user_moments_2_ptr,
                rounded_users_ptr,
                offsets,
                offsets < size,
                step_size,
                inverse_root,
            )
        program -= programs
    if ITEMS:
        size = item_groups.to(tl.int64) * GROUP
        programs = ((size + BLOCK - 1) // BLOCK).to(tl.int32)
        if (program >= 0) & (program < programs):
            offsets = program.to(tl.int64) * BLOCK + index
            _update(
                items_ptr,
                item_gradients_ptr,
                item_moments_1_ptr,
                item_moments_2_ptr,
                rounded_items_ptr,
                offsets,
                offsets < size,
                step_size,
                inverse_root,
            )
        program -= programs
        if bias_ptr is not None:
            if program >= 0:
                offsets = program.to(tl.int64) * BLOCK + index
                _update(
                    bias_ptr,
                    bias_gradients_ptr,
                    bias_moments_1_ptr,
                    bias_moments_2_ptr,
                    None,
                    offsets,
                    offsets < num_items,
                    step_size,
                    inverse_root,
                )


@triton.jit(do_not_specialize=["user_groups", "item_groups", "num_items", "steps"])
def adam_kernel(
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
    rates_ptr,
    counters_ptr,
    user_groups,
    item_groups,
    num_items,
    steps,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One update of all tables.

    Args:
        users_ptr: (U, P), float32, 16-byte aligned like all tables.
        user_gradients_ptr: (U, P), zeroed.
        user_moments_1_ptr: (U, P).
        user_moments_2_ptr: (U, P).
        items_ptr: (I, P).
        item_gradients_ptr: (I, P), zeroed.
        item_moments_1_ptr: (I, P).
        item_moments_2_ptr: (I, P).
        bias_ptr: (I,), or None like the next three.
        bias_gradients_ptr: (I,), zeroed.
        bias_moments_1_ptr: (I,).
        bias_moments_2_ptr: (I,).
        rounded_users_ptr: (U, P), bfloat16, gets the new users rounded; None, like the next, for none.
        rounded_items_ptr: (I, P), likewise the items.
        rates_ptr: (steps, 2), float32: step size and inverse root of count c in row (c - 1) mod steps.
        counters_ptr: (2,), int64: t, which this kernel sets to the count, and the count, which it reads.
        user_groups: U * P / GROUP. Counted in groups, the ends of the tables are multiples of GROUP for all
            that the compiler knows, and the loads stay 16 bytes wide.
        item_groups: I * P / GROUP.
        num_items: I.
        steps: rows of the rates.
        GROUP: floats in 16 bytes.
        BLOCK: elements per program.
    """
    program = tl.program_id(0)
    count = tl.load(counters_ptr + 1)
    rate = rates_ptr + 2 * ((count - 1).to(tl.uint32) % steps.to(tl.uint32))
    update_tables(
        program,
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
        tl.load(rate),
        tl.load(rate + 1),
        USERS=True,
        ITEMS=True,
        GROUP=GROUP,
        BLOCK=BLOCK,
    )
    if program == 0:
        tl.store(counters_ptr, count)


def step_rates(first_count: int, counts: int, learning_rate: float) -> Tensor:
    """What Adam's kernel needs of some counts, computed in float64.

    Args:
        first_count: the first count, from 1.
        counts: how many.
        learning_rate: the step size before its correction.

    Returns:
        (counts, 2), float32, on the CPU: ``learning_rate / (1 - beta_1**count)`` and
        ``1 / sqrt(1 - beta_2**count)``.
    """
    count = torch.arange(first_count, first_count + counts, dtype=torch.float64)
    # expm1 keeps the precision of 1 - beta**count at the first counts.
    step_size = learning_rate / -torch.expm1(count * math.log(BETA_1))
    inverse_root = torch.rsqrt(-torch.expm1(count * math.log(BETA_2)))
    return torch.stack([step_size, inverse_root], dim=1).float()


def table_arguments(
    parameters: Tables,
    gradients: Tables,
    moments_1: Tables,
    moments_2: Tables,
    rounded: Tables | None,
) -> dict[str, Any]:
    """The arguments of a kernel that updates all tables, and the rounded ones where they are."""
    arguments: dict[str, Any] = {
        "rounded_users_ptr": rounded and rounded.users,
        "rounded_items_ptr": rounded and rounded.items,
    }
    for name, field in (("users", "users"), ("items", "items"), ("bias", "item_bias")):
        singular = {"users": "user", "items": "item"}.get(name, name)
        arguments[f"{name}_ptr"] = getattr(parameters, field)
        arguments[f"{singular}_gradients_ptr"] = getattr(gradients, field)
        arguments[f"{singular}_moments_1_ptr"] = getattr(moments_1, field)
        arguments[f"{singular}_moments_2_ptr"] = getattr(moments_2, field)
    return arguments


def adam_launch(
    parameters: Tables,
    gradients: Tables,
    moments_1: Tables,
    moments_2: Tables,
    *,
    rates: Tensor,
    counters: Tensor,
    rounded: Tables | None = None,
    lanes: int | None = None,
) -> Launch:
    """The kernel with its arguments; see `adam_kernel`."""
    # Of 8 elements a thread would store the float32 ones as 4 and 4, and the bfloat16 ones as 8 others, which
    # it would have to get from other threads through shared memory. So it has 4.
    num_warps = _NUM_WARPS if rounded is None else _BLOCK // (ROW_ALIGNMENT * (lanes or warp_lanes()))
    return Launch(
        adam_kernel,
        sum(triton.cdiv(table.numel(), _BLOCK) for table in parameters),
        {
            **table_arguments(parameters, gradients, moments_1, moments_2, rounded),
            "rates_ptr": rates,
            "counters_ptr": counters,
            "user_groups": parameters.users.numel() // ROW_ALIGNMENT,
            "item_groups": parameters.items.numel() // ROW_ALIGNMENT,
            "num_items": len(parameters.items),
            "steps": len(rates),
            "GROUP": ROW_ALIGNMENT,
            "BLOCK": _BLOCK,
        },
        num_warps,
    )


def adam_step(
    parameters: Tables,
    gradients: Tables,
    moments_1: Tables,
    moments_2: Tables,
    *,
    count: int,
    learning_rate: float,
) -> None:
    """See the reference's `adam_step`."""
    device = parameters.users.device
    launch = adam_launch(
        parameters,
        gradients,
        moments_1,
        moments_2,
        rates=step_rates(count, 1, learning_rate).to(device),
        counters=torch.tensor([count - 1, count], dtype=torch.int64, device=device),
    )
    with device_scope(device):
        launch()
