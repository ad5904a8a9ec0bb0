"""Filters, splits and the whole preparation, row for row as RePlay does it on MovieLens."""

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from fasttower.config import DataConfig
from fasttower.data import filters, splits
from fasttower.data.preparation import prepare
from fasttower.data.readers import read_interactions


@pytest.fixture(scope="module", params=["ml_100k", "ml_1m"])
def rows(request):
    """The file's rows in its own order, with a number each, so that every row is a different one."""
    return read_interactions(request.getfixturevalue(request.param)).frame.with_row_index("row")


def same_rows(found, expected, in_order=True):
    order = [] if in_order else ["row"]
    assert len(expected)
    assert_frame_equal(*(f.sort(order) if order else f for f in (found, expected)))


@pytest.mark.parametrize("minimum", [3, 4.5])
def test_min_rating(rows, minimum):
    from replay.preprocessing.filters import LowRatingFilter

    kept = rows.lazy().filter(filters.rated_at_least(minimum)).collect()
    same_rows(kept, LowRatingFilter(minimum).transform(rows))
    assert len(kept) < len(rows)


@pytest.mark.parametrize(("column", "minimum"), [("user_id", 20), ("user_id", 100), ("item_id", 30)])
def test_min_count(rows, column, minimum):
    from replay.preprocessing.filters import MinCountFilter

    kept = rows.lazy().filter(filters.occurs_at_least(column, minimum)).collect()
    same_rows(kept, MinCountFilter(minimum, column).transform(rows), in_order=False)
    assert kept["row"].is_sorted()
    text = rows.with_columns(pl.col(column).cast(pl.String))
    assert text.filter(filters.occurs_at_least(column, minimum))["row"].equals(kept["row"])


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.37])
def test_time_split_and_cold_rows(rows, fraction):
    from replay.splitters import TimeSplitter

    options = {"query_column": "user_id", "drop_cold_users": True, "drop_cold_items": True}
    earlier, later = TimeSplitter(fraction, **options).split(rows)
    before = splits.before_time_cut(fraction)
    fit, test = rows.lazy().filter(before).collect(), rows.lazy().filter(~before).collect()
    warm = filters.warm(fit["user_id"].unique(), fit["item_id"].unique())
    same_rows(fit, earlier, in_order=False)
    same_rows(test.lazy().filter(warm).collect(), later, in_order=False)
    assert fit["row"].is_sorted()


@pytest.mark.parametrize(
    ("min_rating", "min_user", "min_item", "test_min_rating"),
    [(3, 0, 0, None), (None, 20, 5, 4), (2, 30, 10, 3)],
)
def test_the_whole_way(rows, min_rating, min_user, min_item, test_min_rating):
    from replay.preprocessing.filters import LowRatingFilter, MinCountFilter
    from replay.splitters import TimeSplitter

    expected = rows
    if min_rating:
        expected = LowRatingFilter(min_rating).transform(expected)
    for column, minimum in (("user_id", min_user), ("item_id", min_item)):
        if minimum:
            expected = MinCountFilter(minimum, column).transform(expected).sort("row")
    options = {"query_column": "user_id", "drop_cold_users": True, "drop_cold_items": True}
    fit, test = TimeSplitter(0.2, **options).split(expected)
    fit = fit.sort("row")
    train, valid = TimeSplitter(0.1, **options).split(fit)
    if test_min_rating:
        valid, test = (LowRatingFilter(test_min_rating).transform(part) for part in (valid, test))

    config = DataConfig(
        min_rating=min_rating,
        min_user_interactions=min_user,
        min_item_interactions=min_item,
        test_min_rating=test_min_rating,
    )
    data = prepare(rows.drop("row"), config)
    pairs = ["user_id", "item_id"]
    assert_frame_equal(data.original_ids(data.fit), fit.select(pairs))
    assert_frame_equal(data.original_ids(data.train), train.sort("row").select(pairs))
    for found, part in ((data.valid, valid), (data.test, test)):
        assert_frame_equal(data.original_ids(found).sort(pairs), part.select(pairs).unique().sort(pairs))
    assert data.users["user_id"].equals(fit["user_id"].unique().sort())
    assert data.items["item_id"].equals(fit["item_id"].unique().sort())


def test_the_notebooks_protocol(ml_100k):
    config = DataConfig(min_user_interactions=20, test_fraction=0.2, test_min_rating=4, valid_fraction=0)
    data = prepare(ml_100k, config)
    assert len(data.fit) == len(data.train) == 80_000
    assert (len(data.users), len(data.items)) == (751, 1616)
    assert (len(data.test), data.test["user_index"].n_unique()) == (1571, 95)
    assert data.valid is None
    assert data.timestamp_unit == "s"


def test_replays_own_protocol(ml_1m):
    data = prepare(ml_1m, DataConfig(min_rating=3, test_fraction=0.2))
    assert len(data.fit) == 669_182
    assert (len(data.users), len(data.items)) == (5397, 3569)
    assert (len(data.test), data.test["user_index"].n_unique()) == (86_541, 1139)
    assert len(data.train) == 602_263
