"""The training step of two tables, compiled: a tile of positives at a time, from the draws to the gradients.

A tile's draws, logits and coefficients lie negative by negative with its positives side by side, so that
Philox, exp and log vectorise over the positives. Negatives are handled in chunks: no buffer grows with N.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttower_kernels.compiled import (
    FAST,
    OPTIONS,
    SOURCES,
    Array,
    empty,
    entry_point,
    flat_arrays,
    float32,
    njit,
    uint32,
    uint64,
)
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.membership import known_arrays, membership_of
from fasttower_kernels.negatives.numba_cpu import TILE, count_free, draw_tile, redraw_touched
from fasttower_kernels.philox import Key
from fasttower_kernels.sampled_bce.settings import LossSettings
from fasttower_kernels.tables import Interactions, Tables
from fasttower_kernels.vector_math import exp_negative, log1p_positive
from fasttower_kernels.vector_rows import (
    add_scaled,
    dot,
    load_row,
    prefetch,
    scaled,
    store_row,
)

CHUNK = 32
"""Negatives of a positive that are handled together, a multiple of 4."""

PREFETCHED_WORDS = 256
"""Words of a user's membership that are prefetched at most: of longer rows, few draws hit the same line."""

_ROWS = 1 + CHUNK

# Positives that `bce_sum` copies at a time. Another number may change the last bits of a sum.
_PART_ROWS = 1 << 14


@njit(fastmath=FAST, **OPTIONS)
def score_tile(
    x: Array,
    items: Array,
    users: Array,
    rows: Array,
    start: int,
    size: int,
    begin: int,
    end: int,
    parameters: Any,
    bits: Array,
    words: int,
    width: int,
    has_bias: bool,
    exclude: bool,
) -> None:
    """Write the logits of rows begin .. end - 1 of ``items`` to the same places of ``x``."""
    user_table, item_table, item_bias = parameters
    tile = uint64(TILE)
    for w in range(size):
        if exclude:  # fetch what the next tile's draws are looked up in
            upcoming = uint64(users[start + tile + w]) * words
            for word in range(uint64(0), min(words, uint64(PREFETCHED_WORDS)), uint64(16)):
                prefetch(bits, upcoming + word, 1)
        u = load_row(user_table, uint64(rows[start + w]), width)
        for k in range(begin, end):
            item = uint64(items[k * tile + w])
            logit = dot(u, load_row(item_table, item, width))
            if has_bias:
                logit += item_bias[item]
            x[k * tile + w] = logit


@njit(fastmath=FAST, **OPTIONS)
def bce_tile(x: Array, weight: Array, bce: Array, product: Array, begin: int, end: int) -> None:
    """Replace logits by the derivative of the loss, times the weights; write the tile's BCE.

    BCE is softplus(z) = max(z, 0) + log(1 + e**-|z|), with z = -x for the positive, and its derivative is
    sigmoid(z). The logarithms of a positive are taken at once, of the product of its 1 + e**-|z|. Row 0 of
    ``x`` is the positive's where ``begin`` is 0.
    """
    tile = uint64(TILE)
    for w in range(tile):
        bce[w] = float32(0)
        product[w] = float32(0)  # less 1
    if begin == uint64(0):
        for w in range(tile):
            x[w] = -x[w]
    for k in range(begin, end):
        for w in range(tile):
            z = x[k * tile + w]
            e = exp_negative(-abs(z))
            bce[w] += float32(0) if z < float32(0) else z
            product[w] += e + e * product[w]
            r = weight[w] / (float32(1) + e)
            x[k * tile + w] = e * r if z < float32(0) else r
    for w in range(tile):
        bce[w] += log1p_positive(product[w])
    if begin == uint64(0):
        for w in range(tile):
            x[w] = -x[w]


@njit(fastmath=FAST, **OPTIONS)
def gradient_tile(
    x: Array,
    items: Array,
    rows: Array,
    start: int,
    size: int,
    begin: int,
    end: int,
    weight: Array,
    parameters: Any,
    gradients: Any,
    user_l2: float,
    item_l2: float,
    width: int,
    has_bias: bool,
    has_l2: bool,
) -> None:
    """Add the gradients of rows begin .. end - 1, whose coefficients are in ``x``."""
    user_table, item_table, _ = parameters
    user_gradient, item_gradient, bias_gradient = gradients
    tile = uint64(TILE)
    for w in range(size):
        upcoming = uint64(rows[start + tile + w]) * uint64(width)
        prefetch(user_table, upcoming, width)
        prefetch(user_gradient, upcoming, width)
        if weight[w] == float32(0):
            continue
        row = uint64(rows[start + w])
        u = load_row(user_table, row, width)
        du = scaled(user_l2 if has_l2 and begin == uint64(0) else float32(0), u)
        for k in range(begin, end):
            item = uint64(items[k * tile + w])
            g = x[k * tile + w]
            v = load_row(item_table, item, width)
            dv = add_scaled(load_row(item_gradient, item, width), g, u)
            if has_l2:
                dv = add_scaled(dv, item_l2, v)
            store_row(item_gradient, item, dv)
            du = add_scaled(du, g, v)
            if has_bias:
                bias_gradient[item] += g
        # The old gradient comes last: nothing waits for it to arrive from memory.
        store_row(user_gradient, row, add_scaled(load_row(user_gradient, row, width), float32(1), du))


@njit(fastmath=FAST, **OPTIONS)
def add_batch(
    parameters: Any,
    gradients: Any,
    batch: Array,
    size: int,
    known: Any,
    sampling: Any,
    step: int,
    scales: Any,
    width: int,
    has_bias: bool,
    exclude: bool,
    exact: bool,
    has_l2: bool,
    gathered: bool,
) -> float:
    """Add the gradients of some positives; return the sum of their BCE as float64.

    Args:
        parameters: users (U * P,), items (I * P,), item bias (I,) or empty, float32.
        gradients: the same, or all empty for the BCE alone; no option of the compiler, so that training and
            the validation loss share the compiled code.
        batch: (3, size + 2 * TILE), uint32: positions in the batch, users, items. What lies beyond ``size``
            is ignored, but the users there are valid: they are prefetched.
        size: uint64: how many positives.
        known: bits, words, indptr and items of a `Membership`.
        sampling: N as int64, I as uint64, two words of the key as uint32.
        step: t as uint32.
        scales: float32: 1 / divisor, and the factors of the L2 gradient of a user's and of an item's row.
        width: of a `Variant`; this one and the next are literals.
        has_bias: the same.
        exclude: the same.
        exact: the same.
        has_l2: the same.
        gathered: whether row b of the user table belongs to position b of the batch, whoever the user is.
    """
    num_negatives, num_items, k0, k1 = sampling
    positions, users, positives = batch[0], batch[1], batch[2]
    rows = positions if gathered else users
    scale, user_l2, item_l2 = scales
    bits, words, indptr, _ = known
    tile = uint64(TILE)

    items = np.empty((_ROWS + 3) * TILE, dtype=np.uint32)
    hits = np.empty(_ROWS * TILE, dtype=np.uint32)
    drawn = np.empty(_ROWS * TILE, dtype=np.uint32)
    x = np.empty(_ROWS * TILE, dtype=np.float32)
    weight = np.empty(TILE, dtype=np.float32)
    bce = np.empty(TILE, dtype=np.float32)
    product = np.empty(TILE, dtype=np.float32)
    free = np.empty(TILE, dtype=np.uint32)

    for i in range(len(x)):
        x[i] = float32(0)
    loss = 0.0
    for start in range(uint64(0), size, tile):
        here = min(tile, size - start)
        for w in range(tile):
            weight[w] = scale if w < here else float32(0)
            items[w] = positives[start + w]
        if exclude:
            count_free(free, users, start, here, num_items, indptr)
            for w in range(here):
                if free[w] == uint32(0):
                    weight[w] = float32(0)

        first = uint64(0)
        while True:
            count = min(uint64(CHUNK), uint64(num_negatives) - first)
            begin = uint64(0) if first == uint64(0) else uint64(1)  # row 0 is the positive's
            end = uint64(1) + count
            draw_tile(items, positions, start, first, count, num_items, k0, k1, step)
            if exclude:
                redraw_touched(
                    items,
                    positions,
                    users,
                    free,
                    start,
                    here,
                    first,
                    count,
                    num_items,
                    k0,
                    k1,
                    step,
                    known,
                    exact,
                    hits,
                    drawn,
                )

            score_tile(
                x,
                items,
                users,
                rows,
                start,
                here,
                begin,
                end,
                parameters,
                bits,
                words,
                width,
                has_bias,
                exclude,
            )
            bce_tile(x, weight, bce, product, begin, end)
            for w in range(here):
                if weight[w] != float32(0):
                    loss += bce[w]
            if len(gradients[0]):
                gradient_tile(
                    x,
                    items,
                    rows,
                    start,
                    here,
                    begin,
                    end,
                    weight,
                    parameters,
                    gradients,
                    user_l2,
                    item_l2,
                    width,
                    has_bias,
                    has_l2,
                )
            first += uint64(CHUNK)
            if first >= uint64(num_negatives):
                break
    return loss


class Variant(NamedTuple):
    """What the compiled code is specialised for.

    Attributes:
        width: P, the padded width of a row.
        has_bias: whether items have a bias.
        exclude: whether negatives leave known positives out.
        exact: whether a bit of the membership is the answer already.
        has_l2: whether there is an L2 term.
    """

    width: int
    has_bias: bool
    exclude: bool
    exact: bool
    has_l2: bool


def variant_of(parameters: Tables, known_positives: KnownPositives | None, settings: LossSettings) -> Variant:
    """The variant that a step needs."""
    return Variant(
        parameters.users.shape[1],
        parameters.item_bias is not None,
        known_positives is not None,
        known_positives is None or membership_of(known_positives).exact,
        settings.l2 != 0,
    )


@njit(**OPTIONS)
def scales_of(size: int, num_negatives: int, pairs: int, l2: float) -> tuple[float, float, float]:
    """1 / divisor of a batch, and the L2 gradient's factors of a user's and an item's row, float32."""
    divisor = size * pairs
    return float32(1 / divisor), float32(2 * l2 / divisor), float32(4 * l2 / (1 + num_negatives) / divisor)


@lru_cache
def _compiled(variant: Variant, gathered: bool, sources: int = SOURCES) -> Any:
    width, has_bias, exclude, exact, has_l2 = variant

    def run(
        parameters: Any,
        gradients: Any,
        user_index: Array,
        item_index: Array,
        first_position: int,
        known: Any,
        sampling: Any,
        step: int,
        loss: Any,
    ) -> float:
        _ = sources
        size = uint64(len(user_index))
        batch = np.zeros((3, len(user_index) + 2 * TILE), dtype=np.uint32)
        for b in range(size):
            batch[0, b] = uint64(first_position) + b
            batch[1, b] = user_index[b]
            batch[2, b] = item_index[b]
        return add_batch(
            parameters,
            gradients,
            batch,
            size,
            known,
            sampling,
            step,
            scales_of(max(size, uint64(1)), sampling[0], loss[0], loss[1]),
            width,
            has_bias,
            exclude,
            exact,
            has_l2,
            gathered,
        )

    return entry_point(run)


def _run(
    parameters: Tables,
    gradients: Tables | None,
    batch: Interactions,
    known_positives: KnownPositives | None,
    settings: LossSettings,
    *,
    key: Key,
    step: int,
    first_position: int = 0,
    gathered: bool = False,
) -> float:
    run = _compiled(variant_of(parameters, known_positives, settings), gathered)
    loss: float = run(
        flat_arrays(parameters),
        (empty(np.float32),) * 3 if gradients is None else flat_arrays(gradients),
        batch.user_index.numpy(),
        batch.item_index.numpy(),
        first_position,
        known_arrays(known_positives),
        (settings.num_negatives, uint64(parameters.items.shape[0]), uint32(key[0]), uint32(key[1])),
        uint32(step),
        (settings.pairs, float(settings.l2)),
    )
    return loss


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
    """Add the gradients of a batch's loss; return the sum of its BCE part, float64. See the reference.

    With ``gathered`` the user table has a row for each positive of the batch, (B, P), and the users' indices
    say what negatives leave out, nothing else.
    """
    loss = _run(
        parameters, gradients, batch, known_positives, settings, key=key, step=step, gathered=gathered
    )
    return torch.tensor(loss, dtype=torch.float64)


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
    """The sum of only the BCE part, float64, without gradients. See the reference."""
    total = 0.0
    for first, part in batch.parts(_PART_ROWS):
        total += _run(
            parameters,
            None,
            part,
            known_positives,
            settings,
            key=key,
            step=step,
            first_position=first_position + first,
        )
    return torch.tensor(total, dtype=torch.float64)
