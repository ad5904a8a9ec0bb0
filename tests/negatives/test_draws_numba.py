"""What the compiled steps draw, against the plain torch reference bit for bit: Philox, order, negatives."""

import hashlib

import numpy as np
import pytest
import torch

numba = pytest.importorskip("numba")

from fasttower_kernels import membership as layout  # noqa: E402
from fasttower_kernels.known_positives import KnownPositives  # noqa: E402
from fasttower_kernels.negatives import membership_numba_cpu as membership  # noqa: E402
from fasttower_kernels.negatives import numba_cpu as negatives  # noqa: E402
from fasttower_kernels.negatives.reference import sample_negatives  # noqa: E402
from fasttower_kernels.philox import numba_cpu as philox  # noqa: E402
from fasttower_kernels.philox import seed_key  # noqa: E402
from fasttower_kernels.shuffle.reference import round_keys, shuffled_rows  # noqa: E402
from fasttower_kernels.step.batch_numba_cpu import gather as compiled_gather  # noqa: E402

KEY = seed_key(12345678901234567)
NUM_USERS, NUM_ITEMS = 30, 41


def make_known():
    """User 0 has touched every item, 1 all but one, 2 half, 3 one, 4 all but four, the others nothing."""
    rows = [(0, i) for i in range(NUM_ITEMS)] + [(1, i) for i in range(NUM_ITEMS) if i != 17]
    rows += [(2, i) for i in range(0, NUM_ITEMS, 2)] + [(3, NUM_ITEMS - 1)]
    # Of the draws of user 4, one in five is still a known positive after 15 attempts. The items that are left
    # lie together, so that the gap search finds others than one more draw would.
    rows += [(4, i) for i in range(NUM_ITEMS) if i not in (30, 31, 33, 38)]
    index = torch.tensor(rows, dtype=torch.int32)
    return KnownPositives.from_pairs(index[:, 0], index[:, 1], NUM_USERS, NUM_ITEMS)


def hashed(monkeypatch):
    monkeypatch.setattr(membership, "BITMAP_LIMIT_BYTES", 0)
    known = make_known()
    assert not membership.membership_of(known)[1]
    return known


def from_python(function):
    """A function that only compiled code may call, for Python to call."""
    return numba.njit(lambda *arguments: function(*arguments))  # noqa: PLW0108 - numba is to compile it


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert from_python(philox.philox4x32)(*map(np.uint32, (*key, *counter))) == words


gather = from_python(compiled_gather)


def ordered(n, key, begin=0, size=None):
    """Rows at positions begin .. begin + size - 1 of an epoch's order, as the training step gathers them."""
    size = n if size is None else size
    bits = (n - 1).bit_length()
    rows, unused = np.zeros(size, np.uint32), np.zeros(size, np.uint32)
    index = np.arange(n, dtype=np.int32)
    shuffle = np.uint64(bits // 2), np.uint64(bits - bits // 2), np.array(round_keys(key), dtype=np.uint32)
    gather(index, index, np.uint64(begin), np.uint64(size), shuffle, rows, unused, np.uint64(0))
    return torch.from_numpy(rows.astype(np.int64))


def test_order_known_answers():
    assert ordered(1, (1, 2)).tolist() == [0]
    assert ordered(2, (1, 2)).tolist() == [0, 1]
    thousand = ordered(1000, (1, 2)).numpy()
    digest = hashlib.sha256(thousand.astype("<i8").tobytes()).hexdigest()
    assert digest == "8b7aeb427df2f343f2078eec93c0cc839da9608f9caf5c107ab6f80ce6a353db"


@pytest.mark.parametrize("n", [3, 5, 63, 64, 65, 129, 1025, 65_537])
def test_order_equals_the_reference(n):
    assert ordered(n, KEY).equal(shuffled_rows(torch.arange(n), n, KEY))
    assert ordered(n, KEY, begin=1, size=n - 2).equal(shuffled_rows(torch.arange(1, n - 1), n, KEY))


def test_negatives_known_answers():
    drawn = negatives.sample_negatives(torch.tensor([0, 1, 2]), 6, 3706, key=KEY, step=7)
    assert drawn.tolist() == [
        [2066, 229, 2559, 660, 751, 2019],
        [2413, 1685, 3675, 1017, 3122, 2161],
        [1518, 1068, 2814, 2317, 3081, 607],
    ]


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("size", [1, 63, 130])
@pytest.mark.parametrize("num_negatives", [0, 1, 3, 4, 10])
def test_negatives_equal_the_reference(filtered, size, num_negatives, monkeypatch):
    known = hashed(monkeypatch) if filtered else make_known()
    # Mostly the users whose draws hit known positives; user 0 has no negatives.
    users = torch.randint(1, 5, (size,), generator=torch.Generator().manual_seed(size))
    arguments = {"key": KEY, "step": 7, "known_positives": known, "first_position": 5}
    drawn = negatives.sample_negatives(users, num_negatives, NUM_ITEMS, **arguments)
    assert drawn.equal(sample_negatives(users, num_negatives, NUM_ITEMS, **arguments))


def test_hashed_bits_that_collide(monkeypatch):
    # With one bit per item, nearly every word has all of its bits on: the search alone can tell.
    monkeypatch.setattr(membership, "BITMAP_LIMIT_BYTES", 0)
    monkeypatch.setattr(layout, "FILTER_BITS_PER_ITEM", 1)
    items = torch.randperm(5000, generator=torch.Generator().manual_seed(0))[:1000]
    known = KnownPositives.from_pairs(torch.zeros_like(items), items, 1, 5000)
    arguments = {"key": KEY, "step": 2, "known_positives": known}
    users = torch.zeros(200, dtype=torch.int64)
    drawn = negatives.sample_negatives(users, 10, 5000, **arguments)
    assert drawn.equal(sample_negatives(users, 10, 5000, **arguments))


def test_hashed_bits_do_not_look_into_the_next_row(monkeypatch):
    # The items that users 0, 2, .. have not touched come after theirs, and are the first of the next user's.
    monkeypatch.setattr(membership, "BITMAP_LIMIT_BYTES", 0)
    rows = [(2 * i, item) for i in range(20) for item in range(1000)]
    rows += [(2 * i + 1, 1000 + i) for i in range(20)]
    index = torch.tensor(rows)
    known = KnownPositives.from_pairs(index[:, 0], index[:, 1], 40, 1020)
    arguments = {"key": KEY, "step": 2, "known_positives": known}
    users = torch.arange(0, 40, 2).repeat(20)
    drawn = negatives.sample_negatives(users, 10, 1020, **arguments)
    assert drawn.equal(sample_negatives(users, 10, 1020, **arguments))


def test_a_large_catalogue_is_drawn_whole():
    size = 2**31 - 1
    drawn = negatives.sample_negatives(torch.zeros(50, dtype=torch.int64), 10, size, key=KEY, step=0)
    assert drawn.equal(sample_negatives(torch.zeros(50, dtype=torch.int64), 10, size, key=KEY, step=0))
    assert int(drawn.max()) > 2**30
