"""The order of an epoch: a keyed bijection of row numbers, computed where it is needed and never stored."""

from fasttower_kernels.philox import Key, Purpose, derive_key
from fasttower_kernels.shuffle.reference import ROUNDS, shuffled_rows

__all__ = ["ROUNDS", "epoch_key", "shuffled_rows"]


def epoch_key(seed: int, epoch: int) -> Key:
    """The key of an epoch's order."""
    return derive_key(seed, Purpose.SHUFFLE, epoch)
