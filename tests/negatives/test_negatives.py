"""The negatives: known answers, exactness and uniformity."""

import importlib.util

import pytest
import torch

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import sample_negatives
from fasttower_kernels.philox import seed_key

needs_numba = pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="numba is not installed")
BACKENDS = ["torch", pytest.param("numba", marks=needs_numba)]
KEY = seed_key(12345678901234567)
NUM_ITEMS = 101
# User 0 has touched half of the items, 2 all but none, 3 nothing.
TOUCHED = {0: range(50), 1: [3], 2: range(NUM_ITEMS), 3: []}


@pytest.fixture
def known():
    rows = [(user, item) for user, items in TOUCHED.items() for item in items]
    index = torch.tensor(rows, dtype=torch.int32)
    return KnownPositives.from_pairs(index[:, 0], index[:, 1], 4, NUM_ITEMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answers_plain(backend):
    # By a separate scalar implementation in Python ints.
    negatives = sample_negatives(torch.tensor([0, 1, 2]), 6, 3706, key=KEY, step=7, backend=backend)
    assert negatives.tolist() == [
        [2066, 229, 2559, 660, 751, 2019],
        [2413, 1685, 3675, 1017, 3122, 2161],
        [1518, 1068, 2814, 2317, 3081, 607],
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answers_with_exclusion(backend):
    # User 2 has one untouched item, so that nearly every draw ends in the gap search.
    rows = [(0, i) for i in range(50)] + [(1, 3)] + [(2, i) for i in range(1, 101)]
    index = torch.tensor(rows, dtype=torch.int32)
    known = KnownPositives.from_pairs(index[:, 0], index[:, 1], 4, NUM_ITEMS)
    users = torch.tensor([0, 1, 2, 3, 2])
    assert sample_negatives(
        users, 6, NUM_ITEMS, key=KEY, step=7, known_positives=known, backend=backend
    ).tolist() == [
        [56, 94, 69, 93, 54, 55],
        [65, 45, 100, 27, 85, 58],
        [0, 0, 0, 0, 0, 0],
        [16, 97, 35, 35, 2, 20],
        [0, 0, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_never_a_known_positive_and_uniform_over_the_rest(known, backend):
    users = torch.zeros(4000, dtype=torch.int64)
    negatives = sample_negatives(
        users, 10, NUM_ITEMS, key=KEY, step=0, known_positives=known, backend=backend
    )
    assert int(negatives.min()) == 50
    counts = torch.bincount(negatives.flatten(), minlength=NUM_ITEMS)[50:].double()
    chi_square = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert chi_square < 50 + 5 * 100**0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answers_through_the_gap_search(backend):
    # By the same separate implementation: which of two untouched items is for the word of attempt 16 to say.
    rows = torch.tensor([(0, i) for i in range(1000) if i not in (17, 803)], dtype=torch.int32)
    known = KnownPositives.from_pairs(rows[:, 0], rows[:, 1], 1, 1000)
    users = torch.zeros(3, dtype=torch.int64)
    assert sample_negatives(
        users, 5, 1000, key=KEY, step=1, known_positives=known, backend=backend
    ).tolist() == [
        [17, 17, 803, 803, 17],
        [803, 803, 17, 803, 17],
        [803, 803, 803, 17, 803],
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniform_through_the_gap_search(backend):
    # Two items of 1,000 are free: of 16 draws, one in 30 users hits one of them.
    rows = torch.tensor([(0, i) for i in range(1000) if i not in (17, 803)], dtype=torch.int32)
    known = KnownPositives.from_pairs(rows[:, 0], rows[:, 1], 1, 1000)
    negatives = sample_negatives(
        torch.zeros(2000, dtype=torch.int64), 3, 1000, key=KEY, step=1, known_positives=known, backend=backend
    )
    counts = torch.bincount(negatives.flatten(), minlength=1000)
    assert counts.nonzero().flatten().tolist() == [17, 803]
    assert abs(int(counts[17]) - 3000) < 4 * 1500**0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_positions_and_seeds_differ(known, backend):
    users = torch.tensor([3, 3])
    first = sample_negatives(users, 8, NUM_ITEMS, key=KEY, step=0, known_positives=known, backend=backend)
    assert first[0].tolist() != first[1].tolist()
    assert not first.equal(
        sample_negatives(users, 8, NUM_ITEMS, key=KEY, step=1, known_positives=known, backend=backend)
    )
    assert not first.equal(
        sample_negatives(users, 8, NUM_ITEMS, key=seed_key(1), step=0, known_positives=known, backend=backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_batch(known, backend):
    users = torch.tensor([0, 1, 3, 0, 1])
    whole = sample_negatives(users, 5, NUM_ITEMS, key=KEY, step=3, known_positives=known, backend=backend)
    part = sample_negatives(
        users[2:], 5, NUM_ITEMS, key=KEY, step=3, known_positives=known, first_position=2, backend=backend
    )
    assert part.equal(whole[2:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_negatives(known, backend):
    assert sample_negatives(
        torch.tensor([0, 2]), 0, NUM_ITEMS, key=KEY, step=0, known_positives=known, backend=backend
    ).shape == (2, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_negatives": -1}, "-1 negatives"),
        ({"num_items": 0}, "of 0 items"),
        ({"num_items": 2**31}, "of 2147483648 items"),
        ({"step": -1}, "step is -1"),
        ({"first_position": 2**32 - 1}, "first_position is 4294967295 for 2 users"),
        ({"user_index": torch.tensor([0, 4])}, "user_index goes from 0 to 4; expected 0 to 3"),
        ({"num_items": 100}, "are of 101 items on cpu; expected 100"),
        ({"backend": "triton"}, "triton runs on cuda"),
    ],
)
def test_what_does_not_fit_is_said(known, change, said):
    arguments = {
        "user_index": torch.tensor([0, 2]),
        "num_negatives": 3,
        "num_items": NUM_ITEMS,
        "key": KEY,
        "step": 0,
        "known_positives": known,
    }
    with pytest.raises(FastTowerError, match=said):
        sample_negatives(**arguments | change)
