"""A user asked for alone gets what all get together, and the tables are not read again for it."""

import numpy as np
import polars as pl
import pytest
import torch
from topk_oracle import integers, random_seen

import fasttower_kernels.topk
from fasttower.model import TwoTower
from fasttower.retrieval import Retriever

USERS, ITEMS = 301, 403


@pytest.fixture(scope="module")
def retriever():
    """Of a model whose scores are small integers, so that sums are exact and ties abound."""
    generator = np.random.default_rng(0)
    model = TwoTower(USERS, ITEMS, 5)
    with torch.no_grad():
        for table in (model.user_tower.vectors, model.item_tower.vectors, model.item_bias):
            table.copy_(integers(generator, -2, 3, *table.shape))
    users, items = (
        pl.DataFrame({f"{kind}_id": range(0, 7 * count, 7), f"{kind}_index": range(count)})
        for kind, count in (("user", USERS), ("item", ITEMS))
    )
    items = items.with_columns(title="no " + pl.col("item_id").cast(pl.String))
    return Retriever(model, users, items, random_seen(generator, USERS, ITEMS, 0.3))


@pytest.mark.parametrize("k", [1, 10, 1000])
@pytest.mark.parametrize("filter_seen", [True, False])
def test_each_user_alone_gets_the_rows_of_all_together(retriever, k, filter_seen):
    together = pl.concat(retriever.recommend(k=k, filter_seen=filter_seen))
    alone = [
        frame
        for user in range(USERS)
        for frame in retriever.recommend(np.array([user]), k=k, filter_seen=filter_seen)
    ]
    assert pl.concat(alone).equals(together)


def test_ties_go_to_the_smaller_item(retriever):
    frame = pl.concat(retriever.recommend(k=ITEMS))
    order = ["user_id", "score", "item_id"]
    assert frame.equals(frame.sort(order, descending=[False, True, False], maintain_order=True))
    assert frame.select("user_id", "score").is_duplicated().mean() > 0.5


def test_each_row_alone_has_the_neighbours_that_it_has_among_all(retriever):
    for ask, count in ((retriever.similar_users, USERS), (retriever.similar_items, ITEMS)):
        together = ask(np.arange(count), 5)
        alone = pl.concat([ask(np.array([index]), 5) for index in range(count)])
        assert alone.drop("similarity").equals(together.drop("similarity"))
        np.testing.assert_allclose(alone["similarity"], together["similarity"], rtol=1e-6)
        assert (together[:, 0] != together[:, 1]).all()


def test_the_items_are_looked_at_in_the_first_search(retriever, monkeypatch):
    looked_at = []

    def largest(name, tensor):
        looked_at.append((name, len(tensor)))
        return original(name, tensor)

    original = fasttower_kernels.topk._largest_magnitude
    monkeypatch.setattr(fasttower_kernels.topk, "_largest_magnitude", largest)
    again = Retriever(retriever._model, retriever.users.frame, retriever.items.frame, retriever._known)
    for user in (3, 4):
        list(again.recommend(np.array([user]), k=2))
        again.similar_users(np.array([user]), 2)
    of_tables = [(name, rows) for name, rows in looked_at if rows > 1]
    assert sorted(of_tables) == [("item_bias", ITEMS), ("item_vectors", USERS), ("item_vectors", ITEMS)]
