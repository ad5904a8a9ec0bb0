"""A finished run against interactions that came later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fasttower.data.later_rows import read_later_rows, with_index
from fasttower.errors import FastTowerError
from fasttower.evaluation.popularity import most_popular
from fasttower.evaluation.replay_report import replay_metrics
from fasttower.retrieval import recommendation_frame

if TYPE_CHECKING:
    from fasttower.run import Run

METRICS = ("NDCG", "HitRate", "Recall", "MAP", "MRR", "Coverage")


@dataclass(frozen=True)
class Evaluation:
    """What `Run.evaluate` returns.

    Attributes:
        metrics: of the model, such as ``{"NDCG@10": ..}``.
        popularity: of the items by their number of users in the training data, under the same rules.
        users: test users that the metrics are means over.
        pairs: unique pairs of known users and items that they were measured on.
        cold_rows: rows dropped because the run does not know their user or their item.
    """

    metrics: dict[str, float]
    popularity: dict[str, float]
    users: int
    pairs: int
    cold_rows: int


def evaluate_run(
    run: Run,
    test: Any,  # noqa: ANN401 - frames of libraries that may not be there
    metrics: Sequence[str] | None,
    k: int,
    *,
    filter_seen: bool,
) -> Evaluation:
    """See `Run.evaluate`."""
    chosen = METRICS if metrics is None else [metrics] if isinstance(metrics, str) else list(metrics)
    if not chosen or not set(chosen) <= set(METRICS):
        raise FastTowerError(f"metrics are {chosen}; expected some of {', '.join(METRICS)}.")
    least = [value for value in (run.config.min_rating, run.config.test_min_rating) if value is not None]
    rows = read_later_rows(test, run.config, max(least, default=None))
    rows = with_index(with_index(rows, run.users), run.items)
    known = rows.drop_nulls()
    if known.is_empty():
        raise FastTowerError(
            f"none of the {len(rows):,} test rows is of a user and an item that the run knows;"
            " there is nothing to evaluate."
        )
    truth = known.select("user_id", "item_id").unique()
    users = known.select("user_id", "user_index").unique(maintain_order=True)
    index = torch.tensor(users["user_index"].to_numpy(), device=run.known_positives.items.device)
    popular = recommendation_frame(
        users["user_id"],
        most_popular(run.known_positives, index, k=min(k, len(run.items)), filter_seen=filter_seen),
        run.items,
    )
    recommended = run.recommend(users["user_id"], k, filter_seen=filter_seen)
    of_model = replay_metrics(recommended, truth, run.items, k)
    of_popularity = replay_metrics(popular, truth, run.items, k, by="rating")
    names = [f"{name}@{k}" for name in chosen]
    return Evaluation(
        metrics={name: of_model[name] for name in names},
        popularity={name: of_popularity[name] for name in names},
        users=len(users),
        pairs=len(truth),
        cold_rows=len(rows) - len(known),
    )
