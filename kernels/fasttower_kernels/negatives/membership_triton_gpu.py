"""The bits of `membership` in Triton, and the rows of items that they stand for.

The four negatives of a quad are asked about together: their words are loaded at once, and where bits of a
filter leave it open, one loop searches for all four, with four loads on their way.
"""

# Constants of a kernel are written in capitals, and arguments get their types when it is launched.
# ruff: noqa: N803
# Tuples grow by an element a lane, in loops that are unrolled.
# mypy: disallow-untyped-defs=False, disable-error-code="assignment,var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from fasttower_kernels.membership import HASH_MULTIPLIER

_HASH_MULTIPLIER = tl.constexpr(HASH_MULTIPLIER)


@triton.jit
def exclusion_rows(user, mask, num_items, indptr_ptr, known_items_ptr, bit_offsets_ptr, bits_ptr):
    """What `touched` and `untouched` take of some users.

    Args:
        user: int64 block.
        mask: int1 block; elsewhere a user has no known items.
        num_items: int32 scalar, I.
        indptr_ptr: as in `exclusion_arguments`, like the rest.
        known_items_ptr: the items.
        bit_offsets_ptr: where rows of bits begin, or None.
        bits_ptr: their words.

    Returns:
        Three blocks: pointers to the rows of known items, their lengths in int32, pointers to the rows of
        bits. Where not all rows are bitmaps, two more: the words of a row, uint32, and whether it is one.
    """
    begin = tl.load(indptr_ptr + user, mask=mask, other=0)
    degree = (tl.load(indptr_ptr + user + 1, mask=mask, other=0) - begin).to(tl.int32)
    bitmap_words = ((num_items - 1) >> 5) + 1  # num_items + 31 may pass 32 bits
    if bit_offsets_ptr is None:
        return known_items_ptr + begin, degree, bits_ptr + user * bitmap_words
    else:  # noqa: RET505 - Triton compiles one of the two branches
        row = tl.load(bit_offsets_ptr + user, mask=mask, other=0)
        words = (tl.load(bit_offsets_ptr + user + 1, mask=mask, other=0) - row).to(tl.uint32)
        bitmap = words == bitmap_words.to(tl.uint32)
        return known_items_ptr + begin, degree, bits_ptr + row, words, bitmap


@triton.jit
def any_of(flags):
    """Whether any element of four int1 blocks is set: an int32 scalar, 0 if none is."""
    return tl.max((flags[0] | flags[1] | flags[2] | flags[3]).to(tl.int32), axis=0)


@triton.jit
def _count_below(row_ptr, degree, bounds, wanted, MINUS_RANK: tl.constexpr):
    """How many entries of each sorted row (less their rank in it, if asked) are below four bounds."""
    lows = ()
    highs = ()
    for lane in tl.static_range(4):
        lows += (degree * 0,)
        highs += (tl.where(wanted[lane], degree, 0),)
    unfinished = any_of(wanted)
    while unfinished > 0:
        middles = ()
        values = ()
        for lane in tl.static_range(4):
            middle = lows[lane] + ((highs[lane] - lows[lane]) >> 1)
            middles += (middle,)
            values += (tl.load(row_ptr + middle, mask=lows[lane] < highs[lane], other=0),)
        open_lows = lows
        lows = ()
        open_highs = highs
        highs = ()
        active = ()
        for lane in tl.static_range(4):
            low = open_lows[lane]
            high = open_highs[lane]
            value = values[lane]
            if MINUS_RANK:
                value -= middles[lane]
            below = value < bounds[lane]
            low = tl.where(below & (low < high), middles[lane] + 1, low)
            high = tl.where(below, high, middles[lane])
            lows += (low,)
            highs += (high,)
            active += (low < high,)
        unfinished = any_of(active)
    return lows


@triton.jit
def touched(items, wanted, known):
    """Which of four wanted draws are known positives of their users.

    Args:
        items: four int32 blocks.
        wanted: four int1 blocks.
        known: of `exclusion_rows`.

    Returns:
        Four int1 blocks.
    """
    bits_row_ptr = known[2]
    hits = ()
    if len(known) == 3:
        for lane in tl.static_range(4):
            word = tl.load(bits_row_ptr + (items[lane] >> 5), mask=wanted[lane], other=0)
            hits += (((word >> (items[lane] & 31)) & 1) != 0,)
        return hits
    else:  # noqa: RET505 - Triton compiles one of the two branches
        words = known[3]
        bitmap = known[4]
        unsure = ()
        for lane in tl.static_range(4):
            item = items[lane].to(tl.uint32)
            hashed = item * _HASH_MULTIPLIER
            rest = hashed * words
            place = tl.where(bitmap, item >> 5, tl.umulhi(hashed, words))
            one = rest * 0 + 1
            mask = (one << (rest >> 27)) | (one << ((rest >> 22) & 31)) | (one << ((rest >> 17) & 31))
            mask = tl.where(bitmap, one << (item & 31), mask)
            word = tl.load(bits_row_ptr + place, mask=wanted[lane], other=0).to(tl.uint32, bitcast=True)
            hit = (word & mask) == mask
            hits += (hit,)
            unsure += (hit & (bitmap == 0),)
        if any_of(unsure) > 0:
            places = _count_below(known[0], known[1], items, unsure, MINUS_RANK=False)
            sure = ()
            for lane in tl.static_range(4):
                there = unsure[lane] & (places[lane] < known[1])
                found = tl.load(known[0] + places[lane], mask=there, other=-1) == items[lane]
                sure += (tl.where(unsure[lane], found, hits[lane]),)
            hits = sure
        return hits


@triton.jit
def untouched(ranks, wanted, known):
    """Four wanted items by their ranks among those that their users have not touched: the gap search."""
    bounds = ()
    for lane in tl.static_range(4):
        bounds += (ranks[lane] + 1,)
    gaps = _count_below(known[0], known[1], bounds, wanted, MINUS_RANK=True)
    items = ()
    for lane in tl.static_range(4):
        items += (ranks[lane] + gaps[lane],)
    return items
