"""The sampling rule in Triton, four negatives at a time: one call of Philox makes four words.

"Has the user touched it?" is answered by a users x items bitmap while that is small, one 32-byte sector a
negative, and otherwise by a binary search in the user's row.
"""

# Constants of a kernel are written in capitals, and arguments get their types when it is launched.
# ruff: noqa: N803, N806
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives.reference import ATTEMPTS
from fasttower_kernels.philox import Key
from fasttower_kernels.triton_launch import Launch, device_scope, signed_word

BITMAP_LIMIT_BYTES = 2 << 30
"""The largest bitmap; MovieLens 20M's has 463 MB."""

_BITMAP_SHARE = 4  # of the free memory, at most one part in this many
_BLOCK = 128
_ATTEMPTS = tl.constexpr(ATTEMPTS)


@dataclass(frozen=True)
class Exclusion:
    """What the kernels read to leave known positives out.

    Attributes:
        indptr: (U + 1,), int64.
        items: (nnz,), int32.
        bitmap: (U, W), int32, W = ceil(I / 32): bit ``i % 32`` of word ``i // 32`` says that the user has
            touched item i. None where it would be too large.
    """

    indptr: Tensor
    items: Tensor
    bitmap: Tensor | None

    def arguments(self) -> dict[str, object]:
        """The arguments of a kernel that draws negatives."""
        return {
            "indptr_ptr": self.indptr,
            "known_items_ptr": self.items,
            "bitmap_ptr": self.bitmap,
            "bitmap_words": 0 if self.bitmap is None else self.bitmap.shape[1],
        }


NO_EXCLUSION: dict[str, object] = {
    "indptr_ptr": None,
    "known_items_ptr": None,
    "bitmap_ptr": None,
    "bitmap_words": 0,
}

_exclusions: dict[int, Exclusion] = {}


def exclusion_arguments(known_positives: KnownPositives | None) -> dict[str, object]:
    """The kernel arguments that say what to leave out; a bitmap is built once for each `KnownPositives`."""
    if known_positives is None:
        return NO_EXCLUSION
    identity = id(known_positives)
    if identity not in _exclusions:
        limit = BITMAP_LIMIT_BYTES
        if known_positives.items.is_cuda:
            free, _ = torch.cuda.mem_get_info(known_positives.items.device)
            limit = min(limit, free // _BITMAP_SHARE)
        bitmap = build_bitmap(known_positives) if bitmap_bytes(known_positives) <= limit else None
        _exclusions[identity] = Exclusion(known_positives.indptr, known_positives.items, bitmap)
        weakref.finalize(known_positives, _exclusions.pop, identity, None)
    return _exclusions[identity].arguments()


def bitmap_bytes(known_positives: KnownPositives) -> int:
    """The size of the bitmap."""
    return 4 * known_positives.num_users * -(-known_positives.num_items // 32)


def build_bitmap(known_positives: KnownPositives) -> Tensor:
    """The (U, W) bitmap of `Exclusion`."""
    items, words = known_positives.items, -(-known_positives.num_items // 32)
    bitmap = torch.zeros(known_positives.num_users * words, dtype=torch.int32, device=items.device)
    slots = torch.repeat_interleave(
        torch.arange(known_positives.num_users, device=items.device), known_positives.degrees
    )
    slots.mul_(words).add_(items >> 5)
    # Pairs are unique, so the bits of a word are distinct and their sum is their union.
    bitmap.index_add_(0, slots, (torch.ones_like(slots) << (items & 31)).to(torch.int32))
    return bitmap.view(-1, words)


@triton.jit
def _count_below(row_ptr, degree, bound, wanted, MINUS_RANK: tl.constexpr):
    """How many entries of each sorted row (less their rank in it, if asked) are below the bound."""
    low = degree * 0
    high = tl.where(wanted, degree, 0)
    unfinished = tl.max(high, axis=0)
    while unfinished > 0:
        middle = low + ((high - low) >> 1)
        active = low < high
        value = tl.load(row_ptr + middle, mask=active, other=0)
        if MINUS_RANK:
            value -= middle
        low = tl.where(active & (value < bound), middle + 1, low)
        high = tl.where(active & (value >= bound), middle, high)
        unfinished = tl.max((low < high).to(tl.int32), axis=0)
    return low


@triton.jit
def _touched(item, wanted, row_ptr, degree, bitmap_row_ptr, BITMAP: tl.constexpr):
    """Which of the wanted draws are known positives of their users."""
    if BITMAP:
        word = tl.load(bitmap_row_ptr + (item >> 5), mask=wanted, other=0)
        return ((word >> (item & 31)) & 1) != 0
    else:  # noqa: RET505 - Triton compiles one of the two branches
        place = _count_below(row_ptr, degree, item, wanted, MINUS_RANK=False)
        found = tl.load(row_ptr + place, mask=wanted & (place < degree), other=-1)
        return found == item


@triton.jit
def _draw(word, bound):
    return tl.umulhi(word, bound.to(tl.uint32)).to(tl.int32)


@triton.jit
def _untouched(word, item, wanted, row_ptr, degree, free):
    """The wanted items drawn again, by their rank among the untouched ones."""
    rank = _draw(word, free)
    return tl.where(wanted, rank + _count_below(row_ptr, degree, rank + 1, wanted, MINUS_RANK=True), item)


@triton.jit
def draw_quad(
    position,
    quad,
    step,
    key_0,
    key_1,
    num_items,
    num_negatives,
    wanted,
    row_ptr,
    degree,
    bitmap_row_ptr,
    EXCLUDE: tl.constexpr,
    BITMAP: tl.constexpr,
):
    """Negatives ``4 * quad`` to ``4 * quad + 3`` of a block of positives.

    Args:
        position: uint32 block, b of each positive in its batch.
        quad: int32 scalar.
        step: uint32 scalar, t.
        key_0: uint32 scalar, the key of the stream.
        key_1: uint32 scalar, its second word.
        num_items: int32 block, I.
        num_negatives: int32 scalar, N.
        wanted: int1 block: which positives need negatives.
        row_ptr: block of pointers to the users' rows of known items; read with EXCLUDE alone.
        degree: int32 block, the rows' lengths, less than I where wanted; read with EXCLUDE alone.
        bitmap_row_ptr: block of pointers to the users' bitmap rows; read with BITMAP alone.
        EXCLUDE: leave known positives out.
        BITMAP: by the bitmap, not by a search.

    Returns:
        Four int32 blocks. What lies beyond N, or is not wanted, is some item in [0, I).
    """
    zero = position * 0
    w0, w1, w2, w3 = tl.philox_impl(position, zero + quad, zero + step, zero, key_0, key_1)
    item_0 = _draw(w0, num_items)
    item_1 = _draw(w1, num_items)
    item_2 = _draw(w2, num_items)
    item_3 = _draw(w3, num_items)
    if EXCLUDE:
        first = (degree * 0) + quad * 4
        again_0 = wanted & (first < num_negatives)
        again_1 = wanted & (first + 1 < num_negatives)
        again_2 = wanted & (first + 2 < num_negatives)
        again_3 = wanted & (first + 3 < num_negatives)
        again_0 &= _touched(item_0, again_0, row_ptr, degree, bitmap_row_ptr, BITMAP)
        again_1 &= _touched(item_1, again_1, row_ptr, degree, bitmap_row_ptr, BITMAP)
        again_2 &= _touched(item_2, again_2, row_ptr, degree, bitmap_row_ptr, BITMAP)
        again_3 &= _touched(item_3, again_3, row_ptr, degree, bitmap_row_ptr, BITMAP)
        pending = tl.max((again_0 | again_1 | again_2 | again_3).to(tl.int32), axis=0)
        attempt = pending * 0 + 1
        while (pending > 0) & (attempt < _ATTEMPTS):
            w0, w1, w2, w3 = tl.philox_impl(
                position, zero + quad, zero + step, zero + attempt.to(tl.uint32), key_0, key_1
            )
            item_0 = tl.where(again_0, _draw(w0, num_items), item_0)
            item_1 = tl.where(again_1, _draw(w1, num_items), item_1)
            item_2 = tl.where(again_2, _draw(w2, num_items), item_2)
            item_3 = tl.where(again_3, _draw(w3, num_items), item_3)
            again_0 &= _touched(item_0, again_0, row_ptr, degree, bitmap_row_ptr, BITMAP)
            again_1 &= _touched(item_1, again_1, row_ptr, degree, bitmap_row_ptr, BITMAP)
            again_2 &= _touched(item_2, again_2, row_ptr, degree, bitmap_row_ptr, BITMAP)
            again_3 &= _touched(item_3, again_3, row_ptr, degree, bitmap_row_ptr, BITMAP)
            pending = tl.max((again_0 | again_1 | again_2 | again_3).to(tl.int32), axis=0)
            attempt += 1
        if pending > 0:
            free = num_items - degree
            w0, w1, w2, w3 = tl.philox_impl(
                position, zero + quad, zero + step, zero + _ATTEMPTS, key_0, key_1
            )
            item_0 = _untouched(w0, item_0, again_0, row_ptr, degree, free)
            item_1 = _untouched(w1, item_1, again_1, row_ptr, degree, free)
            item_2 = _untouched(w2, item_2, again_2, row_ptr, degree, free)
            item_3 = _untouched(w3, item_3, again_3, row_ptr, degree, free)
    return item_0, item_1, item_2, item_3


@triton.jit
def exclusion_rows(user, mask, indptr_ptr, known_items_ptr, bitmap_ptr, bitmap_words):
    """Where the users' known items are.

    Args:
        user: int64 block.
        mask: int1 block; elsewhere the length is 0.
        indptr_ptr: as in `Exclusion`.
        known_items_ptr: the items.
        bitmap_ptr: the bitmap, or None.
        bitmap_words: W.

    Returns:
        Pointers to the rows, their lengths in int32, and pointers to the bitmap rows, which mean nothing
        without a bitmap.
    """
    begin = tl.load(indptr_ptr + user, mask=mask, other=0)
    degree = (tl.load(indptr_ptr + user + 1, mask=mask, other=0) - begin).to(tl.int32)
    row_ptr = known_items_ptr + begin
    bitmap_row_ptr = row_ptr
    if bitmap_ptr is not None:
        bitmap_row_ptr = bitmap_ptr + user * bitmap_words
    return row_ptr, degree, bitmap_row_ptr


@triton.jit(
    do_not_specialize=["count", "num_items", "num_negatives", "bitmap_words", "first_position", "step"]
)
def negatives_kernel(
    user_index_ptr,
    negatives_ptr,
    words_ptr,
    indptr_ptr,
    known_items_ptr,
    bitmap_ptr,
    bitmap_words,
    count,
    num_items,
    num_negatives,
    first_position,
    step,
    BLOCK: tl.constexpr,
):
    """The sampling rule alone, as `sample_negatives` computes it."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = b < count
    user = tl.load(user_index_ptr + b, mask=mask, other=0).to(tl.int64)
    catalogue = b * 0 + num_items
    EXCLUDE: tl.constexpr = indptr_ptr is not None
    BITMAP: tl.constexpr = bitmap_ptr is not None
    wanted = mask
    # Stand-ins that nothing reads.
    row_ptr = user
    degree = b
    bitmap_row_ptr = user
    if EXCLUDE:
        row_ptr, degree, bitmap_row_ptr = exclusion_rows(
            user, mask, indptr_ptr, known_items_ptr, bitmap_ptr, bitmap_words
        )
        wanted = mask & (degree < catalogue)
    key_0 = tl.load(words_ptr).to(tl.uint32, bitcast=True)
    key_1 = tl.load(words_ptr + 1).to(tl.uint32, bitcast=True)
    position = (b + first_position).to(tl.uint32)
    for quad in range((num_negatives + 3) // 4):
        items = draw_quad(
            position,
            quad,
            step.to(tl.uint32),
            key_0,
            key_1,
            catalogue,
            num_negatives,
            wanted,
            row_ptr,
            degree,
            bitmap_row_ptr,
            EXCLUDE,
            BITMAP,
        )
        for lane in tl.static_range(4):
            k = b * 0 + quad * 4 + lane
            place = b.to(tl.int64) * num_negatives + k
            tl.store(negatives_ptr + place, items[lane].to(tl.int64), mask=mask & (k < num_negatives))


def sample_negatives(
    user_index: Tensor,
    num_negatives: int,
    num_items: int,
    *,
    key: Key,
    step: int,
    known_positives: KnownPositives | None = None,
    first_position: int = 0,
) -> Tensor:
    """See the reference's `sample_negatives`: the same negatives, bit for bit."""
    negatives = torch.empty((len(user_index), num_negatives), dtype=torch.int64, device=user_index.device)
    launch = Launch(
        negatives_kernel,
        triton.cdiv(len(user_index), _BLOCK),
        {
            "user_index_ptr": user_index,
            "negatives_ptr": negatives,
            "words_ptr": torch.tensor([*map(signed_word, key)], dtype=torch.int32, device=user_index.device),
            **exclusion_arguments(known_positives),
            "count": len(user_index),
            "num_items": num_items,
            "num_negatives": num_negatives,
            "first_position": first_position,
            "step": signed_word(step),
            "BLOCK": _BLOCK,
        },
        num_warps=4,
    )
    if negatives.numel():
        with device_scope(user_index.device):
            launch()
    return negatives
