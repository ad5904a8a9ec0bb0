"""Philox against Random123's known answers, in each of the arithmetics that it runs in."""

import numpy as np
import pytest
import torch

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.philox import Purpose, derive_key, philox4x32, seed_key

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("kind", ["int", "torch", "numpy"])
@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(kind, counter, key, words):
    if kind == "torch":
        counter = tuple(torch.tensor([value]) for value in counter)
    elif kind == "numpy":
        counter = tuple(np.array([value]) for value in counter)
    answer = philox4x32(key, counter)
    assert tuple(word if kind == "int" else word.item() for word in answer) == words


def test_derived_keys():
    # By a separate few lines of numpy uint64 arithmetic.
    assert derive_key(0, Purpose.SHUFFLE, 0) == (34971269, 3816734176)
    assert derive_key(0, Purpose.SHUFFLE, 1) == (4233007707, 3341819733)
    assert derive_key(12345678901234567, Purpose.VALIDATION) == (645574011, 1776047907)
    assert derive_key(7, Purpose.INITIAL_TABLES, 1) == (2997489826, 2844003787)


def test_seed_key_splits_the_seed():
    assert seed_key(2**33 + 5) == (5, 2)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range(seed):
    with pytest.raises(FastTowerError, match=str(seed)):
        derive_key(seed, Purpose.SHUFFLE)
