"""RePlay's report, the frame of recommendations, and popularity on the published protocols."""

import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from fasttower.errors import FastTowerError
from fasttower.evaluation.popularity import item_popularity, most_popular
from fasttower.evaluation.ranking import ranking_metrics
from fasttower.evaluation.replay_report import replay_metrics
from fasttower.retrieval import IdMap, recommendation_frame
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.topk import TopK

USERS = pl.DataFrame({"user_id": ["a", "b", "c"], "user_index": [0, 1, 2]})
ITEMS = pl.DataFrame({"item_id": [10, 20, 30, 40], "item_index": [0, 1, 2, 3]})
FIT = pl.DataFrame({"user_id": ["a", "b", "c", "a"], "item_id": [10, 20, 30, 40]})


def frame(*rows):
    return pl.DataFrame(
        rows,
        schema={"user_id": pl.String, "item_id": pl.Int64, "score": pl.Float32, "rank": pl.Int32},
        orient="row",
    )


def test_a_frame_has_the_original_ids_without_absent_slots():
    topk = TopK(
        torch.tensor([[3, 0], [-1, -1], [2, -1]], dtype=torch.int32),
        torch.tensor([[2.5, 1.0], [-torch.inf, -torch.inf], [0.5, -torch.inf]]),
    )
    result = recommendation_frame(USERS["user_id"][[2, 0, 1]], topk, IdMap(ITEMS))
    assert result.equals(frame(("c", 40, 2.5, 1), ("c", 10, 1.0, 2), ("b", 30, 0.5, 1)))
    assert result.schema == frame().schema


def test_a_frame_without_recommendations_keeps_its_columns_and_types():
    topk = TopK(torch.full((1, 2), -1, dtype=torch.int32), torch.full((1, 2), -torch.inf))
    result = recommendation_frame(USERS["user_id"][:1], topk, IdMap(ITEMS))
    assert result.schema == frame().schema
    assert result.is_empty()


@pytest.mark.parametrize(
    ("user_index", "found", "items", "message"),
    [
        ([0, 1], [[0]], ITEMS, "expected \\(R,\\), \\(R, K\\) and \\(R, K\\)"),
        ([0], [[4]], ITEMS, "item_index goes up to 4; the map holds 0 to 3"),
        ([0], [[0]], ITEMS.reverse(), "sort it by item_index"),
    ],
)
def test_a_frame_refuses_what_does_not_fit_its_map(user_index, found, items, message):
    topk = TopK(torch.tensor(found, dtype=torch.int32), torch.zeros(len(found), 1))
    with pytest.raises(FastTowerError, match=message):
        recommendation_frame(USERS["user_id"][user_index], topk, IdMap(items))


def test_the_rank_decides_and_not_the_score_or_the_larger_id():
    # RePlay would put item 40 first, by its score and, were the scores equal, by its id.
    recommendations = frame(("a", 40, 9.0, 2), ("a", 10, 1.0, 1))
    test = pl.DataFrame({"user_id": ["a"], "item_id": [10]})
    assert replay_metrics(recommendations, test, FIT, 2)["MRR@2"] == 1.0
    assert replay_metrics(recommendations, test, FIT, 2, by="score")["MRR@2"] == 0.5


def test_only_the_first_k_of_test_users_count_and_repeated_pairs_count_once():
    recommendations = frame(("a", 10, 3.0, 1), ("a", 20, 2.0, 2), ("a", 30, 1.0, 3), ("b", 40, 1.0, 1))
    test = pl.DataFrame({"user_id": ["a", "a", "c"], "item_id": [20, 20, 10]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = replay_metrics(recommendations, test, FIT, 2)
    # User c has no recommendation and scores 0; b is not in test and adds nothing to Coverage.
    assert metrics["HitRate@2"] == 1 / 2
    assert metrics["Recall@2"] == 1 / 2
    assert metrics["MRR@2"] == 1 / 2 / 2
    assert metrics["MAP@2"] == 1 / 2 / 2
    assert metrics["Coverage@2"] == 2 / 4


def test_the_first_k_are_chosen_by_rank_also_where_the_scores_are_handed_over():
    tied = frame(("a", 10, 1.0, 1), ("a", 40, 1.0, 2))
    test = pl.DataFrame({"user_id": ["a"], "item_id": [10]})
    assert replay_metrics(tied, test, FIT, 1, by="score")["HitRate@1"] == 1.0


def test_no_recommendations_at_all_score_zero():
    test = pl.DataFrame({"user_id": ["a"], "item_id": [10]})
    metrics = replay_metrics(frame(), test, FIT, 10)
    assert metrics == {f"{name}@10": 0.0 for name in ("NDCG", "HitRate", "Recall", "MAP", "MRR", "Coverage")}


@pytest.mark.parametrize(
    ("test", "fit", "k", "message"),
    [
        (FIT.clear(), FIT, 10, "the test part is empty"),
        (FIT, FIT.clear(), 10, "the fit part is empty"),
        (FIT, FIT, 0, "k is 0"),
    ],
)
def test_nothing_to_measure_is_an_error(test, fit, k, message):
    with pytest.raises(FastTowerError, match=message):
        replay_metrics(frame(("a", 10, 1.0, 1)), test, fit, k)


def test_replay_is_imported_only_when_it_is_called():
    script = (
        "import sys, fasttower.evaluation; assert not {'torch', 'polars', 'replay'} & set(sys.modules); "
        "import fasttower.evaluation.replay_report; assert not {'torch', 'replay'} & set(sys.modules)"
    )
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def test_popularity_counts_distinct_users_and_ties_go_to_the_smaller_index():
    # Item 2 has three rows of one user, item 1 two users, items 0 and 3 one user each.
    user = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    item = torch.tensor([2, 2, 2, 1, 1, 3, 0])
    known = KnownPositives.from_pairs(user, item, 3, 4)
    assert item_popularity(known).tolist() == [1, 2, 1, 1]
    seen_left_out = most_popular(known, torch.tensor([2, 0]), k=3)
    assert seen_left_out.items.tolist() == [[1, 2, 3], [0, 3, -1]]
    assert seen_left_out.scores[0].tolist() == [2.0, 1.0, 1.0]
    assert most_popular(known, torch.tensor([0]), k=2, filter_seen=False).items.tolist() == [[1, 0]]


def movielens(name, member):
    root = os.environ.get("FASTTOWER_DATA")
    if not root:
        pytest.skip("FASTTOWER_DATA is not set: it names the folder of the MovieLens archives")
    with zipfile.ZipFile(Path(root) / f"{name}.zip") as archive:
        raw = archive.read(member).replace(b"::", b"\t")
    columns = ["user_id", "item_id", "rating", "timestamp"]
    return pl.read_csv(raw, separator="\t", has_header=False, new_columns=columns)


def time_split(ratings):
    ordered = ratings.sort("timestamp", maintain_order=True)
    cut = int(ordered.height * (1 - 0.2))
    fit, test = ordered[:cut], ordered[cut:]
    return fit, test.join(fit, on="user_id", how="semi").join(fit, on="item_id", how="semi")


def popularity_figures(fit, test):
    """RePlay's figures for popularity, by rank and by count, and those computed on the device."""
    users, items = (
        fit.select(f"{side}_id")
        .unique()
        .sort(f"{side}_id")
        .with_columns(pl.int_range(pl.len()).alias(f"{side}_index"))
        for side in ("user", "item")
    )
    test = test.select("user_id", "item_id").unique()

    def indices(part):
        part = part.join(users, on="user_id").join(items, on="item_id")
        return (
            torch.from_numpy(part[f"{side}_index"].to_numpy().astype(np.int64)) for side in ("user", "item")
        )

    known = KnownPositives.from_pairs(*indices(fit), users.height, items.height)
    test_users, test_items = indices(test)
    test_users, rows = test_users.unique(return_inverse=True)
    truth = KnownPositives.from_pairs(rows, test_items, len(test_users), items.height)
    topk = most_popular(known, test_users, k=10)
    recommendations = recommendation_frame(users["user_id"].gather(test_users.numpy()), topk, IdMap(items))
    return (
        replay_metrics(recommendations, test, fit, 10),
        replay_metrics(recommendations, test, fit, 10, by="score"),
        ranking_metrics(topk.items, truth, torch.ones(items.height, dtype=torch.bool), 10),
    )


def rounded(metrics):
    return [f"{metrics[f'{name}@10']:.4f}" for name in ("NDCG", "HitRate", "Coverage")]


def test_popularity_on_ml_1m_is_the_published_row():
    fit, test = time_split(movielens("ml-1m", "ml-1m/ratings.dat").filter(pl.col("rating") >= 3))
    assert (fit.height, test.height, test["user_id"].n_unique()) == (669_182, 86_541, 1_139)
    by_rank, by_count, on_device = popularity_figures(fit, test)
    assert rounded(by_rank) == rounded(by_count) == ["0.2437", "0.6453", "0.0339"]
    assert on_device == pytest.approx(by_rank, abs=1e-9)


def test_popularity_on_ml_100k_by_the_notebook_protocol():
    ratings = movielens("ml-100k", "ml-100k/u.data").filter(pl.len().over("user_id") >= 20)
    fit, test = time_split(ratings)
    test = test.filter(pl.col("rating") >= 4)
    assert (fit.height, test.height, test["user_id"].n_unique()) == (80_000, 1_571, 95)
    by_rank, by_count, on_device = popularity_figures(fit, test)
    # Counts are tied here: by RePlay's own rule the larger id is first, by the project's the smaller index.
    assert rounded(by_count) == ["0.1390", "0.4737", "0.0470"]
    assert rounded(by_rank) == ["0.1389", "0.4737", "0.0470"]
    assert on_device == pytest.approx(by_rank, abs=1e-9)
