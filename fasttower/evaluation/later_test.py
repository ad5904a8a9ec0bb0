"""A finished run against interactions that came later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fasttower.data.later_rows import positives, read_later_rows
from fasttower.errors import FastTowerError, whole_number
from fasttower.evaluation.popularity import most_popular
from fasttower.evaluation.replay_report import replay_metrics
from fasttower.retrieval import recommendation_frame, with_index

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


def evaluate_run(
    run: Run,
    test: Any,  # noqa: ANN401 - frames of libraries that may not be there
    metrics: Sequence[str] | None,
    k: int,
    *,
    filter_seen: bool,
) -> Evaluation:
    """See `Run.evaluate`."""
    chosen = [metrics] if isinstance(metrics, str) else METRICS if metrics is None else metrics
    if not isinstance(chosen, Sequence) or not chosen or not all(name in METRICS for name in chosen):
        raise FastTowerError(f"metrics are {metrics!r}; expected some of {', '.join(METRICS)}.")
    k = whole_number("k", k)
    least = [value for value in (run.config.min_rating, run.config.test_min_rating) if value is not None]
    everything = read_later_rows(test, run.config, rated=bool(least))
    rows = positives(everything, max(least, default=None))
    known = with_index(with_index(rows, run.users), run.items).drop_nulls()
    if known.is_empty():
        raise FastTowerError(
            f"of the {len(everything):,} test rows {len(rows):,} are rated high enough, none of these is"
            " of a user and an item that the run knows; there is nothing to evaluate."
        )
    pairs = known.unique(["user_index", "item_index"], maintain_order=True)
    users = pairs.select("user_id", "user_index").unique(maintain_order=True)
    device = run.known_positives.items.device
    cutoff = min(k, len(run.items))  # beyond the catalogue there is nothing to be found
    recommended = run.recommend(users["user_id"], cutoff, filter_seen=filter_seen)
    popular = recommendation_frame(
        users["user_id"],
        most_popular(
            run.known_positives,
            torch.tensor(users["user_index"].to_numpy(), device=device),
            k=cutoff,
            filter_seen=filter_seen,
        ),
        run.items,
    )
    truth = pairs.select("user_id", "item_id")
    of_model = replay_metrics(recommended, truth, run.items, cutoff)
    of_popularity = replay_metrics(popular, truth, run.items, cutoff, by="rating")
    user_index, item_index = (
        torch.tensor(pairs[name].to_numpy(), dtype=torch.int64, device=device)
        for name in ("user_index", "item_index")
    )
    return Evaluation(
        metrics={f"{name}@{k}": of_model[f"{name}@{cutoff}"] for name in chosen},
        popularity={f"{name}@{k}": of_popularity[f"{name}@{cutoff}"] for name in chosen},
        users=len(users),
        pairs=len(pairs),
        pairs_in_fit=int(run.known_positives.contains(user_index, item_index).sum()),
        cold_rows=len(rows) - len(known),
        low_rated_rows=len(everything) - len(rows),
    )
