"""Known positives: rows, membership and the gap search."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttower_kernels import known_positives as module
from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives


@st.composite
def pairs(draw):
    num_users, num_items = draw(st.integers(1, 6)), draw(st.integers(1, 20))
    pair = st.tuples(st.integers(0, num_users - 1), st.integers(0, num_items - 1))
    return num_users, num_items, draw(st.lists(pair, max_size=120))


def build(num_users, num_items, rows):
    index = torch.tensor(rows, dtype=torch.int32).reshape(-1, 2)
    return KnownPositives.from_pairs(index[:, 0], index[:, 1], num_users, num_items)


@settings(max_examples=80, deadline=None)
@given(pairs())
def test_rows_are_sorted_and_unique(case):
    num_users, num_items, rows = case
    known = build(num_users, num_items, rows)
    assert known.indptr.dtype == torch.int64
    assert known.items.dtype == torch.int32
    for user in range(num_users):
        row = known.items[known.indptr[user] : known.indptr[user + 1]].tolist()
        assert row == sorted({item for u, item in rows if u == user})


@pytest.mark.parametrize("limit", [1 << 30, 0], ids=["table", "search"])
@settings(max_examples=60, deadline=None)
@given(case=pairs())
def test_contains(limit, case):
    num_users, num_items, rows = case
    before = module._TABLE_LIMIT_BYTES
    module._TABLE_LIMIT_BYTES = limit
    try:
        inside = build(num_users, num_items, rows).contains(
            torch.arange(num_users)[:, None], torch.arange(num_items)[None, :], repeatedly=True
        )
    finally:
        module._TABLE_LIMIT_BYTES = before
    touched = set(rows)
    assert inside.tolist() == [[(u, i) in touched for i in range(num_items)] for u in range(num_users)]


@settings(max_examples=80, deadline=None)
@given(pairs())
def test_untouched_enumerates_the_complement(case):
    num_users, num_items, rows = case
    known = build(num_users, num_items, rows)
    for user in range(num_users):
        free = [item for item in range(num_items) if (user, item) not in set(rows)]
        ranks = torch.arange(len(free))
        assert known.untouched(torch.full_like(ranks, user), ranks).tolist() == free


@pytest.mark.parametrize(("user", "item"), [(2, 0), (0, 3), (-1, 0)])
def test_index_out_of_range(user, item):
    with pytest.raises(FastTowerError, match="expected 0 to"):
        build(2, 3, [(user, item)])


def test_a_contains_question_asked_once_keeps_no_table():
    known = KnownPositives.from_pairs(torch.tensor([0, 1]), torch.tensor([2, 0]), 2, 3)
    question = torch.tensor([[0], [1]]), torch.arange(3)
    right = [[False, False, True], [True, False, False]]
    assert known.contains(*question).tolist() == right
    assert "_table" not in vars(known)
    assert known.contains(*question, repeatedly=True).tolist() == right
