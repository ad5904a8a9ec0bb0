"""Philox4x32-10, the counter-based generator behind every training draw, and the keys of its uses.

A draw is a function of a key and a counter, so any step of a run can be computed alone, in any order and on
any device. This module needs neither torch nor numpy.
"""

from enum import IntEnum

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.philox.reference import philox4x32

__all__ = ["Key", "Purpose", "derive", "derive_key", "philox4x32", "seed_key"]

Key = tuple[int, int]


class Purpose(IntEnum):
    """What a derived key is for: one stream of numbers each."""

    SHUFFLE = 1
    VALIDATION = 2
    RANDOM_SPLIT = 3
    INITIAL_TABLES = 4
    SYNTHETIC = 5
    SHARED_NEGATIVES = 6


def seed_key(seed: int) -> Key:
    """The key of the training negatives: the low and the high 32 bits of the seed.

    Raises:
        FastTowerError: the seed is not in [0, 2**63).
    """
    if not 0 <= seed < 2**63:
        raise FastTowerError(f"seed is {seed}; expected a whole number from 0 to 2**63 - 1.")
    return seed & 0xFFFFFFFF, seed >> 32


def derive(key: Key, purpose: Purpose, index: int = 0) -> Key:
    """The key of another use of a key's stream.

    The first two words of Philox(key; counter = (index, 0, purpose, 2**32 - 1)). Training counters end in an
    attempt number of at most 16, so no training draw shares a counter with a key.
    """
    words = philox4x32(key, (index, 0, int(purpose), 0xFFFFFFFF))
    return words[0], words[1]


def derive_key(seed: int, purpose: Purpose, index: int = 0) -> Key:
    """The key of a use other than the training negatives: `derive` from `seed_key`."""
    return derive(seed_key(seed), purpose, index)
