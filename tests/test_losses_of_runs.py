"""Runs of every loss, similarity and proposal: trained, saved, used for new users and updated."""

import dataclasses

import polars as pl
import pytest
from conftest import CONFIG

import fasttower
from fasttower.errors import FastTowerError

RUNS = {
    "softmax, in-batch, cosine": {"loss": "softmax", "negatives": "in-batch", "similarity": "cosine"},
    "softmax, mixed": {"loss": "softmax", "negatives": "mixed", "block_size": 16},
    "gbce, shared": {"loss": "gbce", "negatives": "shared", "num_negatives": 16},
    "gbce": {"loss": "gbce", "calibration": 0.5},
    "bpr, no bias": {"loss": "bpr", "item_bias": False},
    "softmax, popularity": {"loss": "softmax", "negatives": "popularity", "popularity_power": 0.5},
    "bce, cosine": {"similarity": "cosine", "temperature": 0.5, "bias_l2": 0.01},
    "bce, hard": {"negative_pool": 20, "num_negatives": 5},
}


@pytest.fixture(scope="module", params=RUNS.values(), ids=RUNS)
def trained(request, ratings, tmp_path_factory):
    run = fasttower.fit(ratings, dataclasses.replace(CONFIG, search="none", **request.param))
    path = tmp_path_factory.mktemp("runs") / "run"
    run.save(path)
    return fasttower.load_run(path)


def own_parity(frame):
    """The share of recommended items that are of their users' parity, which is what there is to learn."""
    user, item = (
        frame[name].cast(pl.String).str.extract(r"(\d+)$").cast(pl.Int64) for name in ("user_id", "item_id")
    )
    return float((user % 2 == item % 2).mean())


def test_learns(trained):
    losses = [record.train_loss for record in trained.history]
    assert losses[-1] < losses[0]
    assert own_parity(trained.recommend(filter_seen=False)) > 0.9


def test_new_users(trained, ratings):
    rows = ratings.filter(pl.col("user").cast(pl.Int64) < 6).with_columns(user="9" + pl.col("user"))
    rows = rows.group_by("user").head(8)
    if trained.config.negative_pool:
        with pytest.raises(FastTowerError, match=r"hard negatives .* update the run"):
            trained.recommend_new(rows)
        return
    recommended = trained.recommend_new(rows)
    assert recommended["user_id"].n_unique() == 6
    assert own_parity(recommended) > 0.9


def test_updates(trained, ratings):
    more = ratings.head(100).with_columns(user="new " + pl.col("user"))
    updated = trained.update(more, epochs=1)
    assert updated.config == trained.config
    assert len(updated.users) == len(trained.users) + more["user"].n_unique()
    assert updated.recommend(more["user"].unique()[:3].to_list()).height == 30
