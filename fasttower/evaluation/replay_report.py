"""The final report: RePlay's own metrics on recommendations in the caller's ids."""

from __future__ import annotations

from typing import Literal

import polars as pl

from fasttower.errors import FastTowerError

PAIR = ["user_id", "item_id"]


def replay_metrics(
    recommendations: pl.DataFrame,
    test: pl.DataFrame,
    fit: pl.DataFrame,
    k: int,
    by: Literal["rank", "score"] = "rank",
) -> dict[str, float]:
    """RePlay's NDCG, HitRate, Recall, MAP, MRR and Coverage of the first k recommendations.

    RePlay orders by the rating and breaks ties by the larger item id. By rank it is handed ``k + 1 - rank``,
    which has no ties, so that the order of the recommendations stands; by score it is handed the scores, as
    published rows of the popularity baseline are computed from counts, and orders equal ones by its own rule.
    Either way the first k by rank are chosen here.

    A test user without recommendations scores 0; one with fewer than k has misses in their place. Repeated
    test pairs count once, and only test users' recommendations count, in Coverage as well, which is relative
    to the distinct items of fit.

    Args:
        recommendations: user_id, item_id, score and rank (from 1); users outside test are not read.
        test: user_id, item_id: the relevant pairs.
        fit: user_id, item_id: the interactions that the model was fitted to; only its items are read.
        k: the cutoff, at least 1.
        by: what RePlay orders by.

    Returns:
        ``{"NDCG@k": .., "HitRate@k": .., "Recall@k": .., "MAP@k": .., "MRR@k": .., "Coverage@k": ..}``.

    Raises:
        FastTowerError: an empty test or fit part, or k below 1.
    """
    if k < 1:
        raise FastTowerError(f"k is {k}; ask for a cutoff of at least 1")
    for name, part in (("test", test), ("fit", fit)):
        if part.is_empty():
            raise FastTowerError(f"the {name} part is empty; change the split or the filters")

    from replay.metrics import MAP, MRR, NDCG, Coverage, HitRate, OfflineMetrics, Recall  # noqa: PLC0415

    truth = test.select(PAIR).unique()
    rating = pl.col("score") if by == "score" else k + 1 - pl.col("rank").cast(pl.Int64)
    recommended = (
        recommendations.filter(pl.col("rank") <= k)
        .join(truth, on="user_id", how="semi")
        .select(*PAIR, rating=rating)
    )
    columns = {"query_column": "user_id", "item_column": "item_id", "rating_column": "rating"}
    # Together, the metrics with a ground truth share its preparation; Coverage needs nothing but items.
    with_truth = OfflineMetrics([metric(k) for metric in (NDCG, HitRate, Recall, MAP, MRR)], **columns)
    values = with_truth(recommended, truth)
    values |= Coverage(k, **columns)(recommended, fit.select("item_id").unique())
    return {name: float(value) for name, value in values.items()}
