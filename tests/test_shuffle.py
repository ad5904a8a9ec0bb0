"""The order of an epoch."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttower_kernels.shuffle import epoch_key, shuffled_rows


def order(n, key):
    return shuffled_rows(torch.arange(n), n, key)


def test_known_answers():
    # By a separate scalar implementation in Python ints of the rounds in the docstring.
    assert order(1, (1, 2)).tolist() == [0]
    assert order(2, (1, 2)).tolist() == [0, 1]
    assert order(3, (0, 0)).tolist() == [2, 0, 1]
    thousand = order(1000, (1, 2)).numpy()
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
    parts = [shuffled_rows(part, n, (3, 4)) for part in torch.arange(n).split(cut)]
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


def test_rows_past_two_to_the_31():
    n = 2**40 + 12345
    rows = shuffled_rows(torch.arange(n - 5, n), n, (1, 2))
    assert rows.unique().numel() == 5
    assert 0 <= int(rows.min()) <= int(rows.max()) < n
