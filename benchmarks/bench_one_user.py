"""The ten best items of one user, as a frame in the caller's ids.

"fasttower_unprepared" is the first question to a run, which checks the tables. "torch_mv_topk" is written by
hand: a dictionary of the ids, a matrix-vector product, `torch.topk`.
"""

import dataclasses
import itertools

import numpy as np
import polars as pl
import pytest
import torch

from fasttower import Config, Run, TwoTower

DIM, K = 32, 10
SHAPES = {"ML-1M's shape": "ml_1m_shape", "ML-20M's tables": "ml_20m_tables"}


def make_run(data):
    """An untrained model with a bias, and ids with gaps."""
    model = TwoTower(data.num_users, data.num_items, DIM).initialise(0, 0.1)
    torch.nn.init.normal_(model.item_bias)
    users, items = (
        pl.DataFrame({f"{kind}_id": np.arange(count) * 3 + 1, f"{kind}_index": np.arange(count)})
        for kind, count in (("user", data.num_users), ("item", data.num_items))
    )
    return Run(
        model=model,
        users=users,
        items=items,
        config=Config(embedding_dim=DIM),
        device="cpu",
        backend="numba",
        history=[],
        recommendations=pl.DataFrame(),
        metrics={"interrupted": False},
        known_positives=data.known_positives(),
    )


def torch_way(run):
    place = dict(run.users.select("user_id", "user_index").iter_rows())
    users, items = run.model.infer_users().detach(), run.model.infer_items().detach()
    bias, known = run.model.item_bias.detach(), run.known_positives
    rank = np.arange(1, K + 1, dtype=np.int32)

    def recommend(user):
        index = place[user]
        scores = torch.addmv(bias, items, users[index])
        scores[known.items[known.indptr[index] : known.indptr[index + 1]]] = -torch.inf
        best = scores.topk(K)
        item_ids = run.items["item_id"][best.indices.numpy()]
        return pl.DataFrame({"user_id": [user] * K, "item_id": item_ids, "score": best.values, "rank": rank})

    return recommend


WAYS = {
    "fasttower": lambda run: lambda user: run.recommend([user], K),
    "fasttower_unprepared": lambda run: lambda user: dataclasses.replace(run).recommend([user], K),
    "torch_mv_topk": torch_way,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_one_user(benchmark_in, request, way, shape):
    run = make_run(request.getfixturevalue(SHAPES[shape]))
    recommend, right = WAYS[way](run), torch_way(run)
    users = run.users["user_id"].sample(100, seed=0).to_list()
    for user in users:
        found, expected = recommend(user), right(user)
        assert found["item_id"].equals(expected["item_id"])
        np.testing.assert_allclose(found["score"], expected["score"], rtol=1e-5)
    turns = itertools.cycle(users)
    benchmark_in(f"top-{K} of one user, {shape}", users=len(run.users), items=len(run.items), dim=DIM, k=K)(
        lambda: recommend(next(turns))
    )
