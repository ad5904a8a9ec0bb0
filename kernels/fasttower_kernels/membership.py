"""Bits that answer "has the user touched the item?": how many each user has, and which of them are an item's.

A user's row of 32-bit words is one of two kinds. A bitmap has a bit per item of the catalogue, and is the
answer. A filter is hashed: its size is in proportion to the user's known positives, and an item has up to
three bits of one of its words. Where one of them is off, the user has not touched the item; where all are on,
a search in the user's sorted row tells. A user has a bitmap where it is at most four times as large as the
filter; where the bitmaps of all users are small, all have one.

These are the rules for every backend. With S the words of a user's row and W those of a bitmap:

    bitmap, S = W:   word = item // 32
                     mask = 1 << item % 32
    filter, S < W:   h = item * 2654435761 mod 2**32
                     word = h * S // 2**32
                     rest = h * S mod 2**32
                     mask = 1 << rest // 2**27  |  1 << rest // 2**22 % 32  |  1 << rest // 2**17 % 32

What the sizes are for: of the draws that a step looks up, few should lead to a search, and their words are
read from memory at random, so that a user's words should share few cache lines.

Sources: D. E. Knuth, "The Art of Computer Programming", volume 3, section 6.4, for the multiplicative hash;
D. Lemire, "Fast Random Integer Generation in an Interval" (2019), for its scaling to the row; F. Putze,
P. Sanders and J. Singler, "Cache-, Hash- and Space-Efficient Bloom Filters" (2007), for bits of one word.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fasttower_kernels.known_positives import KnownPositives

FILTER_BITS_PER_ITEM = 16
BITMAP_WORDS_PER_FILTER_WORD = 4
HASH_MULTIPLIER = 2654435761
_LOW_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Layout:
    """Where each user's bits are.

    Attributes:
        offsets: (U + 1,), int64: the words of user u are ``offsets[u]`` to ``offsets[u + 1] - 1``.
        bitmap_words: W, the words of a bitmap: a row of fewer is a filter.
        all_bitmaps: whether every row is a bitmap.
    """

    offsets: Tensor
    bitmap_words: int
    all_bitmaps: bool

    @property
    def num_words(self) -> int:
        """The words of all users."""
        return int(self.offsets[-1])


def layout_of(known_positives: KnownPositives, bitmap_limit_bytes: int) -> Layout:
    """Give each user a bitmap or a filter.

    Args:
        known_positives: on any device.
        bitmap_limit_bytes: all users have bitmaps where these take at most so many bytes.

    Returns:
        The layout, on the same device.
    """
    degrees = known_positives.degrees
    bitmap_words = -(-known_positives.num_items // 32)
    all_bitmaps = 4 * bitmap_words * known_positives.num_users <= bitmap_limit_bytes
    # A user without known positives has one word of zeros.
    words = (degrees * FILTER_BITS_PER_ITEM + 31).div(32, rounding_mode="floor").clamp_(min=1)
    words[(words * BITMAP_WORDS_PER_FILTER_WORD >= bitmap_words) | all_bitmaps] = bitmap_words
    offsets = torch.zeros(len(degrees) + 1, dtype=torch.int64, device=degrees.device)
    torch.cumsum(words, 0, out=offsets[1:])
    return Layout(offsets, bitmap_words, all_bitmaps)


def place(layout: Layout, user_index: Tensor, item_index: Tensor) -> tuple[Tensor, Tensor]:
    """Which word is an item's, among those of all users, and which of its bits.

    Args:
        layout: of the bits.
        user_index: int64, any shape.
        item_index: int64, broadcasts with ``user_index``.

    Returns:
        Word and mask, int64, of the broadcast shape. The user may have touched the item where
        ``bits[word] & mask == mask``, and has not where it differs.
    """
    first = layout.offsets[user_index]
    words = layout.offsets[user_index + 1] - first
    product = (item_index * HASH_MULTIPLIER & _LOW_WORD) * words
    rest = product & _LOW_WORD
    one = torch.ones_like(rest)
    hashed = one << (rest >> 27) | one << (rest >> 22 & 31) | one << (rest >> 17 & 31)
    is_bitmap = words == layout.bitmap_words
    word = torch.where(is_bitmap, item_index >> 5, product >> 32)
    return first + word, torch.where(is_bitmap, one << (item_index & 31), hashed)
