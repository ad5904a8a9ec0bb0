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
    int32,
    njit,
    uint32,
    uint64,
)
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives.membership_numba_cpu import Membership, membership_of
from fasttower_kernels.negatives.numba_cpu import (
    TILE,
    TileDraws,
    draw_ahead,
    fetch_bits,
    look_up,
    redraw_touched,
    tile_draws,
)
from fasttower_kernels.philox import Key
from fasttower_kernels.sampled_bce.settings import LossSettings
from fasttower_kernels.tables import Interactions, Tables
from fasttower_kernels.vector_rows import (
    add_scaled,
    bits_of_float,
    dot,
    float_of_bits,
    load_row,
    prefetch,
    scaled,
    store_row,
)

CHUNK = 32
"""Negatives of a positive that are handled together, a multiple of 4."""

_ROWS = 1 + CHUNK


@njit(fastmath={"contract", "nsz"}, **OPTIONS)
def exp_negative(x: float) -> float:
    """e**x for float32 x <= 0, to 1 ulp or so; Cephes' expf. NaN stays NaN."""
    x = float32(-87.0) if x < float32(-87.0) else x
    # Adding 1.5 * 2**23 rounds to a whole number and leaves it in the low bits.
    shifted = x * float32(1.44269504) + float32(12582912.0)
    z = shifted - float32(12582912.0)
    x = x - z * float32(0.693359375) + z * float32(2.12194440e-4)
    p = float32(1.9875691500e-4)
    p = p * x + float32(1.3981999507e-3)
    p = p * x + float32(8.3334519073e-3)
    p = p * x + float32(4.1665795894e-2)
    p = p * x + float32(1.6666665459e-1)
    p = p * x + float32(5.0000001201e-1)
    p = p * x * x + x + float32(1)
    return p * float_of_bits((bits_of_float(shifted) + int32(127)) << int32(23))


@njit(fastmath={"contract", "nsz"}, **OPTIONS)
def log1p_positive(x: float) -> float:
    """log(1 + x) for float32 x in [0, 2**100], to 2 ulp or so; Cephes' logf. NaN stays NaN."""
    y = float32(1) + x
    lost = (x - (y - float32(1))) / y  # what rounding took from 1 + x
    bits = bits_of_float(y)
    exponent = (bits - int32(0x3F3504F3)) >> int32(23)
    m = float_of_bits(bits - (exponent << int32(23))) - float32(1)  # in [sqrt(1/2) - 1, sqrt(2) - 1]
    e = float32(exponent)
    p = float32(7.0376836292e-2)
    p = p * m + float32(-1.1514610310e-1)
    p = p * m + float32(1.1676998740e-1)
    p = p * m + float32(-1.2420140846e-1)
    p = p * m + float32(1.4249322787e-1)
    p = p * m + float32(-1.6668057665e-1)
    p = p * m + float32(2.0000714765e-1)
    p = p * m + float32(-2.4999993993e-1)
    p = p * m + float32(3.3333331174e-1)
    square = m * m
    p = p * m * square + e * float32(-2.12194440e-4) - float32(0.5) * square
    return lost + p + m + e * float32(0.693359375)


@njit(fastmath=FAST, **OPTIONS)
def score_tile(
    x: Array,
    items: Array,
    ahead: TileDraws,
    ahead_count: int,
    users: Array,
    rows: Array,
    start: int,
    size: int,
    begin: int,
    end: int,
    parameters: Any,
    known: Membership,
    width: int,
    has_bias: bool,
    exclude: bool,
    exact: bool,
) -> None:
    """Write the logits of rows begin .. end - 1 of ``items`` to the same places of ``x``.

    In between it asks for the bits of the draws to come.
    """
    user_table, item_table, item_bias = parameters
    tile = uint64(TILE)
    for w in range(size):
        if exclude:
            fetch_bits(ahead, w, ahead_count, known, exact)
            # Where the bits of the draws after those are.
            prefetch(known.starts, uint64(2) * uint64(users[start + uint64(2) * tile + w]), 4)
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
    known: Membership,
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
        known: the membership.
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
    num_negatives = uint64(sampling[0])
    positions, users, positives = batch[0], batch[1], batch[2]
    rows = positions if gathered else users
    scale, user_l2, item_l2 = scales
    tile, chunk = uint64(TILE), uint64(CHUNK)

    draws, ahead = tile_draws(CHUNK), tile_draws(CHUNK)
    hits = np.empty(_ROWS * TILE, dtype=np.uint32)
    words = np.empty(_ROWS * TILE, dtype=np.uint32)
    x = np.empty(_ROWS * TILE, dtype=np.float32)
    weight = np.empty(TILE, dtype=np.float32)
    bce = np.empty(TILE, dtype=np.float32)
    product = np.empty(TILE, dtype=np.float32)

    for i in range(len(x)):
        x[i] = float32(0)
    loss = 0.0
    # The chunk of a tile that begins at (start, first) is computed, and the next one's negatives are drawn.
    start, first, count = uint64(0), uint64(0), min(chunk, num_negatives)
    found = uint64(0)
    if size:
        draw_ahead(ahead, positions, users, start, first, count, sampling, step, known, exclude, exact)
        found = look_up(
            ahead,
            hits,
            words,
            positions,
            users,
            start,
            min(tile, size),
            first,
            count,
            sampling,
            step,
            known,
            exclude,
            exact,
        )
    while start < size:
        draws, ahead = ahead, draws
        items = draws.items
        here = min(tile, size - start)
        begin = uint64(0) if first == uint64(0) else uint64(1)  # row 0 is the positive's
        end = uint64(1) + count
        if first == uint64(0):
            for w in range(tile):
                has_negatives = not exclude or draws.free[w] != uint32(0)
                weight[w] = scale if w < here and has_negatives else float32(0)
                items[w] = positives[start + w]
        redraw_touched(
            draws, hits, found, words, positions, users, start, first, sampling, step, known, exact
        )

        next_start, next_first = start, first + chunk
        if next_first >= num_negatives:
            next_start, next_first = start + tile, uint64(0)
        next_count = uint64(0)
        if next_start < size:
            next_count = min(chunk, num_negatives - next_first)
            draw_ahead(
                ahead,
                positions,
                users,
                next_start,
                next_first,
                next_count,
                sampling,
                step,
                known,
                exclude,
                exact,
            )

        score_tile(
            x,
            items,
            ahead,
            next_count,
            users,
            rows,
            start,
            here,
            begin,
            end,
            parameters,
            known,
            width,
            has_bias,
            exclude,
            exact,
        )
        bce_tile(x, weight, bce, product, begin, end)
        for w in range(here):
            if weight[w] != float32(0):
                loss += bce[w]
        if next_start < size:
            next_size = min(tile, size - next_start)
            found = look_up(
                ahead,
                hits,
                words,
                positions,
                users,
                next_start,
                next_size,
                next_first,
                next_count,
                sampling,
                step,
                known,
                exclude,
                exact,
            )
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
        start, first, count = next_start, next_first, next_count
    return loss


class Variant(NamedTuple):
    """What the compiled code is specialised for.

    Attributes:
        width: P, the padded width of a row.
        has_bias: whether items have a bias.
        exclude: whether negatives leave known positives out.
        exact: whether all rows of the membership are bitmaps.
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
        membership_of(known_positives)[1],
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
        known: Membership,
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
) -> Tensor:
    run = _compiled(variant_of(parameters, known_positives, settings), gathered)
    loss = run(
        flat_arrays(parameters),
        (empty(np.float32),) * 3 if gradients is None else flat_arrays(gradients),
        batch.user_index.numpy(),
        batch.item_index.numpy(),
        first_position,
        membership_of(known_positives)[0],
        (settings.num_negatives, uint64(parameters.items.shape[0]), uint32(key[0]), uint32(key[1])),
        uint32(step),
        (settings.pairs, float(settings.l2)),
    )
    return torch.tensor(loss, dtype=torch.float64)


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
    return _run(
        parameters, gradients, batch, known_positives, settings, key=key, step=step, gathered=gathered
    )


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
    """The sum of the BCE part alone, float64, without gradients. See the reference."""
    return _run(
        parameters,
        None,
        batch,
        known_positives,
        settings,
        key=key,
        step=step,
        first_position=first_position,
    )
