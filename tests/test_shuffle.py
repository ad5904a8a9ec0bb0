"""The order of an epoch."""

import hashlib
import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.shuffle import epoch_key, shuffled_rows

needs_numba = pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="numba is not installed")
BACKENDS = ["torch", pytest.param("numba", marks=needs_numba)]


def order(n, key, backend="torch"):
    return shuffled_rows(torch.arange(n), n, key, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answers(backend):
    # By a separate scalar implementation in Python ints of the rounds in the docstring.
    assert order(1, (1, 2), backend).tolist() == [0]
    assert order(2, (1, 2), backend).tolist() == [0, 1]
    assert order(3, (0, 0), backend).tolist() == [2, 0, 1]
    thousand = order(1000, (1, 2), backend).numpy()
    assert thousand[:6].tolist() == [361, 460, 94, 534, 946, 540]
    assert thousand[-3:].tolist() == [593, 682, 469]
    digest = hashlib.sha256(thousand.astype("<i8").tobytes()).hexdigest()
    assert digest == "8b7aeb427df2f343f2078eec93c0cc839da9608f9caf5c107ab6f80ce6a353db"


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000))
def test_is_a_bijection(n, seed, epoch):
    assert order(n, epoch_key(seed, epoch)).sort().values.equal(torch.arange(n))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 3000), data=st.data())
def test_parts_agree_with_the_whole(n, data):
    cut = data.draw(st.integers(1, n - 1))
    parts = [shuffled_rows(part, n, (3, 4), backend="torch") for part in torch.arange(n).split(cut)]
    assert torch.cat(parts).equal(order(n, (3, 4)))


def test_epochs_differ_and_repeat():
    first, second = (order(1000, epoch_key(0, epoch)) for epoch in (0, 1))
    assert not first.equal(second)
    assert first.equal(order(1000, epoch_key(0, 0)))


@pytest.mark.parametrize("n", [2, 5, 17])
def test_every_row_reaches_every_position_alike(n):
    keys = 600
    counts = np.zeros((n, n))
    for seed in range(keys):
        counts[np.arange(n), order(n, epoch_key(seed, 0)).numpy()] += 1
    expected = keys / n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5 + 5


@needs_numba
@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1))
def test_backends_agree(n, seed):
    # Positions in any order and with any strides.
    positions = torch.arange(n).flip(0).repeat(2)[::2]
    rows = [shuffled_rows(positions, n, epoch_key(seed, 0), backend=name) for name in ("torch", "numba")]
    assert rows[0].equal(rows[1])


@pytest.mark.parametrize(
    ("positions", "num_rows", "said"),
    [
        (torch.tensor([0, 5]), 5, "goes from 0 to 5; expected 0 to 4"),
        (torch.tensor([-1]), 5, "from -1"),
        (torch.tensor([0.5]), 5, "float32"),
        (torch.tensor([], dtype=torch.int64), 0, "num_rows is 0"),
    ],
)
def test_positions_that_are_none(positions, num_rows, said):
    with pytest.raises(FastTowerError, match=said):
        shuffled_rows(positions, num_rows, (1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_past_two_to_the_31(backend):
    n = 2**40 + 12345
    rows = shuffled_rows(torch.arange(n - 5, n), n, (1, 2), backend=backend)
    assert rows.equal(shuffled_rows(torch.arange(n - 5, n), n, (1, 2), backend="torch"))
    assert rows.unique().numel() == 5
    assert 0 <= int(rows.min()) <= int(rows.max()) < n
