"""The fused kernel: rows of the batch, negatives, scores, loss and gradients in one launch.

A program takes a few positives, a warp wide, and holds their user vectors in registers. It draws the
negatives four at a time, reads each item vector once, and adds to the gradients with vector reductions that
the L2 cache carries out. Nothing of the size (B, N + 1) is ever in memory.

Popular items: negatives are uniform, so only the positives, one pair in N + 1, follow the skew of the data.
A row that is in many pairs of a batch gets its reductions one after another. For MovieLens 20M's most
popular item, 0.34% of the ratings, these are 220 in a batch of 65,536, and 6,500 for an item that is in one
positive of ten: at some four cycles each about 15 microseconds, beside the 200 or so of the step, in which
other rows go on. So the kernel adds to the gradients alone, without private copies of popular rows. This is
arithmetic, not a measurement.

The loss has a float64 slot for each program, which no other program touches: no contention, and the same
sum whatever the order.
"""

# Constants of a kernel are written in capitals, and arguments get their types when it is launched.
# ruff: noqa: N803, N806, PLR0915
# Tuples grow by an element a lane, in loops that are unrolled.
# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives.triton_gpu import draw_quad, exclusion_arguments
from fasttower_kernels.philox import Key
from fasttower_kernels.sampled_bce.settings import LossSettings
from fasttower_kernels.sampled_bce.triton_batch import batch_exclusion, batch_positives
from fasttower_kernels.sampled_bce.triton_segments import reduce_pairs
from fasttower_kernels.shuffle.triton_gpu import row_bits
from fasttower_kernels.tables import Interactions, Tables
from fasttower_kernels.triton_launch import Launch, device_scope, signed_word
from fasttower_kernels.triton_tiles import tile_of, warp_lanes


class Output(IntEnum):
    """What the kernel makes besides the loss."""

    NOTHING = 0
    GRADIENTS = 1
    PAIRS = 2  # drawn items and their coefficients, for the deterministic reduction


_NOTHING = tl.constexpr(int(Output.NOTHING))
_GRADIENTS = tl.constexpr(int(Output.GRADIENTS))
_PAIRS = tl.constexpr(int(Output.PAIRS))


@triton.jit
def _softplus_and_sigmoid(x):
    """Softplus as `linear + log(factor)`, factor in (1, 2], and its derivative.

    The factors of several logits are multiplied first: a logarithm costs twenty instructions.
    """
    e = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0), 1.0 + e, tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _rows(index, live, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets of some rows in a table [R, BLOCK_D], int64, and which of their elements there are."""
    d = tl.arange(0, BLOCK_D)
    return index[:, None] * WIDTH + d[None, :], live[:, None] & (d < WIDTH)[None, :]


@triton.jit
def _load_items(items_ptr, bias_ptr, item_index, live, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows of some items [R, BLOCK_D] in float32, and their biases [R]; 0 without biases."""
    offsets, mask = _rows(item_index, live, WIDTH, BLOCK_D)
    item = tl.load(items_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + item_index, mask=live, other=0.0)
    return item, bias


@triton.jit
def _add_item_gradients(
    item_gradients_ptr,
    bias_gradients_ptr,
    item_index,
    coefficient,
    user,
    item,
    item_l2,
    live,
    HAS_L2: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offsets, mask = _rows(item_index, live, WIDTH, BLOCK_D)
    gradient = coefficient[:, None] * user
    if HAS_L2:
        gradient += item_l2 * item
    tl.atomic_add(item_gradients_ptr + offsets, gradient, mask=mask, sem="relaxed")
    if bias_gradients_ptr is not None:
        tl.atomic_add(bias_gradients_ptr + item_index, coefficient, mask=live, sem="relaxed")


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "batch_size",
        "steps",
        "bits",
        "first_position",
        "num_users",
        "num_items",
        "num_negatives",
    ]
)
def sampled_bce_kernel(
    users_ptr,
    items_ptr,
    bias_ptr,
    user_gradients_ptr,
    item_gradients_ptr,
    bias_gradients_ptr,
    pair_users_ptr,
    pair_items_ptr,
    pair_coefficients_ptr,
    user_index_ptr,
    item_index_ptr,
    indptr_ptr,
    known_items_ptr,
    bit_offsets_ptr,
    bits_ptr,
    words_ptr,
    counters_ptr,
    losses_ptr,
    num_rows,
    batch_size,
    steps,
    bits,
    first_position,
    num_users,
    num_items,
    num_negatives,
    pairs,
    user_l2,
    item_l2,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    SHUFFLE: tl.constexpr,
    GATHERED: tl.constexpr,
    OUTPUT: tl.constexpr,
):
    """One batch of the loss in `reference`, and its gradients.

    Args:
        users_ptr: (U, WIDTH), float32 or bfloat16, 16-byte aligned; all arithmetic is float32.
        items_ptr: (I, WIDTH), likewise.
        bias_ptr: (I,), float32, or None.
        user_gradients_ptr: (U, WIDTH), added to; None, like the next two, unless OUTPUT is GRADIENTS.
        item_gradients_ptr: (I, WIDTH), added to.
        bias_gradients_ptr: (I,), added to; None without a bias.
        pair_users_ptr: (B,), int32: the user, or U for a positive without weight; None, like the next two,
            unless OUTPUT is PAIRS.
        pair_items_ptr: (B, 1 + N), int32: the items, or I likewise.
        pair_coefficients_ptr: (B, 1 + N), float32: the loss's derivative by the logit.
        user_index_ptr: (n,), int32.
        item_index_ptr: (n,), int32.
        indptr_ptr: as in `exclusion_arguments`, like the next three.
        known_items_ptr: the items.
        bit_offsets_ptr: where rows of bits begin.
        bits_ptr: their words.
        words_ptr: (10,), int32: the key of the negatives, and the 8 round keys of the order.
        counters_ptr: (2,), int64: t, which this kernel reads, and Adam's count, which it sets to t + 1. No
            program may write what others still read, so each kernel advances the counter of the other one.
        losses_ptr: (programs,), float64: a program adds its BCE sum to its own slot.
        num_rows: n.
        batch_size: B.
        steps: ceil(n / B).
        bits: of the shuffle.
        first_position: b of the batch's first positive.
        num_users: U.
        num_items: I.
        num_negatives: N.
        pairs: terms of the loss that a positive is divided by.
        user_l2: 2 * l2; None without L2.
        item_l2: 4 * l2 / (N + 1); None without L2.
        WIDTH: the padded width of a row.
        BLOCK_D: the power of two from it.
        BLOCK_B: positives a program.
        SHUFFLE: the batch is number t mod steps of the shuffled order; otherwise the rows are the batch.
        GATHERED: row b of the user table belongs to position b of the batch, whoever the user is.
        OUTPUT: see `Output`.
    """
    program = tl.program_id(0)
    step = tl.load(counters_ptr)
    b, there, length, user_index, item_index = batch_positives(
        program,
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
    catalogue = b * 0 + num_items
    if GATHERED:
        user_index = b.to(tl.int64)

    user_offsets, user_mask = _rows(user_index, live, WIDTH, BLOCK_D)
    user = tl.load(users_ptr + user_offsets, mask=user_mask, other=0.0).to(tl.float32)
    item, bias = _load_items(items_ptr, bias_ptr, item_index, live, WIDTH, BLOCK_D)

    scale = 1.0 / (length.to(tl.float32) * pairs)
    HAS_L2: tl.constexpr = item_l2 is not None
    l2_scale = scale
    if HAS_L2:
        l2_scale = item_l2 * scale

    # -softplus'(-x) is the derivative for the label 1, and keeps its precision where sigmoid(x) is near 1.
    linear, factor, slope = _softplus_and_sigmoid(-(tl.sum(user * item, axis=1) + bias))
    loss = linear + tl.log(factor)
    coefficient = -slope * scale
    gradient = coefficient[:, None] * item
    if OUTPUT == _GRADIENTS:
        _add_item_gradients(
            item_gradients_ptr,
            bias_gradients_ptr,
            item_index,
            coefficient,
            user,
            item,
            l2_scale,
            live,
            HAS_L2,
            WIDTH,
            BLOCK_D,
        )
    if OUTPUT == _PAIRS:
        place = b.to(tl.int64) * (num_negatives + 1)
        tl.store(pair_users_ptr + b, tl.where(live, user_index.to(tl.int32), num_users), mask=there)
        tl.store(pair_items_ptr + place, tl.where(live, item_index.to(tl.int32), num_items), mask=there)
        tl.store(pair_coefficients_ptr + place, tl.where(live, coefficient, 0.0), mask=there)

    key_0 = tl.load(words_ptr).to(tl.uint32, bitcast=True)
    key_1 = tl.load(words_ptr + 1).to(tl.uint32, bitcast=True)
    position = (b + first_position).to(tl.uint32)
    for quad in range((num_negatives + 3) // 4):
        drawn = draw_quad(
            position, quad, step.to(tl.uint32), key_0, key_1, catalogue, num_negatives, live, known
        )
        # All rows of a quad are read before any of their gradients is added: the compiler has to assume that
        # a gradient may lie where a row does, and each row would wait for the addition before it.
        items = ()
        biases = ()
        for lane in tl.static_range(4):
            counted = live & (b * 0 + quad * 4 + lane < num_negatives)
            item, bias = _load_items(items_ptr, bias_ptr, drawn[lane].to(tl.int64), counted, WIDTH, BLOCK_D)
            items += (item,)
            biases += (bias,)
        product = tl.full(loss.shape, 1.0, tl.float32)
        for lane in tl.static_range(4):
            k = b * 0 + quad * 4 + lane
            inside = k < num_negatives
            counted = live & inside
            item = items[lane]
            linear, factor, slope = _softplus_and_sigmoid(tl.sum(user * item, axis=1) + biases[lane])
            loss += tl.where(counted, linear, 0.0)
            product *= tl.where(counted, factor, 1.0)
            coefficient = tl.where(counted, slope * scale, 0.0)
            gradient += coefficient[:, None] * item
            if OUTPUT == _GRADIENTS:
                _add_item_gradients(
                    item_gradients_ptr,
                    bias_gradients_ptr,
                    drawn[lane].to(tl.int64),
                    coefficient,
                    user,
                    item,
                    l2_scale,
                    counted,
                    HAS_L2,
                    WIDTH,
                    BLOCK_D,
                )
            if OUTPUT == _PAIRS:
                place = b.to(tl.int64) * (num_negatives + 1) + 1 + k
                tl.store(pair_items_ptr + place, tl.where(live, drawn[lane], num_items), mask=there & inside)
                tl.store(pair_coefficients_ptr + place, coefficient, mask=there & inside)
        loss += tl.log(product)

    if OUTPUT == _GRADIENTS:
        if HAS_L2:
            gradient += (user_l2 * scale) * user
        tl.atomic_add(user_gradients_ptr + user_offsets, gradient, mask=user_mask, sem="relaxed")
    slot = losses_ptr + program
    tl.store(slot, tl.load(slot) + tl.sum(tl.where(live, loss, 0.0), axis=0).to(tl.float64))
    if program == 0:
        tl.store(counters_ptr + 1, step + 1)


def num_programs(batch_size: int, width: int, lanes: int) -> int:
    """Programs of a launch, and slots of its losses."""
    return triton.cdiv(batch_size, tile_of(width, lanes)[1].rows)


def bce_launch(
    parameters: Tables,
    gradients: Tables | None,
    interactions: Interactions,
    known_positives: KnownPositives | None,
    settings: LossSettings,
    *,
    words: Tensor,
    counters: Tensor,
    losses: Tensor,
    output: Output,
    batch_size: int,
    shuffle: bool,
    gathered: bool = False,
    first_position: int = 0,
    pair_buffers: PairBuffers | None = None,
    lanes: int | None = None,
) -> Launch:
    """The fused kernel with its arguments; see `sampled_bce_kernel`."""
    num_users, width = parameters.users.shape
    lanes = lanes or warp_lanes()
    block_d, tile = tile_of(width, lanes)
    pairs = 1 + settings.num_negatives
    adds = gradients if output is Output.GRADIENTS else None
    arguments: dict[str, Any] = {
        "users_ptr": parameters.users,
        "items_ptr": parameters.items,
        "bias_ptr": parameters.item_bias,
        "user_gradients_ptr": adds and adds.users,
        "item_gradients_ptr": adds and adds.items,
        "bias_gradients_ptr": adds and adds.item_bias,
        "pair_users_ptr": pair_buffers and pair_buffers.users,
        "pair_items_ptr": pair_buffers and pair_buffers.items,
        "pair_coefficients_ptr": pair_buffers and pair_buffers.coefficients,
        "user_index_ptr": interactions.user_index,
        "item_index_ptr": interactions.item_index,
        **exclusion_arguments(known_positives),
        "words_ptr": words,
        "counters_ptr": counters,
        "losses_ptr": losses,
        "num_rows": len(interactions),
        "batch_size": batch_size,
        "steps": triton.cdiv(len(interactions), batch_size),
        "bits": row_bits(len(interactions)),
        "first_position": first_position,
        "num_users": num_users,
        "num_items": len(parameters.items),
        "num_negatives": settings.num_negatives,
        "pairs": float(settings.pairs),
        "user_l2": 2 * settings.l2 if settings.l2 else None,
        "item_l2": 4 * settings.l2 / pairs if settings.l2 else None,
        "WIDTH": width,
        "BLOCK_D": block_d,
        "BLOCK_B": tile.rows,
        "SHUFFLE": shuffle,
        "GATHERED": gathered,
        "OUTPUT": int(output),
    }
    return Launch(sampled_bce_kernel, num_programs(batch_size, width, lanes), arguments, tile.num_warps)


class PairBuffers(NamedTuple):
    """What the deterministic mode holds of a batch.

    Attributes:
        users: (B,), int32.
        items: (B, 1 + N), int32, flat.
        coefficients: (B, 1 + N), float32, flat.
    """

    users: Tensor
    items: Tensor
    coefficients: Tensor

    @staticmethod
    def empty(batch_size: int, num_negatives: int, device: torch.device) -> PairBuffers:
        """Buffers of that size."""
        size = batch_size * (1 + num_negatives)
        return PairBuffers(
            torch.empty(batch_size, dtype=torch.int32, device=device),
            torch.empty(size, dtype=torch.int32, device=device),
            torch.empty(size, dtype=torch.float32, device=device),
        )

    def first(self, batch_size: int, num_negatives: int) -> PairBuffers:
        """The part of a shorter batch."""
        size = batch_size * (1 + num_negatives)
        return PairBuffers(self.users[:batch_size], self.items[:size], self.coefficients[:size])


def add_pair_gradients(
    parameters: Tables, gradients: Tables, pairs: PairBuffers, settings: LossSettings
) -> None:
    """Add the gradients of a batch's pairs in a fixed order, without floating-point atomics."""
    batch_size, num_pairs = len(pairs.users), 1 + settings.num_negatives
    l2_scale = settings.l2 / settings.divisor(batch_size)
    reduce_pairs(
        keys=pairs.items,
        coefficients=pairs.coefficients,
        terms=1,
        others=pairs.users,
        pairs_per_other=num_pairs,
        other_vectors=parameters.users,
        own_vectors=parameters.items,
        gradients=gradients.items,
        bias_gradients=gradients.item_bias,
        own_scale=4 / num_pairs * l2_scale,
    )
    reduce_pairs(
        keys=pairs.users,
        coefficients=pairs.coefficients,
        terms=num_pairs,
        others=pairs.items,
        pairs_per_other=1,
        other_vectors=parameters.items,
        own_vectors=parameters.users,
        gradients=gradients.users,
        bias_gradients=None,
        own_scale=2 * l2_scale,
    )


def train_step(
    parameters: Tables,
    gradients: Tables,
    batch: Interactions,
    known_positives: KnownPositives | None,
    settings: LossSettings,
    *,
    key: Key,
    step: int,
    gathered: bool = False,
) -> Tensor:
    """See the reference's `train_step`; the sum is float64.

    With ``gathered`` the user table has a row for each positive of the batch, (B, P), and the users' indices
    say what negatives leave out, nothing else.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    device = parameters.users.device
    pairs = PairBuffers.empty(len(batch), settings.num_negatives, device) if deterministic else None
    loss = _run_batch(
        parameters,
        gradients,
        batch,
        known_positives,
        settings,
        key=key,
        step=step,
        output=Output.PAIRS if deterministic else Output.GRADIENTS,
        gathered=gathered,
        pair_buffers=pairs,
    )
    if pairs is not None and len(batch):
        with device_scope(device):
            add_pair_gradients(parameters, gradients, pairs, settings)
    return loss


def bce_sum(
    parameters: Tables,
    batch: Interactions,
    known_positives: KnownPositives | None,
    settings: LossSettings,
    *,
    key: Key,
    step: int,
    first_position: int = 0,
) -> Tensor:
    """See the reference's `bce_sum`; the sum is float64."""
    return _run_batch(
        parameters,
        None,
        batch,
        known_positives,
        settings,
        key=key,
        step=step,
        output=Output.NOTHING,
        first_position=first_position,
    )


def _run_batch(
    parameters: Tables,
    gradients: Tables | None,
    batch: Interactions,
    known_positives: KnownPositives | None,
    settings: LossSettings,
    *,
    key: Key,
    step: int,
    output: Output,
    gathered: bool = False,
    first_position: int = 0,
    pair_buffers: PairBuffers | None = None,
) -> Tensor:
    device = parameters.users.device
    if not len(batch):
        return torch.zeros((), dtype=torch.float64, device=device)
    losses = torch.zeros(
        num_programs(len(batch), parameters.users.shape[1], warp_lanes()), dtype=torch.float64, device=device
    )
    launch = bce_launch(
        parameters,
        gradients,
        batch,
        known_positives,
        settings,
        words=torch.tensor([*map(signed_word, key)] + [0] * 8, dtype=torch.int32, device=device),
        counters=torch.tensor([step, 0], dtype=torch.int64, device=device),
        losses=losses,
        output=output,
        batch_size=len(batch),
        shuffle=False,
        gathered=gathered,
        first_position=first_position,
        pair_buffers=pair_buffers,
    )
    with device_scope(device):
        launch()
    return losses.sum()
