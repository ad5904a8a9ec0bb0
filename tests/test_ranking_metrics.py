"""The device's metrics against RePlay's, and by hand."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttower.errors import FastTowerError
from fasttower.evaluation.ranking import ranking_metrics
from fasttower.evaluation.replay_report import replay_metrics
from fasttower_kernels.known_positives import KnownPositives


def truth_of(rows, num_items):
    pairs = [(user, item) for user, items in enumerate(rows) for item in items]
    users, items = (torch.tensor([pair[side] for pair in pairs], dtype=torch.int64) for side in (0, 1))
    return KnownPositives.from_pairs(users, items, len(rows), num_items)


def every(num_items):
    return torch.ones(num_items, dtype=torch.bool)


def test_by_hand():
    # User 0 hits at places 1 and 3 of 3 relevant, user 1 at none, user 2 has no recommendation, and user 3
    # nothing relevant: it counts nowhere, nor does its item 9 in Coverage.
    items = torch.tensor([[4, 0, 2], [1, 3, -1], [-1, -1, -1], [9, 4, 0]], dtype=torch.int32)
    truth = truth_of([[2, 4, 7], [5], [1, 2], []], 10)
    # Item 0 is not in the training part: it counts in Coverage neither above nor below.
    train_items = torch.tensor([item not in (0, 9) for item in range(10)])
    metrics = ranking_metrics(items, truth, train_items, k=3)
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    assert metrics == pytest.approx(
        {
            "NDCG@3": (1 + 1 / 2) / ideal / 3,
            "HitRate@3": 1 / 3,
            "Recall@3": 2 / 3 / 3,
            "MAP@3": (1 + 2 / 3) / 3 / 3,
            "MRR@3": 1 / 3,
            "Coverage@3": 4 / 8,
        },
        abs=1e-12,
    )


def test_absent_slots_are_no_hits_even_beside_the_last_item_of_the_row_before():
    items = torch.tensor([[0], [-1]], dtype=torch.int32)
    assert ranking_metrics(items, truth_of([[4], [1]], 5), every(5), 1)["HitRate@1"] == 0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_users=st.integers(1, 12),
    num_items=st.integers(1, 30),
    width=st.integers(1, 12),
    k=st.integers(1, 12),
    truth_share=st.sampled_from([0.05, 0.3, 1.0]),
)
def test_equals_replay(*, seed, num_users, num_items, width, k, truth_share):
    generator = np.random.default_rng(seed)
    relevant = generator.random((num_users, num_items)) < truth_share
    if not relevant.any():
        relevant[0, 0] = True
    items = np.full((num_users, width), -1, dtype=np.int32)
    for user in range(num_users):
        length = min(generator.integers(0, width + 1), num_items)  # also none, also fewer than k
        items[user, :length] = generator.permutation(num_items)[:length]
    users, places = np.nonzero(items >= 0)
    recommendations = pl.DataFrame(
        {
            "user_id": users,
            "item_id": items[users, places].astype(np.int64),
            "score": np.zeros(len(users)),
            "rank": places + 1,
        }
    )
    pairs = np.argwhere(relevant)
    test = pl.DataFrame({"user_id": pairs[:, 0], "item_id": pairs[:, 1]})
    fit = pl.DataFrame({"user_id": np.zeros(num_items, int), "item_id": np.arange(num_items)})

    truth = truth_of([np.flatnonzero(row) for row in relevant], num_items)
    metrics = ranking_metrics(torch.from_numpy(items), truth, every(num_items), k)

    expected = replay_metrics(recommendations, test, fit, k)
    assert list(metrics) == list(expected)
    assert metrics == pytest.approx(expected, abs=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_the_gpu_gives_the_same_figures():
    generator = np.random.default_rng(0)
    items = torch.from_numpy(np.argsort(generator.random((50, 40)), axis=1)[:, :10].astype(np.int32))
    truth = truth_of([np.flatnonzero(row) for row in generator.random((50, 40)) < 0.2], 40)
    assert ranking_metrics(items.cuda(), truth.to("cuda"), every(40).cuda(), 10) == pytest.approx(
        ranking_metrics(items, truth, every(40), 10), abs=1e-9
    )


@pytest.mark.parametrize(
    ("items", "rows", "num_train_items", "k", "message"),
    [
        ([[0]], [[], []], 5, 1, "a row for each row of the truth"),
        ([[0]], [[]], 5, 1, "no user has a relevant item"),
        ([[5]], [[1]], 5, 1, "expected -1 \\(none\\) to 4"),
        ([[-2]], [[1]], 5, 1, "expected -1 \\(none\\) to 4"),
        ([[0]], [[1]], 0, 1, "marks 0 of 5"),
        ([[0]], [[1]], None, 1, "marks 4 of 4 items; expected at least one of 5"),
        ([[0]], [[1]], 5, 0, "k is 0"),
    ],
)
def test_bad_arguments_are_refused(items, rows, num_train_items, k, message):
    train_items = every(4) if num_train_items is None else torch.arange(5) < num_train_items
    with pytest.raises(FastTowerError, match=message):
        ranking_metrics(torch.tensor(items), truth_of(rows, 5), train_items, k)
