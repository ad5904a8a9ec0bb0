"""Reading vectors and scoring pairs, for the kernels of positives with negatives of their own."""

# Constants of a kernel are written in capitals, and arguments get their types when it is launched.
# ruff: noqa: N803
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from fasttower_kernels.similarity import LEAST_NORM

_LEAST_NORM = tl.constexpr(LEAST_NORM)


@triton.jit
def rows(index, live, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets of some rows in a table [R, BLOCK_D], int64, and which of their elements there are."""
    d = tl.arange(0, BLOCK_D)
    return index[:, None] * WIDTH + d[None, :], live[:, None] & (d < WIDTH)[None, :]


@triton.jit
def load_items(items_ptr, bias_ptr, item_index, live, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows of some items [R, BLOCK_D] in float32, and their biases [R]; 0 without biases."""
    offsets, mask = rows(item_index, live, WIDTH, BLOCK_D)
    item = tl.load(items_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + item_index, mask=live, other=0.0)
    return item, bias


@triton.jit
def inverse_norm(vectors):
    """1 / |v| of rows [R, BLOCK_D], a norm below LEAST_NORM counting as this; and 0 for those, else 1."""
    square = tl.sum(vectors * vectors, axis=1)
    large = square > _LEAST_NORM * _LEAST_NORM
    inverse = 1.0 / tl.where(large, tl.sqrt(square), _LEAST_NORM)
    return inverse, tl.where(large, 1.0, 0.0)


@triton.jit
def score(user, item, COSINE: tl.constexpr):
    """Inner products of users, as they are read, and raw items; with cosine also what normalises an item.

    Returns:
        [R]: the logit without bias, the inverse norm of the item, and whether gradients pass through it.
    """
    inverse, passes = 1.0, 1.0
    logit = tl.sum(user * item, axis=1)
    if COSINE:
        inverse, passes = inverse_norm(item)
        logit *= inverse
    return logit, inverse, passes


@triton.jit
def load_users(users_ptr, user_index, live, temperature, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Users' vectors [R, BLOCK_D] in float32, as they are read and raw; with cosine what normalises them.

    Returns:
        ``raw * inverse``, raw, inverse [R], which is 1 over norm and temperature, and whether gradients pass
        through the norm; where the temperature is None, raw twice, 1 and 1.
    """
    offsets, mask = rows(user_index, live, WIDTH, BLOCK_D)
    raw = tl.load(users_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    user = raw
    inverse, passes = 1.0, 1.0
    if temperature is not None:
        inverse, passes = inverse_norm(raw)
        inverse /= temperature
        user = inverse[:, None] * raw
    return user, raw, inverse, passes
