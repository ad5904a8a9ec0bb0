"""Recommendations one block ahead: what is begun when, and what an early end or an error leaves."""

import threading
import time

import numpy as np
import polars as pl
import pytest
import torch
from topk_oracle import integers, random_seen

from fasttower.errors import FastTowerError
from fasttower.model import TwoTower
from fasttower.retrieval import Retriever, retriever
from fasttower.retrieval.ahead import one_ahead
from fasttower_kernels.topk import TopKSearch

PATIENCE_S = 10


@pytest.fixture
def blocks_of_three_users(monkeypatch):
    monkeypatch.setattr(retriever, "_BLOCK_SLOTS", 15)  # at K = 5
    monkeypatch.setattr(retriever, "_mapping", lambda _device: one_ahead)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("one_ahead")]


def wait_for(condition):
    end = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


def test_it_is_map():
    for n in (0, 1, 2, 7):
        assert list(one_ahead(lambda i: i * i, range(n))) == [i * i for i in range(n)]
    assert not threads()


def test_one_call_is_begun_ahead_and_never_two():
    begun = []
    results = one_ahead(begun.append, range(4))
    assert begun == []
    for given in range(4):
        next(results)
        right = list(range(min(given + 2, 4)))
        assert wait_for(lambda right=right: begun == right)
        time.sleep(0.02)
        assert begun == right
    assert next(results, "the end") == "the end"


def test_an_early_end_waits_for_the_call_under_way_and_begins_no_other():
    begun, ended = [], []

    def call(i):
        begun.append(i)
        if i:
            time.sleep(0.05)
        ended.append(i)

    results = one_ahead(call, range(9))
    next(results)
    assert wait_for(lambda: begun == [0, 1])
    results.close()
    assert ended == [0, 1]
    assert not threads()


def test_an_error_comes_where_its_result_would():
    def call(i):
        if i == 2:
            raise FastTowerError("two")
        return i

    results = one_ahead(call, range(9))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(FastTowerError, match="two"):
        next(results)
    assert not threads()


def test_the_next_block_is_searched_before_the_frame_of_this_one_is_made(
    run, monkeypatch, blocks_of_three_users
):
    searches, frames = [], []

    def search_of(catalogue, vectors, **options):
        searches.append(len(vectors))
        return search(catalogue, vectors, **options)

    def frame_of(*parts):
        # The next search begins though nobody asks for its result; after the last block there is none.
        total = -(-len(run.users) // 3)
        assert wait_for(lambda: len(searches) == min(len(frames) + 2, total)), (len(searches), len(frames))
        frames.append(make(*parts))
        return frames[-1]

    search, make = TopKSearch.__call__, retriever.recommendation_frame
    monkeypatch.setattr(TopKSearch, "__call__", search_of)
    monkeypatch.setattr(retriever, "recommendation_frame", frame_of)
    ahead = run.recommend(k=5)
    monkeypatch.undo()
    assert len(frames) > 2
    assert ahead.equals(run.recommend(k=5))


def test_a_consumer_that_stops_leaves_no_thread(run, blocks_of_three_users):
    for frame in run.recommend_in_blocks(k=5):
        assert len(frame) == 15
        break
    assert wait_for(lambda: not threads())


def test_a_wrong_argument_is_raised_from_the_thread_as_it_is(run, blocks_of_three_users):
    with pytest.raises(FastTowerError, match="scoring is 'float16'"):
        run.recommend(k=5, scoring="float16")
    assert wait_for(lambda: not threads())


def test_a_cpu_searches_block_after_block():
    assert retriever._mapping(torch.device("cpu")) is map
    assert retriever._mapping(torch.device("cuda")) is one_ahead


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("scoring", ["float32", "tf32", "bfloat16"])
def test_a_gpu_recommends_what_the_cpu_does(monkeypatch, scoring):
    monkeypatch.setattr(retriever, "_BLOCK_SLOTS", 500)
    model = TwoTower(1007, 900, 4)
    generator = np.random.default_rng(0)
    with torch.no_grad():
        for table in (model.user_tower.vectors, model.item_tower.vectors, model.item_bias):
            table.copy_(integers(generator, -9, 10, *table.shape))
    seen = random_seen(generator, 1007, 900, 0.05)
    users, items = (
        pl.DataFrame({f"{kind}_id": range(count), f"{kind}_index": range(count)})
        for kind, count in (("user", 1007), ("item", 900))
    )

    def frame(device):
        model.to(device)
        asked = Retriever(model, users, items, seen.to(device))
        return pl.concat(asked.recommend(k=10, scoring=scoring if device == "cuda" else "float32"))

    right = frame("cpu")
    assert frame("cuda").equals(right)
    # What the caller's own stream is still writing is waited for.
    with torch.cuda.stream(torch.cuda.Stream()):
        assert frame("cuda").equals(right)
