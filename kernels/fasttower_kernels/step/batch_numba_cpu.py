"""What a step starts with: its batch, gathered through the shuffle and shared out by user."""

from __future__ import annotations

from typing import Any

import numpy as np

from fasttower_kernels.compiled import OPTIONS, Array, njit, uint32, uint64
from fasttower_kernels.negatives.numba_cpu import TILE
from fasttower_kernels.shuffle.numba_cpu import shuffle_tile
from fasttower_kernels.vector_rows import prefetch


@njit(**OPTIONS)
def gather(
    user_index: Array,
    item_index: Array,
    begin: int,
    size: int,
    shuffle: Any,
    users: Array,
    positives: Array,
    to: int,
) -> None:
    """Write the users and items at positions begin .. begin + size - 1 of the epoch's order.

    Args:
        user_index: (n,), int32, in the data's order.
        item_index: (n,), int32.
        begin: uint64.
        size: uint64.
        shuffle: bits of the left and the right part as uint64, the round keys (8,), uint32.
        users: (B,) or longer, uint32, out.
        positives: the same.
        to: uint64: where in both to write the first.
    """
    left_bits, right_bits, words = shuffle
    keys = words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]
    tile = uint64(TILE)
    rows = np.empty(TILE, dtype=np.uint64)
    ahead = np.empty(TILE, dtype=np.uint64)
    outside = np.empty(TILE, dtype=np.uint64)
    # While the interactions of a tile come from memory, the rows of the next one are computed.
    for start in range(uint64(0), size + tile, tile):
        if start < size:
            here = min(tile, size - start)
            shuffle_tile(begin + start, here, len(user_index), left_bits, right_bits, keys, ahead, outside)
            for w in range(here):
                prefetch(user_index, ahead[w], 1)
                prefetch(item_index, ahead[w], 1)
        if start > uint64(0):
            before = start - tile
            for w in range(min(tile, size - before)):
                users[to + before + w] = user_index[rows[w]]
                positives[to + before + w] = item_index[rows[w]]
        rows, ahead = ahead, rows


@njit(**OPTIONS)
def take_own(users: Array, positives: Array, size: int, thread: int, threads: int, own: Array) -> int:
    """Copy a thread's positions, users and positives to its rows of ``own``, (3, B); returns how many."""
    positions, own_users, own_positives = own[0], own[1], own[2]
    count = uint64(0)
    for b in range(size):
        positions[count] = b
        own_users[count] = users[b]
        own_positives[count] = positives[b]
        count += uint64(uint32(users[b]) % uint32(threads) == uint32(thread))
    return count
