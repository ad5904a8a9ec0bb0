"""The fused kernel: rows of the batch, negatives, scores, loss and gradients in one launch.

A program takes a few positives, a warp wide, and holds their user vectors in registers. It draws the
negatives four at a time, reads each item vector once, and adds to the gradients with vector reductions that
the L2 cache carries out. Nothing of the size (B, N + 1) is ever in memory, but for the items of hard
negatives, which `hard_triton_gpu` chooses in a launch before.

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
# ruff: noqa: N803, N806
# Tuples grow by an element a lane, in loops that are unrolled.
# mypy: disallow-untyped-defs=False, disable-error-code="assignment,index"

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttower_kernels.losses.triton_gpu import NORMALISED, POSITIVE_LAST, negative, positive
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.negatives.triton_gpu import draw_quad, exclusion_arguments, table_arguments
from fasttower_kernels.philox import Key
from fasttower_kernels.settings import LossSettings, check_on_gpu
from fasttower_kernels.shuffle.triton_gpu import row_bits
from fasttower_kernels.step.batch_triton_gpu import batch_exclusion, batch_positives
from fasttower_kernels.step.own_negatives.hard_triton_gpu import hard_launch, kept_quad
from fasttower_kernels.step.own_negatives.pairs_triton_gpu import PairBuffers, add_pair_gradients
from fasttower_kernels.step.own_negatives.scores_triton_gpu import (
    load_items,
    load_users,
    rows,
    score,
)
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
def _quad(kept_ptr, b, position, quad, step, key_0, key_1, num_items, num_negatives, live, known, table):
    """Four negatives of a block of positives, kept or drawn; see `draw_quad`."""
    if kept_ptr is not None:
        drawn = kept_quad(kept_ptr, b, quad, num_negatives, live)
    else:
        drawn = draw_quad(position, quad, step, key_0, key_1, num_items, num_negatives, live, known, table)
    return drawn


@triton.jit
def _log_q(drawn, lane: tl.constexpr, counted, uniform, log_drawn, log_p_ptr):
    """Log q of a lane of `_quad`; ``log_drawn`` is the log of the number drawn over the mass that is free."""
    log_q = uniform
    if log_p_ptr is not None:
        by_popularity = tl.load(log_p_ptr + drawn[lane], mask=counted, other=0.0) + log_drawn
        log_q = tl.where(drawn[4 + lane], uniform, by_popularity)
    return log_q


@triton.jit
def _add_item_gradients(
    item_gradients_ptr,
    bias_gradients_ptr,
    item_index,
    coefficient,
    user,
    item,
    bias,
    scored,
    item_l2,
    bias_l2,
    live,
    HAS_L2: tl.constexpr,
    COSINE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add what a pair gives to its item and the item's bias; ``scored`` is what `_score` gave."""
    offsets, mask = rows(item_index, live, WIDTH, BLOCK_D)
    own = item_l2
    if COSINE:
        # ``r (g u - <g u, v r> v r)``: the logit is <u, v r>.
        logit, inverse, passes = scored
        gradient = (coefficient * inverse)[:, None] * user
        own = -coefficient * logit * inverse * inverse * passes
        if HAS_L2:
            own += item_l2
        gradient += own[:, None] * item
    else:
        gradient = coefficient[:, None] * user
        if HAS_L2:
            gradient += own * item
    tl.atomic_add(item_gradients_ptr + offsets, gradient, mask=mask, sem="relaxed")
    if bias_gradients_ptr is not None:
        of_bias = coefficient
        if HAS_L2:
            of_bias += bias_l2 * bias
        tl.atomic_add(bias_gradients_ptr + item_index, of_bias, mask=live, sem="relaxed")


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
        "num_drawn",
    ]
)
def own_negatives_kernel(
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
    threshold_ptr,
    alias_ptr,
    log_p_ptr,
    log_free_mass_ptr,
    kept_ptr,
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
    num_drawn,
    pairs,
    temperature,
    calibration,
    user_l2,
    item_l2,
    bias_l2,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    SHUFFLE: tl.constexpr,
    GATHERED: tl.constexpr,
    OUTPUT: tl.constexpr,
    LOSS: tl.constexpr,
    NORMALISED: tl.constexpr,
    POSITIVE_LAST: tl.constexpr,
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
        threshold_ptr: (I,), int32, of a `Popularity`; None, like the next three, to draw uniformly.
        alias_ptr: (I,), int32.
        log_p_ptr: (I,), float32; None, like the next, for a loss that does not read log q too.
        log_free_mass_ptr: (U,), float32.
        kept_ptr: (B, N), int32, of `hard_kernel`; None to draw.
        words_ptr: (10,), int32: the key of the negatives, and the 8 round keys of the order.
        counters_ptr: (2,), int64: t, which this kernel reads, and Adam's count, which it sets to t + 1. No
            program may write what others still read, so each kernel advances the counter of the other one.
        losses_ptr: (programs,), float64: a program adds its sum of values to its own slot.
        num_rows: n.
        batch_size: B.
        steps: ceil(n / B).
        bits: of the shuffle.
        first_position: b of the batch's first positive.
        num_users: U.
        num_items: I.
        num_negatives: N.
        num_drawn: N, or M of which N are kept.
        pairs: terms of the loss that a positive is divided by.
        temperature: of cosine similarity; None for the dot product.
        calibration: of gbce.
        user_l2: 2 * user_l2; None, like the next two, without L2.
        item_l2: 4 * item_l2 / (N + 1).
        bias_l2: 4 * bias_l2 / (N + 1).
        WIDTH: the padded width of a row.
        BLOCK_D: the power of two from it.
        BLOCK_B: positives a program.
        SHUFFLE: the batch is number t mod steps of the shuffled order; otherwise the rows are the batch.
        GATHERED: row b of the user table belongs to position b of the batch, whoever the user is.
        OUTPUT: see `Output`.
        LOSS: its name.
        NORMALISED: whether it needs the log-sum-exp of all logits: then the negatives are drawn and scored
            twice, and log q is taken off their logits.
        POSITIVE_LAST: whether its positive needs the slopes of the negatives.
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
    table = ()
    if threshold_ptr is not None:
        table = (threshold_ptr, alias_ptr)
    log_free_mass = 0.0
    if log_p_ptr is not None:
        log_free_mass = tl.load(log_free_mass_ptr + user_index, mask=live, other=0.0)
    if GATHERED:
        user_index = b.to(tl.int64)

    COSINE: tl.constexpr = temperature is not None
    user, raw, of_user, user_passes = load_users(users_ptr, user_index, live, temperature, WIDTH, BLOCK_D)
    item, bias = load_items(items_ptr, bias_ptr, item_index, live, WIDTH, BLOCK_D)

    scale = 1.0 / (length.to(tl.float32) * pairs)
    HAS_L2: tl.constexpr = item_l2 is not None
    item_scale = scale
    bias_scale = scale
    if HAS_L2:
        item_scale = item_l2 * scale
        bias_scale = bias_l2 * scale

    free = (b * 0 + num_items).to(tl.float32)
    if indptr_ptr is not None:
        free = tl.maximum(num_items - known[1], 1).to(tl.float32)
    weight = free * 0.0 + 1.0
    if LOSS == "gbce":
        weight = 1.0 - calibration * (1.0 - tl.minimum(num_negatives / free, 1.0))

    key_0 = tl.load(words_ptr).to(tl.uint32, bitcast=True)
    key_1 = tl.load(words_ptr + 1).to(tl.uint32, bitcast=True)
    position = (b + first_position).to(tl.uint32)
    scored = score(user, item, COSINE)
    p = scored[0] + bias
    z = p * 0.0
    log_q = z
    log_drawn = 0.0
    if log_p_ptr is not None:
        log_drawn = tl.log(z + num_drawn) - log_free_mass
    if NORMALISED:
        log_q = tl.log(num_drawn / free)
        largest = p
        total = z + 1.0
        for quad in range((num_negatives + 3) // 4):
            drawn = _quad(
                kept_ptr,
                b,
                position,
                quad,
                step.to(tl.uint32),
                key_0,
                key_1,
                catalogue,
                num_negatives,
                live,
                known,
                table,
            )
            for lane in tl.static_range(4):
                counted = live & (b * 0 + quad * 4 + lane < num_negatives)
                other, other_bias = load_items(
                    items_ptr, bias_ptr, drawn[lane].to(tl.int64), counted, WIDTH, BLOCK_D
                )
                x = score(user, other, COSINE)[0] + other_bias
                x -= _log_q(drawn, lane, counted, log_q, log_drawn, log_p_ptr)
                x = tl.where(counted, x, -float("inf"))
                before = largest
                largest = tl.maximum(largest, x)
                total = total * tl.exp(before - largest) + tl.exp(x - largest)
        z = largest + tl.log(total)

    # Rows that a thread has registers for.
    READS_MORE: tl.constexpr = COSINE or (log_p_ptr is not None)
    AHEAD: tl.constexpr = 2 if (BLOCK_D > 128 or (NORMALISED and READS_MORE)) else 4
    loss = p * 0.0
    slopes = p * 0.0
    gradient = tl.zeros_like(raw)
    if not POSITIVE_LAST:
        linear, factor, slope = positive(p, z, slopes, weight, LOSS)
        loss = linear + tl.log(factor)
        coefficient = slope * scale
        gradient = (coefficient * scored[1])[:, None] * item
        if OUTPUT == _GRADIENTS:
            _add_item_gradients(
                item_gradients_ptr,
                bias_gradients_ptr,
                item_index,
                coefficient,
                user,
                item,
                bias,
                scored,
                item_scale,
                bias_scale,
                live,
                HAS_L2,
                COSINE,
                WIDTH,
                BLOCK_D,
            )
        if OUTPUT == _PAIRS:
            place = b.to(tl.int64) * (num_negatives + 1)
            tl.store(pair_coefficients_ptr + place, tl.where(live, coefficient, 0.0), mask=there)

    for quad in range((num_negatives + 3) // 4):
        drawn = _quad(
            kept_ptr,
            b,
            position,
            quad,
            step.to(tl.uint32),
            key_0,
            key_1,
            catalogue,
            num_negatives,
            live,
            known,
            table,
        )
        product = tl.full(loss.shape, 1.0, tl.float32)
        for first in tl.static_range(0, 4, AHEAD):
            # Rows are read before any of their gradients is added: the compiler has to assume that a gradient
            # may lie where a row does, and each row would wait for the addition before it.
            items = ()
            biases = ()
            logs = ()
            for ahead in tl.static_range(AHEAD):
                counted = live & (b * 0 + quad * 4 + first + ahead < num_negatives)
                other, other_bias = load_items(
                    items_ptr, bias_ptr, drawn[first + ahead].to(tl.int64), counted, WIDTH, BLOCK_D
                )
                items += (other,)
                biases += (other_bias,)
                logs += (_log_q(drawn, first + ahead, counted, log_q, log_drawn, log_p_ptr),)
            for ahead in tl.static_range(AHEAD):
                k = b * 0 + quad * 4 + first + ahead
                inside = k < num_negatives
                counted = live & inside
                other = items[ahead]
                pair = score(user, other, COSINE)
                linear, factor, slope = negative(pair[0] + biases[ahead] - logs[ahead], p, z, LOSS)
                loss += tl.where(counted, linear, 0.0)
                product *= tl.where(counted, factor, 1.0)
                slope = tl.where(counted, slope, 0.0)
                slopes += slope
                coefficient = slope * scale
                gradient += (coefficient * pair[1])[:, None] * other
                other_index = drawn[first + ahead]
                if OUTPUT == _GRADIENTS:
                    _add_item_gradients(
                        item_gradients_ptr,
                        bias_gradients_ptr,
                        other_index.to(tl.int64),
                        coefficient,
                        user,
                        other,
                        biases[ahead],
                        pair,
                        item_scale,
                        bias_scale,
                        counted,
                        HAS_L2,
                        COSINE,
                        WIDTH,
                        BLOCK_D,
                    )
                if OUTPUT == _PAIRS:
                    place = b.to(tl.int64) * (num_negatives + 1) + 1 + k
                    there_inside = there & inside
                    tl.store(
                        pair_items_ptr + place, tl.where(live, other_index, num_items), mask=there_inside
                    )
                    tl.store(pair_coefficients_ptr + place, coefficient, mask=there_inside)
        loss += tl.log(product)

    if POSITIVE_LAST:
        linear, factor, slope = positive(p, z, slopes, weight, LOSS)
        loss += linear + tl.log(factor)
        coefficient = slope * scale
        # Read again: to keep it would cost registers in the loop.
        item, bias = load_items(items_ptr, bias_ptr, item_index, live, WIDTH, BLOCK_D)
        scored = score(user, item, COSINE)
        gradient += (coefficient * scored[1])[:, None] * item
        if OUTPUT == _GRADIENTS:
            _add_item_gradients(
                item_gradients_ptr,
                bias_gradients_ptr,
                item_index,
                coefficient,
                user,
                item,
                bias,
                scored,
                item_scale,
                bias_scale,
                live,
                HAS_L2,
                COSINE,
                WIDTH,
                BLOCK_D,
            )
        if OUTPUT == _PAIRS:
            place = b.to(tl.int64) * (num_negatives + 1)
            tl.store(pair_coefficients_ptr + place, tl.where(live, coefficient, 0.0), mask=there)

    if OUTPUT == _PAIRS:
        place = b.to(tl.int64) * (num_negatives + 1)
        tl.store(pair_users_ptr + b, tl.where(live, user_index.to(tl.int32), num_users), mask=there)
        tl.store(pair_items_ptr + place, tl.where(live, item_index.to(tl.int32), num_items), mask=there)
    if OUTPUT == _GRADIENTS:
        if COSINE:
            # Through the norm: ``r/t (g - <g, v r> v r)``, with v r as it is read times t.
            along = tl.sum(gradient * user, axis=1) * temperature * temperature * user_passes
            gradient = of_user[:, None] * (gradient - along[:, None] * user)
        if HAS_L2:
            gradient += (user_l2 * scale) * raw
        offsets, mask = rows(user_index, live, WIDTH, BLOCK_D)
        tl.atomic_add(user_gradients_ptr + offsets, gradient, mask=mask, sem="relaxed")
    slot = losses_ptr + program
    tl.store(slot, tl.load(slot) + tl.sum(tl.where(live, loss, 0.0), axis=0).to(tl.float64))
    if program == 0:
        tl.store(counters_ptr + 1, step + 1)


class OwnLaunches(NamedTuple):
    """A step's launches, in their order.

    Attributes:
        choose: of hard negatives writes those that are kept; None where all are.
        step: the fused kernel.
    """

    choose: Launch | None
    step: Launch

    def __call__(self) -> None:
        """Put the launches on the current stream."""
        if self.choose is not None:
            self.choose()
        self.step()


def num_programs(batch_size: int, width: int, lanes: int) -> int:
    """Programs of a launch, and slots of its losses."""
    return triton.cdiv(batch_size, tile_of(width, lanes)[1].rows)


def own_launches(
    parameters: Tables,
    gradients: Tables | None,
    interactions: Interactions,
    negatives: Negatives,
    loss: LossSettings,
    *,
    words: Tensor,
    counters: Tensor,
    losses: Tensor,
    output: Output,
    batch_size: int,
    shuffle: bool,
    gathered: bool = False,
    pair_buffers: PairBuffers | None = None,
    lanes: int | None = None,
) -> OwnLaunches:
    """The launches of a step with their arguments; see `own_negatives_kernel`."""
    check_on_gpu(loss, negatives.settings, "adam", deterministic=output is Output.PAIRS)
    num_users, width = parameters.users.shape
    lanes = lanes or warp_lanes()
    block_d, tile = tile_of(width, lanes)
    count, table = negatives.settings.count, negatives.popularity
    log_q = table if loss.reads_log_q else None
    kept = None
    if negatives.settings.pool:
        kept = torch.empty((batch_size, count), dtype=torch.int32, device=parameters.users.device)
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
        **exclusion_arguments(negatives.known_positives),
        **table_arguments(table),
        "log_p_ptr": log_q and log_q.log_p,
        "log_free_mass_ptr": log_q and log_q.log_free_mass,
        "kept_ptr": kept,
        "words_ptr": words,
        "counters_ptr": counters,
        "losses_ptr": losses,
        "num_rows": len(interactions),
        "batch_size": batch_size,
        "steps": triton.cdiv(len(interactions), batch_size),
        "bits": row_bits(len(interactions)),
        "first_position": 0,
        "num_users": num_users,
        "num_items": len(parameters.items),
        "num_negatives": count,
        "num_drawn": negatives.settings.drawn,
        "pairs": float(loss.pairs(count)),
        "temperature": loss.norm_temperature,
        "calibration": loss.calibration,
        "user_l2": 2 * loss.user_l2 if loss.has_l2 else None,
        "item_l2": 4 * loss.item_l2 / (1 + count) if loss.has_l2 else None,
        "bias_l2": 4 * loss.bias_l2 / (1 + count) if loss.has_l2 else None,
        "WIDTH": width,
        "BLOCK_D": block_d,
        "BLOCK_B": tile.rows,
        "SHUFFLE": shuffle,
        "GATHERED": gathered,
        "OUTPUT": int(output),
        "LOSS": loss.name,
        "NORMALISED": loss.name in NORMALISED,
        "POSITIVE_LAST": loss.name in POSITIVE_LAST,
    }
    step = Launch(own_negatives_kernel, num_programs(batch_size, width, lanes), arguments, tile.num_warps)
    return OwnLaunches(None if kept is None else hard_launch(step), step)


def run_batch(
    parameters: Tables,
    gradients: Tables | None,
    batch: Interactions,
    negatives: Negatives,
    loss: LossSettings,
    *,
    key: Key,
    step: int,
    gathered: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """Add the gradients of a batch's loss, or none; return the sum of its values, float64.

    With ``gathered`` the user table has a row for each positive of the batch, (B, P), and the users' indices
    say what negatives leave out, nothing else.
    """
    device, count = parameters.users.device, negatives.settings.count
    if not len(batch):
        return torch.zeros((), dtype=torch.float64, device=device)
    pairs, output = None, Output.NOTHING if gradients is None else Output.GRADIENTS
    if gradients is not None and deterministic:
        pairs, output = PairBuffers.empty(len(batch), count, device), Output.PAIRS
    losses = torch.zeros(
        num_programs(len(batch), parameters.users.shape[1], warp_lanes()), dtype=torch.float64, device=device
    )
    launches = own_launches(
        parameters,
        gradients,
        batch,
        negatives,
        loss,
        words=torch.tensor([*map(signed_word, key)] + [0] * 8, dtype=torch.int32, device=device),
        counters=torch.tensor([step, 0], dtype=torch.int64, device=device),
        losses=losses,
        output=output,
        batch_size=len(batch),
        shuffle=False,
        gathered=gathered,
        pair_buffers=pairs,
    )
    with device_scope(device):
        launches()
        if pairs is not None and gradients is not None:
            add_pair_gradients(parameters, gradients, pairs, loss, count)
    return losses.sum()
