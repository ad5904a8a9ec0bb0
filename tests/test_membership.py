"""The bits that say what a user has touched: sizes, places, and what they answer."""

import importlib.util

import numpy as np
import pytest
import torch

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.membership import layout_of, place

NUM_ITEMS = 20_000
DEGREES = [0, 1, 2, 65, 300, 2_000, 20_000]
needs_numba = pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="numba is not installed")


@pytest.fixture
def known():
    generator = torch.Generator().manual_seed(0)
    users = torch.repeat_interleave(torch.arange(len(DEGREES)), torch.tensor(DEGREES))
    items = torch.cat([torch.randperm(NUM_ITEMS, generator=generator)[:n] for n in DEGREES])
    return KnownPositives.from_pairs(users, items, len(DEGREES), NUM_ITEMS)


def answers(bits, layout, users, items):
    word, mask = place(layout, users, items)
    return bits[word] & mask == mask


def set_bits(layout, users, items):
    bits = torch.zeros(layout.num_words, dtype=torch.int64)
    for word, mask in zip(*(part.tolist() for part in place(layout, users, items)), strict=True):
        bits[word] |= mask
    return bits


def test_sizes_are_in_proportion_until_a_bitmap_is_not_much_larger(known):
    layout = layout_of(known, 0)
    # 625 words have a bit per item; a quarter of them are reached by a filter of 313 items.
    assert layout.offsets.diff().tolist() == [1, 1, 1, 33, 150, 625, 625]
    assert (layout.bitmap_words, layout.all_bitmaps) == (625, False)
    assert layout.num_words == 1436


def test_small_bitmaps_are_for_all_users(known):
    size = 4 * 625 * len(DEGREES)
    assert layout_of(known, size).offsets.diff().tolist() == [625] * len(DEGREES)
    assert layout_of(known, size).all_bitmaps
    assert not layout_of(known, size - 1).all_bitmaps


def test_places_by_hand(known):
    layout = layout_of(known, 0)
    first = int(layout.offsets[4])
    item = 12_345
    h = item * 2654435761 % 2**32
    scaled, rest = divmod(h * 150, 2**32)
    mask = 1 << rest // 2**27 | 1 << rest // 2**22 % 32 | 1 << rest // 2**17 % 32
    word, bits = place(layout, torch.tensor([4, 5]), torch.tensor([item, item]))
    assert word.tolist() == [first + scaled, int(layout.offsets[5]) + item // 32]
    assert bits.tolist() == [mask, 1 << item % 32]


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_no_touched_item_is_missed_and_few_others_are_taken_for_one(known, limit):
    layout = layout_of(known, limit)
    users = torch.repeat_interleave(torch.arange(len(DEGREES)), known.degrees)
    bits = set_bits(layout, users, known.items.long())
    everything = torch.arange(NUM_ITEMS)
    for user, degree in enumerate(DEGREES):
        maybe = answers(bits, layout, torch.tensor(user), everything)
        touched = known.contains(torch.tensor(user), everything)
        assert bool((maybe | ~touched).all())
        is_bitmap = layout.offsets.diff()[user] == layout.bitmap_words
        assert int((maybe & ~touched).sum()) <= (0 if is_bitmap else 0.02 * (NUM_ITEMS - degree))


@needs_numba
@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_compiled_code_sets_the_same_bits(known, limit, monkeypatch):
    from fasttower_kernels.negatives import membership_numba_cpu

    monkeypatch.setattr(membership_numba_cpu, "BITMAP_LIMIT_BYTES", limit)
    membership, all_bitmaps = membership_numba_cpu.membership_of(known)
    layout = layout_of(known, limit)
    users = torch.repeat_interleave(torch.arange(len(DEGREES)), known.degrees)
    assert all_bitmaps == layout.all_bitmaps
    assert np.array_equal(membership.bits, set_bits(layout, users, known.items.long()).numpy())
