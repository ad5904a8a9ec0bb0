"""Ids found in a run's maps, by a search where they are few and by a join where they are many."""

import numpy as np
import polars as pl
import pytest

from fasttower import FastTowerError
from fasttower.retrieval import IdMap

NUMBERS = pl.Series("user_id", range(-300, 5700, 3))  # 2,000 of them
TEXT = NUMBERS.cast(pl.String).sort()
MIXED_CASE = pl.Series("user_id", ["", "A", "Z", "a", "zz", "é", "\uffff", "\U00010000"])  # bytewise order


def id_map(ids):
    return IdMap(pl.DataFrame({"user_id": ids, "user_index": np.arange(len(ids), dtype=np.int32)}))


@pytest.fixture
def no_join(monkeypatch):
    def join(*_, **__):
        raise AssertionError("a join reads the whole map")

    monkeypatch.setattr(pl.DataFrame, "join", join)


@pytest.mark.parametrize("ids", [NUMBERS, NUMBERS.cast(pl.Int16), TEXT, MIXED_CASE, TEXT.reverse()])
def test_every_id_is_found_alone_and_among_all(ids):
    lookup = id_map(ids)
    assert lookup.find(ids.to_list()).tolist() == list(range(len(ids)))
    for place in {0, 1, len(ids) // 2, len(ids) - 1}:
        assert lookup.find([ids[place]]).tolist() == [place]


@pytest.mark.parametrize("ids", [NUMBERS, TEXT, MIXED_CASE])
def test_few_ids_are_searched_for(ids, no_join):
    lookup = id_map(ids)
    assert lookup.find(ids[2]).tolist() == [2]
    assert lookup.find([ids[5], ids[1], ids[5]]).tolist() == [5, 1]
    index = lookup.with_index(pl.DataFrame({"other": [1, 2], "user_id": ids[[3, 3]]}))
    assert index.rows() == [(1, ids[3], 3), (2, ids[3], 3)]
    assert index.schema["user_index"] == pl.Int32


def test_many_ids_are_joined(no_join):
    with pytest.raises(AssertionError, match="a join"):
        id_map(NUMBERS).find(NUMBERS)


@pytest.mark.parametrize("count", [3, 500])  # searched for, joined
@pytest.mark.parametrize(
    ("ids", "unknown"),
    [
        (NUMBERS, [-301, -299, 5698, 2**40]),
        (TEXT, ["", "-2", "0 ", "9999", "é"]),
        (NUMBERS.cast(pl.Int16), [2**15, -(2**20)]),
    ],
    ids=["integers", "text", "narrow integers"],
)
def test_ids_that_are_not_there(ids, unknown, count):
    lookup = id_map(ids)
    for value in unknown:
        wanted = [*ids[:count].to_list(), value]
        assert lookup.find(wanted, "skip").tolist() == list(range(count))
        with pytest.raises(FastTowerError, match=f"1 of {count + 1} user ids are not in the run: {value!r};"):
            lookup.find(wanted)
        rows = lookup.with_index(pl.DataFrame({"user_id": wanted}))
        assert rows["user_index"].to_list() == [*range(count), None]
        assert lookup.known(rows.select("user_id"), "skip").height == count


def test_none_is_no_id():
    for lookup in (id_map(NUMBERS), id_map(TEXT)):
        assert lookup.find([None, lookup.ids[4]], "skip").tolist() == [4]
        with pytest.raises(FastTowerError, match="1 of 2 user ids are not in the run: None"):
            lookup.find([None, lookup.ids[4]])


def test_nobody_is_found_where_nobody_is():
    assert id_map(TEXT.clear()).find(["a"], "skip").tolist() == []
    assert id_map(TEXT).find([]).tolist() == []


def test_a_map_out_of_order_is_refused():
    frame = pl.DataFrame({"item_id": ["a", "b"], "item_index": [1, 0]})
    with pytest.raises(FastTowerError, match="the map of item_id has gaps or is out of order"):
        IdMap(frame)
