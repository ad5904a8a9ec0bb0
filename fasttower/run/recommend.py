"""What a run's model says of users and items, known and new."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fasttower.data.later_rows import positives, read_later_rows
from fasttower.device import memory_of
from fasttower.errors import FastTowerError
from fasttower.retrieval.ids import Unknown, check_choice
from fasttower.run.record import Record
from fasttower.training.fold_in import fold_in
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.topk import Scoring


class Request(NamedTuple):
    """What is asked of a recommendation; see `Run.recommend`."""

    k: int
    filter_seen: bool = True
    deny: Any = None
    allow: Any = None
    unknown: Unknown = "raise"
    scoring: Scoring = "float32"
    memory_budget_bytes: int | None = None


def recommend(record: Record, users: Any, request: Request) -> Iterator[pl.DataFrame]:  # noqa: ANN401
    """See `Run.recommend_in_blocks`."""
    check_choice(request.unknown)
    index = None if users is None else record.retriever.users.find(users, request.unknown)
    with enough_memory(record):
        frames = record.retriever.recommend(
            index,
            k=request.k,
            filter_seen=request.filter_seen,
            candidates=_candidates(record, request.deny, request.allow),
            scoring=request.scoring,
            memory_budget_bytes=request.memory_budget_bytes,
        )
    return _watched(record, frames)


def recommend_new(record: Record, interactions: Any, request: Request) -> Iterator[pl.DataFrame]:  # noqa: ANN401
    """See `Run.recommend_new_in_blocks`."""
    config, retriever = record.config, record.retriever
    maps, rated = (record.users, record.items), config.min_rating is not None
    rows = read_later_rows(interactions, config, rated=rated, like=maps)
    user_ids = rows["user_id"].unique(maintain_order=True)
    rows = retriever.items.known(rows, request.unknown)
    numbered = user_ids.to_frame().with_row_index("user_index")
    rows = rows.join(numbered, on="user_id", how="left", maintain_order="left")
    touched, seen = (
        KnownPositives.from_pairs(
            retriever.on_device(some["user_index"].to_numpy()),
            retriever.on_device(some["item_index"].to_numpy()),
            len(user_ids),
            len(retriever.items),
        )
        for some in (positives(rows, config.min_rating), rows)
    )
    model = record.model
    with enough_memory(record):
        vectors = fold_in(
            touched,
            model.infer_items(),
            model.item_bias,
            config.loss_settings,
            record.negatives,
        )
    users = torch.arange(len(user_ids), device=vectors.device)
    if model.item_bias is None:  # then nothing is known of who has touched nothing
        users = users[touched.degrees > 0]
    frames = retriever.recommend_to_vectors(
        vectors[users],
        user_ids[users.cpu().numpy()],
        k=request.k,
        seen=seen if request.filter_seen else None,
        seen_users=users,
        candidates=_candidates(record, request.deny, request.allow),
        scoring=request.scoring,
        memory_budget_bytes=request.memory_budget_bytes,
    )
    return _watched(record, frames)


def score(record: Record, pairs: Any, unknown: Unknown) -> pl.DataFrame:  # noqa: ANN401
    """See `Run.score`."""
    rows = read_later_rows(pairs, record.config, like=(record.users, record.items))
    for id_map in (record.retriever.users, record.retriever.items):
        rows = id_map.known(rows, unknown)
    with enough_memory(record):
        logits = record.retriever.score(rows["user_index"].to_numpy(), rows["item_index"].to_numpy())
    return rows.select("user_id", "item_id", score=pl.Series(logits))


def similar_items(record: Record, items: Any, k: int, unknown: Unknown) -> pl.DataFrame:  # noqa: ANN401
    """See `Run.similar_items`."""
    index = record.retriever.items.find(items, unknown)
    with enough_memory(record):
        return record.retriever.similar_items(index, k)


def similar_users(record: Record, users: Any, k: int, unknown: Unknown) -> pl.DataFrame:  # noqa: ANN401
    """See `Run.similar_users`."""
    index = record.retriever.users.find(users, unknown)
    with enough_memory(record):
        return record.retriever.similar_users(index, k)


def enough_memory(record: Record) -> AbstractContextManager[None]:
    """Where the device's memory runs out inside the block, the error says what to do."""
    device = record.known_positives.items.device
    return memory_of(device, "a smaller memory budget or fewer users and items at a time")


def _watched(record: Record, frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The frames, made with an eye on the device's memory."""
    with enough_memory(record):
        yield from frames


def _candidates(record: Record, deny: Any, allow: Any) -> Tensor | None:  # noqa: ANN401
    """(I,), bool: the items that may be given; None for all."""
    if deny is None and allow is None:
        return None
    items = record.retriever.items
    allowed = np.full(len(items), allow is None)
    if allow is not None:
        allowed[items.find(allow, "skip")] = True
    if deny is not None:
        allowed[items.find(deny, "skip")] = False
    if not allowed.any():
        raise FastTowerError(
            "deny and allow leave no item that the run knows; allow at least one of its items."
        )
    return torch.from_numpy(allowed).to(record.known_positives.items.device)
