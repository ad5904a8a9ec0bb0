"""Whether what was read from a run's files is what a run holds: later, rows are found by their position."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fasttower.config import Config, ResolvedTrainingConfig
from fasttower.errors import shown
from fasttower.model import TwoTower
from fasttower.run.record import Outcome
from fasttower.typed import check_typed
from fasttower_kernels.known_positives import KnownPositives

_RESOLVED = tuple(ResolvedTrainingConfig.__annotations__)


def check_tables(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError where the tensors of ``model.safetensors`` are not float32 and finite."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"model.safetensors has {shown(name)} in {tensor.dtype}; expected float32")
        # Both ends are NaN where there is one.
        if tensor.numel() and not all(math.isfinite(float(end)) for end in torch.aminmax(tensor)):
            raise ValueError(f"model.safetensors has numbers in {shown(name)} that are not finite")


def check_parts(
    model: TwoTower,
    users: pl.DataFrame,
    items: pl.DataFrame,
    config: Config,
    metrics: dict[str, Any],
    known_positives: KnownPositives,
    recommendations: pl.DataFrame,
    written: int,
    **_: object,
) -> None:
    """Raise ValueError where the parts are not of one run.

    Args:
        model: as in `Record`, as the other parts are.
        users: likewise.
        items: likewise.
        config: likewise, but for fields that may be open.
        metrics: likewise.
        known_positives: likewise.
        recommendations: likewise.
        written: the format.
    """
    for kind, id_map, tower in (("user", users, model.user_tower), ("item", items, model.item_tower)):
        _check_map(kind, id_map, tower.num_rows)
    if (model.embedding_dim, model.item_bias is not None) != (config.embedding_dim, config.item_bias):
        raise ValueError("config.json is of another model than model.safetensors")
    needed = ["embedding_dim", "init_scale", "batch_size"] if written < 3 else _RESOLVED
    unread = {"temperature"} if config.similarity == "dot" else set()
    if missing := [name for name in needed if name not in config.given.keys() | unread]:
        raise ValueError(f"config.json leaves open: {', '.join(missing)}")
    _check_metrics(metrics)
    if not is_rows(known_positives.indptr, known_positives.items, users.height, items.height):
        raise ValueError("known_positives.safetensors does not hold rows of these users and items")
    _check_recommendations(recommendations, users, items)


def _check_map(kind: str, id_map: pl.DataFrame, rows: int) -> None:
    name, index = f"{kind}s.parquet", f"{kind}_index"
    if id_map.columns not in ([f"{kind}_id", index], [f"{kind}_id", index, "title"]):
        raise ValueError(f"{name} has the columns {shown(', '.join(id_map.columns))}")
    if id_map[index].dtype != pl.Int32 or not np.array_equal(id_map[index].to_numpy(), np.arange(rows)):
        raise ValueError(
            f"{name} has {id_map.height} rows that are not in the order of {index}, or not those of the"
            f" model, which has {rows}"
        )
    ids = id_map[f"{kind}_id"]
    is_id = ids.dtype == pl.String or (ids.dtype.is_integer() and ids.dtype != pl.Int128)
    if ids.null_count() or ids.n_unique() < len(ids) or not is_id:
        raise ValueError(f"{name} has ids that are missing, there twice, or of type {ids.dtype}")
    if not ids.is_sorted():  # every run's are, and another order is that of other tables
        raise ValueError(f"{name} has ids that are out of order")
    if "title" in id_map.columns and id_map["title"].dtype != pl.String:
        raise ValueError(f"{name} has titles of type {id_map['title'].dtype}")


def is_rows(indptr: Tensor, items: Tensor, num_users: int, num_items: int) -> bool:
    """Whether these are the compressed rows of a `KnownPositives`."""
    if items.ndim != 1 or indptr.shape != (num_users + 1,):
        return False
    # Compared, and not subtracted: a difference may wrap around.
    if int(indptr[0]) != 0 or int(indptr[-1]) != len(items) or (indptr[1:] < indptr[:-1]).any():
        return False
    if len(items) and not 0 <= int(items.min()) <= int(items.max()) < num_items:
        return False
    rising = items[1:] > items[:-1]
    starts = indptr[1:-1]
    rising[starts[(starts > 0) & (starts < len(items))] - 1] = True  # from one row to the next it may fall
    return bool(rising.all())


def _check_metrics(metrics: dict[str, Any]) -> None:
    check_typed(metrics, Outcome, "metrics.json")
    if missing := sorted(metrics["test"].keys() - metrics["popularity"].keys()):
        raise ValueError(f"metrics.json lacks {shown(missing[0])} of popularity")
    if metrics["test_users"] < 0 or metrics["best_epoch"] < 0:
        raise ValueError("metrics.json counts fewer users or epochs than none")


def _check_recommendations(frame: pl.DataFrame, users: pl.DataFrame, items: pl.DataFrame) -> None:
    name = "recommendations.parquet"
    expected = {
        "user_id": users.schema["user_id"],
        "item_id": items.schema["item_id"],
        "score": pl.Float32,
        "rank": pl.Int32,
    }
    if dict(frame.schema) != expected:
        found = ", ".join(f"{column} {dtype}" for column, dtype in frame.schema.items())
        raise ValueError(f"{name} has the columns {shown(found)}")
    if any(column.null_count() for column in frame) or not frame["score"].is_finite().all():
        raise ValueError(f"{name} has values that are missing or not finite")
    if frame.height and frame["rank"].min() < 1:  # type: ignore[operator]
        raise ValueError(f"{name} has ranks below 1")
    for column, known in (("user_id", users), ("item_id", items)):
        if not frame[column].unique().is_in(known[column].implode()).all():
            raise ValueError(f"{name} has values of {column} that the run does not know")
