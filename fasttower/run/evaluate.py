"""A run against interactions that came later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from fasttower.data.later_rows import positives, read_later_rows
from fasttower.errors import FastTowerError, quoted, whole_number
from fasttower.evaluation.popularity import most_popular
from fasttower.evaluation.replay_report import replay_metrics
from fasttower.retrieval import recommendation_frame
from fasttower.run.recommend import enough_memory
from fasttower.run.record import Record

METRICS = ("NDCG", "HitRate", "Recall", "MAP", "MRR", "Coverage")


@dataclass(frozen=True)
class Evaluation:
    """What `Run.evaluate` returns.

    Attributes:
        metrics: of the model, such as ``{"NDCG@10": ..}``.
        popularity: of the items by their number of users in the training data, under the same rules.
        users: test users that the metrics are means over.
        pairs: unique pairs of known users and items that they were measured on.
        pairs_in_fit: pairs among these that the run was fitted to: where seen items are left out, each is a
            miss.
        cold_rows: rows dropped because the run does not know their user or their item.
        low_rated_rows: rows dropped because they are rated too low to be relevant.
    """

    metrics: dict[str, float]
    popularity: dict[str, float]
    users: int
    pairs: int
    pairs_in_fit: int
    cold_rows: int
    low_rated_rows: int


def evaluate(
    record: Record,
    test: Any,  # noqa: ANN401 - frames of libraries that may not be there
    metrics: Sequence[str] | None,
    k: int,
    *,
    filter_seen: bool,
) -> Evaluation:
    """See `Run.evaluate`."""
    chosen = [metrics] if isinstance(metrics, str) else METRICS if metrics is None else metrics
    if not isinstance(chosen, Sequence) or not chosen or not all(name in METRICS for name in chosen):
        raise FastTowerError(f"metrics are {quoted(metrics)}; expected some of {', '.join(METRICS)}.")
    k = whole_number("k", k)
    config, retriever = record.config, record.retriever
    least = [value for value in (config.min_rating, config.test_min_rating) if value is not None]
    everything = read_later_rows(test, config, rated=bool(least))
    rows = positives(everything, max(least, default=None))
    known = retriever.items.with_index(retriever.users.with_index(rows)).drop_nulls()
    if known.is_empty():
        raise FastTowerError(
            f"of the {len(everything):,} test rows {len(rows):,} are rated high enough, none of these is"
            " of a user and an item that the run knows; there is nothing to evaluate."
        )
    pairs = known.unique(["user_index", "item_index"], maintain_order=True)
    users = pairs.select("user_id", "user_index").unique(maintain_order=True)
    cutoff = min(k, len(record.items))  # beyond the catalogue there is nothing to be found
    with enough_memory(record):
        index = users["user_index"].to_numpy()
        recommended = pl.concat(retriever.recommend(index, k=cutoff, filter_seen=filter_seen))
        topk = most_popular(
            record.known_positives, retriever.on_device(index), k=cutoff, filter_seen=filter_seen
        )
        popular = recommendation_frame(users["user_id"], topk, retriever.items)
        seen = record.known_positives.contains(
            *(retriever.on_device(pairs[name].to_numpy()) for name in ("user_index", "item_index"))
        )
    truth = pairs.select("user_id", "item_id")
    of_model = replay_metrics(recommended, truth, record.items, cutoff)
    of_popularity = replay_metrics(popular, truth, record.items, cutoff, by="score")
    return Evaluation(
        metrics={f"{name}@{k}": of_model[f"{name}@{cutoff}"] for name in chosen},
        popularity={f"{name}@{k}": of_popularity[f"{name}@{cutoff}"] for name in chosen},
        users=len(users),
        pairs=len(pairs),
        pairs_in_fit=int(seen.sum()),
        cold_rows=len(rows) - len(known),
        low_rated_rows=len(everything) - len(rows),
    )
