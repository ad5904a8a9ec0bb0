"""Logits and gradients of a tile of positives and their items, by a similarity whose name is a literal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fasttower_kernels.compiled import FAST, OPTIONS, Array, chosen, float32, njit, uint64
from fasttower_kernels.losses.numba_cpu import TILE
from fasttower_kernels.negatives.numba_cpu import fetch_bits
from fasttower_kernels.similarity_numba_cpu import inverse_norm, is_least, through_norm
from fasttower_kernels.vector_rows import add_scaled, dot, load_row, prefetch, scaled, store_row

_OPTIONS = OPTIONS | {"fastmath": FAST}


def score_tile(similarity: str) -> Callable[..., None]:
    """Of a literal name, to write the logits of rows begin .. end - 1 of ``items`` to ``x``.

    They go to the same places. Its arguments are those of `_score_by_dot`.
    """
    raise NotImplementedError  # compiled code only


def gradient_tile(similarity: str) -> Callable[..., None]:
    """Of a literal name, to add the gradients of rows begin .. end - 1, whose slopes are in ``x``.

    With row 0 comes the user's L2. Its arguments are those of `_gradient_by_dot`.
    """
    raise NotImplementedError  # compiled code only


class Ahead(NamedTuple):
    """The draws to come, whose bits are fetched while a tile is scored.

    Attributes:
        draws: the next ones, a `TileDraws`.
        size: how many of each positive, uint64.
        users: (B,) and room, uint32, from the tile after theirs on.
        known: the membership.
    """

    draws: Any
    size: int
    users: Array
    known: Any


@njit(**_OPTIONS)
def _prefetch_item(item_table: Array, item: int, width: int) -> None:
    if width > 16:  # rows of one cache line come as quickly as they are asked for
        prefetch(item_table, item * uint64(width), width)


@njit(**_OPTIONS)
def _score_by_dot(
    x: Array,
    norms: Array,
    items: Array,
    ahead: Any,
    rows: Array,
    start: int,
    size: int,
    begin: int,
    end: int,
    parameters: Any,
    temperature: float,
    width: int,
    has_bias: bool,
    exclude: bool,
    exact: bool,
) -> None:
    """Logits by dot product.

    In between it asks for the item rows two positives ahead, and for the bits of the draws to come.

    Args:
        x: (rows * TILE,), float32.
        norms: (2 * rows * TILE,), float32: with cosine, for each logit the inverse norm of its item, and in
            the second half the logit without its bias; else empty.
        items: (rows * TILE,), uint32.
        ahead: an `Ahead`.
        rows: (B,), uint32: of the user table.
        start: uint64: where the tile begins in it.
        size: uint64: positives in the tile.
        begin: uint64.
        end: uint64.
        parameters: users (U * P,), items (I * P,), item bias (I,) or empty, float32.
        temperature: of cosine similarity, float32.
        width: of a row, a literal; the next ones too.
        has_bias: whether items have a bias.
        exclude: whether negatives leave known positives out.
        exact: whether all rows of the membership are bitmaps.
    """
    user_table, item_table, item_bias = parameters
    tile = uint64(TILE)
    coming, coming_count, coming_users, known = ahead
    starts = known.starts
    for w in range(size):
        if exclude:
            fetch_bits(coming, w, coming_count, known, exact)
            # Where the bits of the draws after those are.
            prefetch(starts, uint64(2) * uint64(coming_users[w]), 4)
        u = load_row(user_table, uint64(rows[start + w]), width)
        soon = min(w + uint64(2), tile - uint64(1))
        for k in range(begin, end):
            _prefetch_item(item_table, uint64(items[k * tile + soon]), width)
            item = uint64(items[k * tile + w])
            logit = dot(u, load_row(item_table, item, width))
            if has_bias:
                logit += item_bias[item]
            x[k * tile + w] = logit


@njit(**_OPTIONS)
def _score_by_cosine(
    x: Array,
    norms: Array,
    items: Array,
    ahead: Any,
    rows: Array,
    start: int,
    size: int,
    begin: int,
    end: int,
    parameters: Any,
    temperature: float,
    width: int,
    has_bias: bool,
    exclude: bool,
    exact: bool,
) -> None:
    user_table, item_table, item_bias = parameters
    tile = uint64(TILE)
    half = uint64(len(norms) // 2)
    coming, coming_count, coming_users, known = ahead
    starts = known.starts
    for w in range(size):
        if exclude:
            fetch_bits(coming, w, coming_count, known, exact)
            # Where the bits of the draws after those are.
            prefetch(starts, uint64(2) * uint64(coming_users[w]), 4)
        u = load_row(user_table, uint64(rows[start + w]), width)
        u = scaled(inverse_norm(u) / temperature, u)
        soon = min(w + uint64(2), tile - uint64(1))
        for k in range(begin, end):
            slot = k * tile + w
            _prefetch_item(item_table, uint64(items[k * tile + soon]), width)
            item = uint64(items[slot])
            v = load_row(item_table, item, width)
            inverse = inverse_norm(v)
            logit = inverse * dot(u, v)
            norms[slot] = inverse
            norms[half + slot] = logit
            x[slot] = logit + item_bias[item] if has_bias else logit


@njit(**_OPTIONS)
def _prefetch_user(user_table: Array, user_gradient: Array, row: int, width: int) -> None:
    prefetch(user_table, row * uint64(width), width)
    prefetch(user_gradient, row * uint64(width), width)


@njit(**_OPTIONS)
def _add_bias_l2(
    items: Array, w: int, begin: int, end: int, item_bias: Array, bias_gradient: Array, l2: float
) -> None:
    for k in range(begin, end):
        item = uint64(items[k * uint64(TILE) + w])
        bias_gradient[item] += l2 * item_bias[item]


@njit(**_OPTIONS)
def _gradient_by_dot(
    x: Array,
    norms: Array,
    items: Array,
    rows: Array,
    start: int,
    size: int,
    begin: int,
    end: int,
    weight: Array,
    parameters: Any,
    gradients: Any,
    scales: Any,
    temperature: float,
    width: int,
    has_bias: bool,
    has_l2: bool,
) -> None:
    """Gradients of logits by dot product.

    Args:
        x: as in `_score_by_dot`, like all that has its name: now the slopes.
        norms: as it left them.
        items: of the slopes.
        rows: (B + TILE,), uint32: the users of the next tile are fetched.
        start: of the tile.
        size: of the tile.
        begin: uint64.
        end: uint64.
        weight: (TILE,), float32: 0 where the positive adds nothing.
        parameters: as in `_score_by_dot`.
        gradients: of the same shapes.
        scales: of `scales_of`.
        temperature: of cosine similarity.
        width: of a row.
        has_bias: whether items have a bias.
        has_l2: whether there is an L2 term, a literal.
    """
    user_table, item_table, item_bias = parameters
    user_gradient, item_gradient, bias_gradient = gradients
    tile = uint64(TILE)
    for w in range(size):
        _prefetch_user(user_table, user_gradient, uint64(rows[start + tile + w]), width)
        if weight[w] == float32(0):
            continue
        row = uint64(rows[start + w])
        u = load_row(user_table, row, width)
        du = scaled(scales.user_l2 if has_l2 and begin == uint64(0) else float32(0), u)
        for k in range(begin, end):
            item = uint64(items[k * tile + w])
            g = x[k * tile + w]
            v = load_row(item_table, item, width)
            dv = add_scaled(load_row(item_gradient, item, width), g, u)
            if has_l2:
                dv = add_scaled(dv, scales.item_l2, v)
            store_row(item_gradient, item, dv)
            du = add_scaled(du, g, v)
            if has_bias:
                bias_gradient[item] += g
        if has_bias and has_l2 and scales.bias_l2 != float32(0):
            _add_bias_l2(items, w, begin, end, item_bias, bias_gradient, scales.bias_l2)
        # The old gradient comes last: nothing waits for it to arrive from memory.
        store_row(user_gradient, row, add_scaled(load_row(user_gradient, row, width), float32(1), du))


@njit(**_OPTIONS)
def _gradient_by_cosine(
    x: Array,
    norms: Array,
    items: Array,
    rows: Array,
    start: int,
    size: int,
    begin: int,
    end: int,
    weight: Array,
    parameters: Any,
    gradients: Any,
    scales: Any,
    temperature: float,
    width: int,
    has_bias: bool,
    has_l2: bool,
) -> None:
    user_table, item_table, item_bias = parameters
    user_gradient, item_gradient, bias_gradient = gradients
    tile = uint64(TILE)
    half = uint64(len(norms) // 2)
    for w in range(size):
        _prefetch_user(user_table, user_gradient, uint64(rows[start + tile + w]), width)
        if weight[w] == float32(0):
            continue
        row = uint64(rows[start + w])
        u = load_row(user_table, row, width)
        of_user = inverse_norm(u)
        read = scaled(of_user / temperature, u)
        du = scaled(float32(0), u)  # of what is read
        for k in range(begin, end):
            slot = k * tile + w
            item = uint64(items[slot])
            g, inverse, logit = x[slot], norms[slot], norms[half + slot]
            v = load_row(item_table, item, width)
            # ``r (g u - <g u, v r> v r)``, with <u, v r> the logit; a norm that is too small stands still.
            along = float32(0) if is_least(inverse) else -g * logit * inverse * inverse
            dv = add_scaled(load_row(item_gradient, item, width), g * inverse, read)
            dv = add_scaled(dv, along + scales.item_l2 if has_l2 else along, v)
            store_row(item_gradient, item, dv)
            du = add_scaled(du, g * inverse, v)
            if has_bias:
                bias_gradient[item] += g
        if has_bias and has_l2 and scales.bias_l2 != float32(0):
            _add_bias_l2(items, w, begin, end, item_bias, bias_gradient, scales.bias_l2)
        du = through_norm(du, read, of_user, temperature)
        if has_l2 and begin == uint64(0):
            du = add_scaled(du, scales.user_l2, u)
        store_row(user_gradient, row, add_scaled(load_row(user_gradient, row, width), float32(1), du))


chosen(score_tile, {"dot": _score_by_dot, "cosine": _score_by_cosine}.__getitem__)
chosen(gradient_tile, {"dot": _gradient_by_dot, "cosine": _gradient_by_cosine}.__getitem__)
