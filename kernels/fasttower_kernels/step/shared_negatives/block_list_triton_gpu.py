"""The lists of a batch's blocks in Triton: which items, and for whom each of them counts.

Two small launches make what the matrix products read. `draw_kernel` writes the batch's rows, in the order of
the epoch, and the list of each block. `mask_kernel` writes a bit for each pair of a positive and an item of
its list: whether the item is a negative of it. A bit, for logits take 32 times as much and are never stored;
both kernels of the products read the bits, so that a pair is looked up once.

Looking up: with the users x items bitmap a pair reads one word of its user's row. With a list of 512 of 27
thousand items nearly every 32-byte sector of the row is read, each once from memory, so a positive costs its
row (3.3 KB), which the matrix products of 512 items outweigh. Without a bitmap a pair searches the user's
sorted items, log2(degree) loads. Walking the user's items instead, each searched in the block's sorted list,
takes degree * log2(M) loads where this takes M * log2(degree): as many where a list is as long as a user's
row, and it would need a sort for each block. This is arithmetic, not a measurement.
"""

# Constants of a kernel are written in capitals, and arguments get their types when it is launched.
# ruff: noqa: N803
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttower_kernels.similarity_triton_gpu import inverse_norm
from fasttower_kernels.step.batch_triton_gpu import batch_positives

WORD = 64
"""Items of a list whose bits are one int64."""

_WORD = tl.constexpr(WORD)


class BlockLists(NamedTuple):
    """What the launches of a step hand each other, C blocks of b positions with lists of L words.

    Attributes:
        users: (B,), int32.
        positives: (B,), int32: the items.
        items: (C, L * 64), int32: the lists; what lies beyond the end of a list is some item.
        masks: (C, L, b), int64: bit ``m % 64`` of word ``m // 64`` says that item m of the list is a negative
            of the positive.
        offsets: (C, L * 64), float32: what a logit with the item gets: its bias, less log q for a loss that
            reads it. None for nothing.
        inverse_norms: (C, L * 64), float32: of the items; None for the dot product.
        user_inverse_norms: (B,), float32: over the temperature; likewise.
        logits: (B,), float32: of the positives.
        normalisers: (B,), float32: z of the loss.
    """

    users: Tensor
    positives: Tensor
    items: Tensor
    masks: Tensor
    offsets: Tensor | None
    inverse_norms: Tensor | None
    user_inverse_norms: Tensor | None
    logits: Tensor
    normalisers: Tensor

    @staticmethod
    def empty(
        batch_size: int, block_size: int, scored: int, device: torch.device, *, offsets: bool, cosine: bool
    ) -> BlockLists:
        """Buffers of a batch for lists of at most ``scored`` items."""
        blocks, words = triton.cdiv(batch_size, block_size), max(1, triton.cdiv(scored, WORD))

        def floats(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        return BlockLists(
            torch.empty(batch_size, dtype=torch.int32, device=device),
            torch.empty(batch_size, dtype=torch.int32, device=device),
            torch.zeros((blocks, words * WORD), dtype=torch.int32, device=device),
            torch.empty((blocks, words, block_size), dtype=torch.int64, device=device),
            floats(blocks, words * WORD) if offsets else None,
            floats(blocks, words * WORD) if cosine else None,
            floats(batch_size) if cosine else None,
            floats(batch_size),
            floats(batch_size),
        )


@triton.jit
def block_extent(
    block,
    step,
    num_rows,
    batch_size,
    steps,
    block_size,
    drawn,
    SHUFFLE: tl.constexpr,
    IN_BATCH: tl.constexpr,
):
    """The length of a batch, the positives of one of its blocks, maybe none, and the items of its list."""
    begin = 0
    if SHUFFLE:
        begin = (step.to(tl.uint32) % steps.to(tl.uint32)).to(tl.int32) * batch_size
    length = tl.minimum(batch_size, num_rows - begin)
    here = tl.maximum(tl.minimum(block_size, length - block * block_size), 0)
    count = drawn
    if IN_BATCH:
        count = drawn + here
    return length, here, tl.where(here > 0, count, 0)


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "batch_size",
        "steps",
        "bits",
        "first_block",
        "num_blocks",
        "block_size",
        "num_items",
        "drawn",
        "list_words",
    ]
)
def draw_kernel(
    user_index_ptr,
    item_index_ptr,
    words_ptr,
    counters_ptr,
    users_ptr,
    positives_ptr,
    list_ptr,
    num_rows,
    batch_size,
    steps,
    bits,
    first_block,
    num_blocks,
    block_size,
    num_items,
    drawn,
    list_words,
    SHUFFLE: tl.constexpr,
    IN_BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rows of a batch and the lists of its blocks.

    Args:
        user_index_ptr: (n,), int32.
        item_index_ptr: (n,), int32.
        words_ptr: (10,), int32: the key of the lists, and the 8 round keys of the order.
        counters_ptr: (2,), int64: t, which is read, and Adam's count, which is set to t + 1.
        users_ptr: as in `BlockLists`, like the next two; written.
        positives_ptr: the same.
        list_ptr: the same.
        num_rows: n.
        batch_size: B.
        steps: ceil(n / B).
        bits: of the shuffle.
        first_block: number of the block at position 0.
        num_blocks: C.
        block_size: b.
        num_items: I.
        drawn: items that are drawn for a list, its first ones.
        list_words: L.
        SHUFFLE: the batch is number t mod steps of the shuffled order; otherwise the rows are the batch.
        IN_BATCH: the block's own items follow those that are drawn.
        BLOCK: positions of a program, and quads of drawn items.
    """
    program = tl.program_id(0)
    step = tl.load(counters_ptr)
    b, there, _, user, item = batch_positives(
        program,
        step,
        user_index_ptr,
        item_index_ptr,
        words_ptr,
        num_rows,
        batch_size,
        steps,
        bits,
        BLOCK,
        SHUFFLE,
    )
    tl.store(users_ptr + b, user.to(tl.int32), mask=there)
    tl.store(positives_ptr + b, item.to(tl.int32), mask=there)
    if IN_BATCH:
        block = b // block_size
        place = block.to(tl.int64) * (list_words * _WORD) + (drawn + b - block * block_size)
        tl.store(list_ptr + place, item.to(tl.int32), mask=there)

    key_0 = tl.load(words_ptr).to(tl.uint32, bitcast=True)
    key_1 = tl.load(words_ptr + 1).to(tl.uint32, bitcast=True)
    index = program * BLOCK + tl.arange(0, BLOCK)
    quads = tl.maximum((drawn + 3) // 4, 1)
    block = index // quads
    quad = index - block * quads
    number = (block + first_block).to(tl.uint32)
    zero = number * 0
    words = tl.philox_impl(number, quad.to(tl.uint32), zero + step.to(tl.uint32), zero, key_0, key_1)
    catalogue = (index * 0 + num_items).to(tl.uint32)
    for lane in tl.static_range(4):
        m = quad * 4 + lane
        place = block.to(tl.int64) * (list_words * _WORD) + m
        drawn_item = tl.umulhi(words[lane], catalogue).to(tl.int32)
        tl.store(list_ptr + place, drawn_item, mask=(block < num_blocks) & (m < drawn))
    if program == 0:
        tl.store(counters_ptr + 1, step + 1)


@triton.jit
def _found(row_ptr, degree, item, wanted):
    """Which wanted items [R, M] are in the sorted rows at ``row_ptr`` [R, 1], of ``degree`` [R, 1] items."""
    low = item * 0
    high = tl.where(wanted, low + degree, 0)
    unfinished = tl.max(tl.max(high, axis=1), axis=0)
    while unfinished > 0:
        middle = low + ((high - low) >> 1)
        active = low < high
        value = tl.load(row_ptr + middle, mask=active, other=0)
        low = tl.where(active & (value < item), middle + 1, low)
        high = tl.where(active & (value >= item), middle, high)
        unfinished = tl.max(tl.max((low < high).to(tl.int32), axis=1), axis=0)
    return tl.load(row_ptr + low, mask=wanted & (low < degree), other=-1) == item


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "batch_size",
        "steps",
        "block_size",
        "num_items",
        "drawn",
        "list_words",
    ]
)
def mask_kernel(
    items_ptr,
    bias_ptr,
    rate_ptr,
    indptr_ptr,
    known_items_ptr,
    bit_offsets_ptr,
    bits_ptr,
    counters_ptr,
    users_ptr,
    positives_ptr,
    list_ptr,
    masks_ptr,
    offsets_ptr,
    inverse_norms_ptr,
    num_rows,
    batch_size,
    steps,
    block_size,
    num_items,
    drawn,
    list_words,
    drawn_rate,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    SHUFFLE: tl.constexpr,
    IN_BATCH: tl.constexpr,
):
    """A word of the lists: the bits of all positives of a block for 64 items, and what each item adds.

    Args:
        items_ptr: (I, WIDTH): the vectors; read for their norms only.
        bias_ptr: (I,), float32, or None.
        rate_ptr: (I,), float32, of `Negatives.list_rates`; None where log q is not read.
        indptr_ptr: as in `exclusion_arguments`; None to leave nothing out.
        known_items_ptr: the items.
        bit_offsets_ptr: None where every user has a bitmap; otherwise the known items are searched.
        bits_ptr: the bitmaps.
        counters_ptr: as in `draw_kernel`.
        users_ptr: as in `BlockLists`, like the next five.
        positives_ptr: the same.
        list_ptr: the same.
        masks_ptr: written.
        offsets_ptr: written; None without a bias and log q.
        inverse_norms_ptr: written; None for the dot product.
        num_rows: as in `draw_kernel`, like the next six.
        batch_size: the same.
        steps: the same.
        block_size: the same.
        num_items: the same.
        drawn: the same.
        list_words: the same.
        drawn_rate: of `Negatives.list_rates`.
        WIDTH: the padded width of a row.
        BLOCK_D: the power of two from it.
        BLOCK_B: positives at a time.
        SHUFFLE: as in `draw_kernel`.
        IN_BATCH: the same.
    """
    block = tl.program_id(0) // list_words
    word = tl.program_id(0) % list_words
    step = tl.load(counters_ptr)
    _, here, count = block_extent(
        block, step, num_rows, batch_size, steps, block_size, drawn, SHUFFLE, IN_BATCH
    )
    lane = tl.arange(0, _WORD)
    m = word * _WORD + lane
    inside = m < count
    place = block.to(tl.int64) * (list_words * _WORD) + m
    item = tl.load(list_ptr + place)
    if offsets_ptr is not None:
        offset = lane * 0.0
        if bias_ptr is not None:
            offset += tl.load(bias_ptr + item)
        if rate_ptr is not None:
            offset -= tl.log(here.to(tl.float32) * tl.load(rate_ptr + item) + drawn_rate)
        tl.store(offsets_ptr + place, offset)
    if inverse_norms_ptr is not None:
        d = tl.arange(0, BLOCK_D)
        rows = items_ptr + item.to(tl.int64)[:, None] * WIDTH + d[None, :]
        mask = inside[:, None] & (d < WIDTH)[None, :]
        vectors = tl.load(rows, mask=mask, other=0.0).to(tl.float32)
        tl.store(inverse_norms_ptr + place, inverse_norm(tl.sum(vectors * vectors, axis=1)))

    masks_ptr += (block.to(tl.int64) * list_words + word) * block_size
    first = block * block_size
    for begin in range(0, here, BLOCK_B):
        i = begin + tl.arange(0, BLOCK_B)
        there = i < here
        user = tl.load(users_ptr + first + i, mask=there, other=0).to(tl.int64)
        positive = tl.load(positives_ptr + first + i, mask=there, other=0)
        counted = there[:, None] & inside[None, :] & (positive[:, None] != item[None, :])  # [BLOCK_B, 64]
        if indptr_ptr is not None:
            start = tl.load(indptr_ptr + user)
            degree = (tl.load(indptr_ptr + user + 1) - start).to(tl.int32)
            counted &= (degree < num_items)[:, None]
            if bit_offsets_ptr is None:
                words = bits_ptr + (user * (((num_items - 1) >> 5) + 1))[:, None] + (item >> 5)[None, :]
                bits = tl.load(words, mask=counted, other=0)
                counted &= ((bits >> (item & 31)[None, :]) & 1) == 0
            else:
                row = (known_items_ptr + start)[:, None]
                items = item[None, :] + tl.zeros_like(counted).to(tl.int32)
                counted &= _found(row, degree[:, None], items, counted) == 0
        mask_word = tl.sum(counted.to(tl.int64) << lane[None, :].to(tl.int64), axis=1)
        tl.store(masks_ptr + i, mask_word, mask=there)
