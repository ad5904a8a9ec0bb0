"""The sampling rule in Triton, four negatives at a time: one call of Philox makes four words.

By popularity four negatives take two calls, and each of them two loads more, of its cell's threshold and
alias, both at once.

Known positives are found by the bits of `membership`. All users have bitmaps as long as these leave room for
the rest; beyond that, filters. A program waits for its trips to memory one after another, so their number
counts. A bitmap answers in one trip, for four negatives at once: a sector of 32 bytes each, mostly from DRAM
where the bitmaps are larger than the L2 cache. In a batch of 65,536 with 10 negatives these are 21 MB, 8
microseconds at 2.8 TB/s, which other programs fill. A filter saves no more than the difference between a trip
to DRAM and one to the L2 cache, about half of a trip, and adds the searches: in data of MovieLens 20M's shape
(bitmaps 463 MB, filters 54 MB, which is an H100's whole L2 cache) 1% of the draws, and with two positives a
program 8% of the quads, where the others of the warp wait, 0.7 trips a quad on average. At MovieLens 1M's
shape the bitmaps, 2.8 MB, lie in the L2 cache anyway. This is arithmetic, not a measurement.
"""

# Constants of a kernel are written in capitals, and arguments get their types when it is launched.
# ruff: noqa: N803, N806
# Tuples grow by an element a lane, in loops that are unrolled.
# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.membership import Layout, layout_of, place
from fasttower_kernels.negatives.membership_triton_gpu import any_of, exclusion_rows, touched, untouched
from fasttower_kernels.negatives.popularity import Popularity
from fasttower_kernels.negatives.reference import ATTEMPTS
from fasttower_kernels.philox import Key
from fasttower_kernels.triton_launch import Launch, device_scope, signed_word

BITMAP_LIMIT_BYTES = 2 << 30
"""Up to this size of all bitmaps every user has one; MovieLens 20M's have 463 MB."""

_BITMAP_SHARE = 4  # of the free memory, at most one part in this many
_PAIRS_AT_ONCE = 1 << 24  # while bits are set, with about 1 GB to work in
_BLOCK = 128
_ATTEMPTS = tl.constexpr(ATTEMPTS)

NO_EXCLUSION: dict[str, object] = {
    "indptr_ptr": None,
    "known_items_ptr": None,
    "bit_offsets_ptr": None,
    "bits_ptr": None,
}


def exclusion_arguments(known_positives: KnownPositives | None) -> dict[str, object]:
    """The kernel arguments that say what to leave out, built at the first call and kept with the object.

    Returns:
        indptr_ptr: (U + 1,), int64; None, like the others, to leave nothing out.
        known_items_ptr: (nnz,), int32.
        bit_offsets_ptr: (U + 1,), int64, of the users' rows of bits; None where all rows are bitmaps.
        bits_ptr: int32, the words of all rows.
    """
    if known_positives is None:
        return NO_EXCLUSION
    arguments: dict[str, object] | None = known_positives.__dict__.get("_exclusion_arguments")
    if arguments is None:
        layout = layout_of(known_positives, _bitmap_limit(known_positives.items.device))
        arguments = {
            "indptr_ptr": known_positives.indptr,
            "known_items_ptr": known_positives.items,
            "bit_offsets_ptr": None if layout.all_bitmaps else layout.offsets,
            "bits_ptr": build_bits(known_positives, layout),
        }
        known_positives.__dict__["_exclusion_arguments"] = arguments
    return arguments


def table_arguments(popularity: Popularity | None) -> dict[str, Tensor | None]:
    """The kernel arguments that say what to draw by: None to draw uniformly."""
    if popularity is None:
        return {"threshold_ptr": None, "alias_ptr": None}
    return {"threshold_ptr": popularity.threshold, "alias_ptr": popularity.alias}


def exclusion_bytes(known_positives: KnownPositives) -> int:
    """The size of the bits and of their offsets, found without memory of the device."""
    rows = KnownPositives(
        known_positives.indptr.cpu(), torch.empty(0, dtype=torch.int32), known_positives.num_items
    )
    layout = layout_of(rows, _bitmap_limit(known_positives.items.device))
    return 4 * layout.num_words + (0 if layout.all_bitmaps else 8 * len(layout.offsets))


def _bitmap_limit(device: torch.device) -> int:
    if device.type != "cuda":
        return BITMAP_LIMIT_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return min(BITMAP_LIMIT_BYTES, free // _BITMAP_SHARE)


def build_bits(known_positives: KnownPositives, layout: Layout) -> Tensor:
    """The words of all rows, int32, made by torch on the device of the known positives."""
    indptr, device = known_positives.indptr, known_positives.items.device
    bits = torch.zeros(layout.num_words, dtype=torch.int32, device=device)
    for begin in range(0, len(known_positives.items), _PAIRS_AT_ONCE):
        items = known_positives.items[begin : begin + _PAIRS_AT_ONCE].long()
        pairs = torch.arange(begin, begin + len(items), device=device)
        words, masks = place(layout, torch.searchsorted(indptr, pairs, right=True) - 1, items)
        for bit in range(32):
            # Several pairs may have the same word: all of them write the same.
            these = words[(masks >> bit & 1).bool()]
            bits[these] |= signed_word(1 << bit)
    return bits


@triton.jit
def _draws(position, quad, step, attempt, key_0, key_1, bound, wanted, table, WORDS: tl.constexpr):
    """Four int32 blocks in [0, bound), of WORDS calls of Philox; with a table, the cells' items.

    What is not wanted of a table is item 0.
    """
    zero = position * 0
    words = ()
    for call in tl.static_range(WORDS):
        some = tl.philox_impl(position, zero + quad * WORDS + call, zero + step, zero + attempt, key_0, key_1)
        for lane in tl.static_range(4):
            words += (some[lane],)
    draws = ()
    for lane in tl.static_range(4):
        draw = tl.umulhi(words[WORDS * lane], bound.to(tl.uint32)).to(tl.int32)
        if len(table) > 0:
            threshold = tl.load(table[0] + draw, mask=wanted[lane], other=0).to(tl.uint32, bitcast=True)
            alias = tl.load(table[1] + draw, mask=wanted[lane], other=0)
            draw = tl.where(words[WORDS * lane + 1] < threshold, draw, alias)
        draws += (draw,)
    return draws


@triton.jit
def _chosen(flags, these, others):
    chosen = ()
    for lane in tl.static_range(4):
        chosen += (tl.where(flags[lane], these[lane], others[lane]),)
    return chosen


@triton.jit
def draw_quad(position, quad, step, key_0, key_1, num_items, num_negatives, wanted, known, table):
    """Negatives ``4 * quad`` to ``4 * quad + 3`` of a block of positives.

    Args:
        position: uint32 block, b of each positive in its batch.
        quad: int32 scalar.
        step: uint32 scalar, t.
        key_0: uint32 scalar, the key of the stream.
        key_1: uint32 scalar, its second word.
        num_items: int32 block, I.
        num_negatives: int32 scalar, N.
        wanted: int1 block: which positives need negatives; their users have free items.
        known: of `exclusion_rows`; () to leave nothing out.
        table: threshold_ptr and alias_ptr of a `Popularity`; () to draw uniformly.

    Returns:
        Four int32 blocks. What lies beyond N, or is not wanted, is some item in [0, I). With a table, four
        int1 blocks more: which came from the gap search, uniform whatever the table.
    """
    WORDS: tl.constexpr = 1 if len(table) == 0 else 2
    again = ()
    for lane in tl.static_range(4):
        again += (wanted & (num_items * 0 + quad * 4 + lane < num_negatives),)
    by_rank = ()
    if len(table) > 0:
        for _ in tl.static_range(4):
            by_rank += (num_items < 0,)
    items = _draws(position, quad, step, 0, key_0, key_1, num_items, again, table, WORDS)
    if len(known) > 0:
        again = touched(items, again, known)
        pending = any_of(again)
        attempt = pending * 0 + 1
        while (pending > 0) & (attempt < _ATTEMPTS):
            drawn = _draws(
                position, quad, step, attempt.to(tl.uint32), key_0, key_1, num_items, again, table, WORDS
            )
            items = _chosen(again, drawn, items)
            again = touched(items, again, known)
            pending = any_of(again)
            attempt += 1
        if pending > 0:
            free = num_items - known[1]
            ranks = _draws(position, quad, step, _ATTEMPTS, key_0, key_1, free, again, (), WORDS)
            items = _chosen(again, untouched(ranks, again, known), items)
            if len(table) > 0:
                by_rank = again
    return items + by_rank


@triton.jit(do_not_specialize=["count", "num_items", "num_negatives", "first_position", "step"])
def negatives_kernel(
    user_index_ptr,
    negatives_ptr,
    words_ptr,
    indptr_ptr,
    known_items_ptr,
    bit_offsets_ptr,
    bits_ptr,
    threshold_ptr,
    alias_ptr,
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
    wanted = mask
    known = ()
    if indptr_ptr is not None:
        known = exclusion_rows(user, mask, num_items, indptr_ptr, known_items_ptr, bit_offsets_ptr, bits_ptr)
        wanted = mask & (known[1] < num_items)
    table = ()
    if threshold_ptr is not None:
        table = (threshold_ptr, alias_ptr)
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
            b * 0 + num_items,
            num_negatives,
            wanted,
            known,
            table,
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
    popularity: Popularity | None = None,
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
            **table_arguments(popularity),
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
