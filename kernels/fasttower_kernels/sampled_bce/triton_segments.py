"""Gradients of a batch's pairs in a fixed order: the deterministic mode of the fused kernel.

The occurrences of a row are brought together by a stable sort of their keys. The program at the first of
them walks to the last, in blocks whose sums are trees of a fixed shape, and adds to the row once. So the
result does not depend on which program runs first, and there are no floating-point atomics.
"""

# Constants of a kernel are written in capitals, and arguments get their types when it is launched.
# ruff: noqa: ANN001, ANN201, N803
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttower_kernels.triton_launch import Launch

_BLOCK_ELEMENTS = 1024  # of the vectors that a program sums at once


@triton.jit(do_not_specialize=["count", "num_own", "terms", "pairs_an_other"])
def segments_kernel(
    sorted_keys_ptr,
    order_ptr,
    coefficients_ptr,
    others_ptr,
    other_vectors_ptr,
    own_vectors_ptr,
    gradients_ptr,
    bias_gradients_ptr,
    count,
    num_own,
    terms,
    pairs_an_other,
    own_scale,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add to each row that has occurrences: sum of coefficient * other vector, + own_scale * own vector each.

    Occurrence o has the pairs ``o * terms`` up to ``(o + 1) * terms``; the other vector of pair p is that of
    ``others[p // pairs_an_other]``.

    Args:
        sorted_keys_ptr: (count,), int32, ascending: the row of each occurrence; num_own and above is none.
        order_ptr: (count,), int64: the occurrence at each place of the sorted order.
        coefficients_ptr: (count * terms,), float32.
        others_ptr: int32.
        other_vectors_ptr: (any, WIDTH), float32 or bfloat16.
        own_vectors_ptr: (num_own, WIDTH), likewise.
        gradients_ptr: (num_own, WIDTH), float32, added to.
        bias_gradients_ptr: (num_own,), gets the sum of the coefficients; or None.
        count: occurrences.
        num_own: rows.
        terms: pairs an occurrence.
        pairs_an_other: consecutive pairs with the same other vector.
        own_scale: float32.
        WIDTH: the padded width of a row.
        BLOCK_D: the power of two from it.
        BLOCK: occurrences at once.
    """
    first = tl.program_id(0).to(tl.int64)
    key = tl.load(sorted_keys_ptr + first)
    before = tl.load(sorted_keys_ptr + first - 1, mask=first > 0, other=-1)
    if (key != before) & (key < num_own):
        d = tl.arange(0, BLOCK_D)
        in_row = d < WIDTH
        gradient = tl.zeros((BLOCK_D,), dtype=tl.float32)
        bias_gradient = 0.0
        occurrences = 0
        place = first
        more = 1
        while more > 0:
            places = place + tl.arange(0, BLOCK)
            mine = tl.load(sorted_keys_ptr + places, mask=places < count, other=-1) == key
            pair = tl.load(order_ptr + places, mask=mine, other=0) * terms
            block = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
            for term in range(terms):
                coefficient = tl.load(coefficients_ptr + pair + term, mask=mine, other=0.0)
                other = tl.load(others_ptr + (pair + term) // pairs_an_other, mask=mine, other=0).to(tl.int64)
                vectors = tl.load(
                    other_vectors_ptr + other[:, None] * WIDTH + d[None, :],
                    mask=mine[:, None] & in_row[None, :],
                    other=0.0,
                ).to(tl.float32)
                block += coefficient[:, None] * vectors
                if bias_gradients_ptr is not None:
                    bias_gradient += tl.sum(coefficient, axis=0)
            gradient += tl.sum(block, axis=0)
            found = tl.sum(mine.to(tl.int32), axis=0)
            occurrences += found
            place += BLOCK
            more = (found == BLOCK).to(tl.int32)
        offsets = key.to(tl.int64) * WIDTH + d
        own = tl.load(own_vectors_ptr + offsets, mask=in_row, other=0.0).to(tl.float32)
        gradient += own_scale * (occurrences * 1.0) * own
        tl.store(
            gradients_ptr + offsets,
            tl.load(gradients_ptr + offsets, mask=in_row, other=0.0) + gradient,
            mask=in_row,
        )
        if bias_gradients_ptr is not None:
            tl.store(bias_gradients_ptr + key, tl.load(bias_gradients_ptr + key) + bias_gradient)


def reduce_pairs(
    *,
    keys: Tensor,
    coefficients: Tensor,
    terms: int,
    others: Tensor,
    pairs_an_other: int,
    other_vectors: Tensor,
    own_vectors: Tensor,
    gradients: Tensor,
    bias_gradients: Tensor | None,
    own_scale: float,
) -> None:
    """Sort the keys (count,) and launch `segments_kernel`, whose arguments these are."""
    sorted_keys, order = torch.sort(keys, stable=True)
    segments_launch(
        sorted_keys,
        order,
        coefficients=coefficients,
        terms=terms,
        others=others,
        pairs_an_other=pairs_an_other,
        other_vectors=other_vectors,
        own_vectors=own_vectors,
        gradients=gradients,
        bias_gradients=bias_gradients,
        own_scale=own_scale,
    )()


def segments_launch(
    sorted_keys: Tensor,
    order: Tensor,
    *,
    coefficients: Tensor,
    terms: int,
    others: Tensor,
    pairs_an_other: int,
    other_vectors: Tensor,
    own_vectors: Tensor,
    gradients: Tensor,
    bias_gradients: Tensor | None,
    own_scale: float,
) -> Launch:
    """`segments_kernel` with its arguments."""
    num_own, width = own_vectors.shape
    block_d = triton.next_power_of_2(width)
    return Launch(
        segments_kernel,
        len(sorted_keys),
        {
            "sorted_keys_ptr": sorted_keys,
            "order_ptr": order,
            "coefficients_ptr": coefficients,
            "others_ptr": others,
            "other_vectors_ptr": other_vectors,
            "own_vectors_ptr": own_vectors,
            "gradients_ptr": gradients,
            "bias_gradients_ptr": bias_gradients,
            "count": len(sorted_keys),
            "num_own": num_own,
            "terms": terms,
            "pairs_an_other": pairs_an_other,
            "own_scale": own_scale,
            "WIDTH": width,
            "BLOCK_D": block_d,
            "BLOCK": max(1, _BLOCK_ELEMENTS // block_d),
        },
        num_warps=4,
    )
