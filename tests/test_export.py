"""What other software gets: vectors whose inner product is the model's score."""

import json
import sys

import numpy as np
import polars as pl
import pytest
import torch
from conftest import CONFIG

import fasttower
from fasttower import Config, FastTowerError
from fasttower_kernels.topk import top_k

K = 10


@pytest.fixture(scope="module")
def wide():
    """A run whose tables and biases have spread, so that the bias decides some places."""
    generator = torch.Generator().manual_seed(3)
    frame = pl.DataFrame(
        {
            "user": torch.randint(300, (9000,), generator=generator).numpy(),
            "item": (torch.rand(9000, generator=generator) ** 2 * 700).int().numpy(),
            "timestamp": range(9000),
        }
    )
    return fasttower.fit(frame, Config(**{**vars(CONFIG), "embedding_dim": 6, "epochs": 4}))


def ranking(run, vectors=None):
    """The engine's own top-K with nothing left out: (U, K)."""
    return top_k(
        run.model.infer_users(), run.model.infer_items(), k=K, item_bias=run.model.item_bias
    ).items.numpy()


def same(found, expected):
    """Share of the expected items that were found, over all users."""
    return np.mean([len(set(a) & set(b)) / K for a, b in zip(found, expected, strict=True)])


def test_numpy_arrays_multiply_to_the_scores_and_rows_are_those_of_the_ids(wide, tmp_path):
    files = wide.export(tmp_path / "out", "numpy")
    assert {path.name for path in files} == {path.name for path in (tmp_path / "out").iterdir()}
    users, items = (np.load(tmp_path / "out" / f"{name}_vectors.npy") for name in ("user", "item"))
    assert users.dtype == items.dtype == np.float32
    assert users.shape[1] == items.shape[1] == 7
    user_ids, item_ids = (
        pl.read_parquet(tmp_path / "out" / f"{name}.parquet") for name in ("users", "items")
    )
    pairs = pl.DataFrame(
        {"user": user_ids["user_id"].gather([5, 9]), "item": item_ids["item_id"].gather([3, 80])}
    )
    expected = wide.score(pairs)["score"]
    np.testing.assert_allclose([users[5] @ items[3], users[9] @ items[80]], expected, rtol=1e-5)
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert (about["dimensions"], about["users"], about["items"]) == (7, len(users), len(items))


def test_parquet_has_the_vectors_beside_the_ids(wide, tmp_path):
    wide.export(tmp_path / "out", "parquet")
    users, items = (pl.read_parquet(tmp_path / "out" / f"{name}.parquet") for name in ("users", "items"))
    assert users.columns == ["user_id", "vector"]
    assert items.columns == ["item_id", "vector"]
    best = (users["vector"].to_numpy() @ items["vector"].to_numpy().T).argmax(1)
    assert (best == ranking(wide)[:, 0]).mean() > 0.99  # up to ties


def test_a_faiss_index_has_the_models_own_ranking(wide, tmp_path):
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed: pip install -e '.[export]'")
    wide.export(tmp_path / "out", "faiss")
    index = faiss.read_index(str(tmp_path / "out" / "items.faiss"))
    scores, found = index.search(np.load(tmp_path / "out" / "user_vectors.npy"), K)
    expected = ranking(wide)
    rows, columns = (found != expected).nonzero()
    own = np.take_along_axis(all_scores(wide), expected.astype(np.int64), axis=1)
    # Where the items differ their scores are equal to rounding.
    np.testing.assert_allclose(scores[rows, columns], own[rows, columns], rtol=1e-5, atol=1e-6)
    assert same(found, expected) > 0.999


def all_scores(run):
    return (run.model.infer_users() @ run.model.infer_items().T + run.model.item_bias).detach().numpy()


def test_an_hnswlib_graph_finds_nearly_all_of_it(wide, tmp_path):
    hnswlib = pytest.importorskip(
        "hnswlib",
        reason="hnswlib is not installed: pip install -e '.[export]', which needs a C++ compiler",
    )
    wide.export(tmp_path / "out", "hnswlib")
    index = hnswlib.Index(space="ip", dim=7)
    index.load_index(str(tmp_path / "out" / "items.hnsw"))
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    index.set_ef(about["ef"])
    found, _ = index.knn_query(np.load(tmp_path / "out" / "user_vectors.npy"), K)
    recall = same(found, ranking(wide))
    assert recall > 0.95
    assert about[f"recall@{K}"] == pytest.approx(recall, abs=0.01)  # up to ties, and to the users asked


def test_a_model_without_a_bias_has_no_dimension_for_it(ratings, tmp_path):
    run = fasttower.fit(ratings, Config(**{**vars(CONFIG), "item_bias": False, "epochs": 1}))
    run.export(tmp_path / "out", "numpy")
    assert np.load(tmp_path / "out" / "item_vectors.npy").shape == (len(run.items), 4)
    assert np.load(tmp_path / "out" / "user_vectors.npy").shape == (len(run.users), 4)


def test_what_cannot_be_written_is_refused_before_anything_is(run, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(FastTowerError, match="not empty"):
        run.export(tmp_path / "full", "numpy")
    with pytest.raises(FastTowerError, match="expected one of faiss, hnswlib, numpy, parquet"):
        run.export(tmp_path / "new", "csv")
    with pytest.raises(FastTowerError, match="cannot be written"):
        run.export(tmp_path / "full" / "mine" / "below", "numpy")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(FastTowerError, match="needs the library faiss"):
        run.export(tmp_path / "new", "faiss")
    assert {path.name for path in tmp_path.iterdir()} == {"full"}
