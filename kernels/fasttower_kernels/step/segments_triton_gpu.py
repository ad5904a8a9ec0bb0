"""Gradients of a batch's pairs in a fixed order: the deterministic mode of the fused kernel.

The occurrences of a row are brought together by a stable sort of their keys, and the sorted places are
taken in chunks of fixed length, one program each. Within its chunk a program sums the occurrences of each
row by a tree of a fixed shape. The part of a row's occurrences with the first of them is added to the row's
gradient, which no other chunk does. The other parts each begin a chunk; each is stored as its chunk's
partial sum, and a second kernel adds those of a row, again by trees of a fixed shape. So the result does not
depend on which program runs first, there are no floating-point atomics, and the grids are as large as the
batch says: the host waits for nothing.

Source: FBGEMM's sorted backward pass of its embedding tables, which splits long segments likewise.
"""

# Constants of a kernel are written in capitals, and arguments get their types when it is launched.
# ruff: noqa: N803
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttower_kernels.triton_launch import Launch

CHUNK = 16
"""Sorted places per program; a power of two."""

_WARP_ELEMENTS = 512  # of a tile of vectors, for each warp


@triton.jit(do_not_specialize=["count", "num_own", "terms", "pairs_per_other"])
def segments_kernel(
    sorted_keys_ptr,
    order_ptr,
    coefficients_ptr,
    others_ptr,
    other_vectors_ptr,
    own_vectors_ptr,
    gradients_ptr,
    bias_gradients_ptr,
    partials_ptr,
    bias_partials_ptr,
    count,
    num_own,
    terms,
    pairs_per_other,
    own_scale,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """For each row with occurrences: sum of coefficient * other vector, + own_scale * own vector each.

    Occurrence o has the pairs ``o * terms`` up to ``(o + 1) * terms``; the other vector of pair p is that of
    ``others[p // pairs_per_other]``.

    Args:
        sorted_keys_ptr: (count,), int32, ascending: the row of each occurrence; num_own and above is none.
        order_ptr: (count,), int64: the occurrence at each place of the sorted order.
        coefficients_ptr: (count * terms,), float32.
        others_ptr: int32.
        other_vectors_ptr: (any, WIDTH), float32 or bfloat16.
        own_vectors_ptr: (num_own, WIDTH), likewise.
        gradients_ptr: (num_own, WIDTH), float32, added to.
        bias_gradients_ptr: (num_own,), gets the sum of the coefficients; or None.
        partials_ptr: (chunks, WIDTH), float32: of a chunk that begins within a row's occurrences, gets the
            sum of those that it has of that row.
        bias_partials_ptr: (chunks,), likewise; None without bias gradients.
        count: occurrences.
        num_own: rows.
        terms: pairs per occurrence.
        pairs_per_other: consecutive pairs with the same other vector.
        own_scale: float32.
        WIDTH: the padded width of a row.
        BLOCK_D: the power of two from it.
        CHUNK: places per program.
    """
    chunk = tl.program_id(0).to(tl.int64)
    places = chunk * CHUNK + tl.arange(0, CHUNK)
    keys = tl.load(sorted_keys_ptr + places, mask=places < count, other=num_own)
    before = tl.load(sorted_keys_ptr + chunk * CHUNK - 1, mask=chunk > 0, other=-1)
    there = keys < num_own
    pair = tl.load(order_ptr + places, mask=there, other=0) * terms
    d = tl.arange(0, BLOCK_D)
    in_row = d < WIDTH
    slopes = tl.zeros((CHUNK,), dtype=tl.float32)
    vectors = tl.zeros((CHUNK, BLOCK_D), dtype=tl.float32)
    for term in range(terms):
        coefficient = tl.load(coefficients_ptr + pair + term, mask=there, other=0.0)
        other = tl.load(others_ptr + (pair + term) // pairs_per_other, mask=there, other=0).to(tl.int64)
        vectors += coefficient[:, None] * tl.load(
            other_vectors_ptr + other[:, None] * WIDTH + d[None, :],
            mask=there[:, None] & in_row[None, :],
            other=0.0,
        ).to(tl.float32)
        slopes += coefficient
    key = tl.min(keys, axis=0)
    while key < num_own:
        mine = keys == key
        offsets = key.to(tl.int64) * WIDTH + d
        own = tl.load(own_vectors_ptr + offsets, mask=in_row, other=0.0).to(tl.float32)
        gradient = tl.sum(tl.where(mine[:, None], vectors, 0.0), axis=0)
        gradient += own_scale * tl.sum(mine.to(tl.float32), axis=0) * own
        slope = tl.sum(tl.where(mine, slopes, 0.0), axis=0)
        if key == before:
            tl.store(partials_ptr + chunk * WIDTH + d, gradient, mask=in_row)
            if bias_gradients_ptr is not None:
                tl.store(bias_partials_ptr + chunk, slope)
        else:
            old = tl.load(gradients_ptr + offsets, mask=in_row, other=0.0)
            tl.store(gradients_ptr + offsets, old + gradient, mask=in_row)
            if bias_gradients_ptr is not None:
                tl.store(bias_gradients_ptr + key, tl.load(bias_gradients_ptr + key) + slope)
        key = tl.min(tl.where(keys > key, keys, num_own), axis=0)


@triton.jit(do_not_specialize=["count", "num_own"])
def partials_kernel(
    sorted_keys_ptr,
    gradients_ptr,
    bias_gradients_ptr,
    partials_ptr,
    bias_partials_ptr,
    count,
    num_own,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add the partial sums of `segments_kernel`, whose arguments these are, to their rows.

    The program of the first chunk that begins within a row's occurrences does it for all of them.
    """
    first = tl.program_id(0).to(tl.int64) + 1
    key = tl.load(sorted_keys_ptr + first * CHUNK)
    before = tl.load(sorted_keys_ptr + first * CHUNK - 1)
    # A row that has the place before the chunk before has partial sums there too.
    earlier = tl.load(sorted_keys_ptr + (first - 1) * CHUNK - 1, mask=first > 1, other=-1)
    if (key == before) & (key != earlier) & (key < num_own):
        d = tl.arange(0, BLOCK_D)
        in_row = d < WIDTH
        gradient = tl.zeros((BLOCK_D,), dtype=tl.float32)
        slope = 0.0
        more = 1
        while more > 0:
            chunks = first + tl.arange(0, CHUNK)
            places = chunks * CHUNK
            mine = tl.load(sorted_keys_ptr + places, mask=places < count, other=num_own) == key
            offsets = chunks[:, None] * WIDTH + d[None, :]
            sums = tl.load(partials_ptr + offsets, mask=mine[:, None] & in_row[None, :], other=0.0)
            gradient += tl.sum(sums, axis=0)
            if bias_gradients_ptr is not None:
                slope += tl.sum(tl.load(bias_partials_ptr + chunks, mask=mine, other=0.0), axis=0)
            more = tl.min(mine.to(tl.int32), axis=0)
            first += CHUNK
        offsets = key.to(tl.int64) * WIDTH + d
        old = tl.load(gradients_ptr + offsets, mask=in_row, other=0.0)
        tl.store(gradients_ptr + offsets, old + gradient, mask=in_row)
        if bias_gradients_ptr is not None:
            tl.store(bias_gradients_ptr + key, tl.load(bias_gradients_ptr + key) + slope)


def reduce_pairs(
    *,
    keys: Tensor,
    coefficients: Tensor,
    terms: int,
    others: Tensor,
    pairs_per_other: int,
    other_vectors: Tensor,
    own_vectors: Tensor,
    gradients: Tensor,
    bias_gradients: Tensor | None,
    own_scale: float,
) -> None:
    """Sort the keys (count,) and launch the two kernels; the arguments are those of `segments_kernel`."""
    sorted_keys, order = torch.sort(keys, stable=True)
    for launch in segments_launches(
        sorted_keys,
        order,
        coefficients=coefficients,
        terms=terms,
        others=others,
        pairs_per_other=pairs_per_other,
        other_vectors=other_vectors,
        own_vectors=own_vectors,
        gradients=gradients,
        bias_gradients=bias_gradients,
        own_scale=own_scale,
    ):
        launch()


def segments_launches(
    sorted_keys: Tensor,
    order: Tensor,
    *,
    coefficients: Tensor,
    terms: int,
    others: Tensor,
    pairs_per_other: int,
    other_vectors: Tensor,
    own_vectors: Tensor,
    gradients: Tensor,
    bias_gradients: Tensor | None,
    own_scale: float,
) -> list[Launch]:
    """`segments_kernel` with its arguments, and `partials_kernel` where there are chunks for it."""
    num_own, width = own_vectors.shape
    block_d = triton.next_power_of_2(width)
    num_warps = max(1, CHUNK * block_d // _WARP_ELEMENTS)
    chunks = triton.cdiv(len(sorted_keys), CHUNK)
    shared = {
        "sorted_keys_ptr": sorted_keys,
        "gradients_ptr": gradients,
        "bias_gradients_ptr": bias_gradients,
        "partials_ptr": gradients.new_empty(chunks, width),
        "bias_partials_ptr": None if bias_gradients is None else gradients.new_empty(chunks),
        "count": len(sorted_keys),
        "num_own": num_own,
        "WIDTH": width,
        "BLOCK_D": block_d,
        "CHUNK": CHUNK,
    }
    segments = Launch(
        segments_kernel,
        chunks,
        shared
        | {
            "order_ptr": order,
            "coefficients_ptr": coefficients,
            "others_ptr": others,
            "other_vectors_ptr": other_vectors,
            "own_vectors_ptr": own_vectors,
            "terms": terms,
            "pairs_per_other": pairs_per_other,
            "own_scale": own_scale,
        },
        num_warps,
    )
    return [segments, Launch(partials_kernel, chunks - 1, shared, num_warps)][: min(chunks, 2)]
