"""Going on from a run with more interactions, with users and items that it has not seen."""

from __future__ import annotations

import dataclasses
import time
import warnings
from typing import Any, TypeVar

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fasttower.config import ResolvedConfig
from fasttower.data.later_rows import positives, read_later_rows
from fasttower.device import cpu_cores, cpu_threads, fallback_note, memory_of
from fasttower.errors import FastTowerError, whole_number
from fasttower.retrieval import IdMap, recommend_to_all
from fasttower.run.record import Outcome, Record
from fasttower.training.data import TrainingData
from fasttower.training.extension import extended_model
from fasttower.training.observer import Observer
from fasttower.training.plan import Plan
from fasttower.training.trainer import Trainer
from fasttower_kernels.backends import choose_backend
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.tables import Interactions

AnyRecord = TypeVar("AnyRecord", bound=Record)


def update(
    record: AnyRecord,
    interactions: Any,  # noqa: ANN401 - frames of libraries that may not be there
    *,
    epochs: int,
    observer: Observer,
) -> AnyRecord:
    """See `Run.update`."""
    epochs = whole_number("epochs", epochs)
    began = time.perf_counter()
    config = record.config
    rows = positives(
        read_later_rows(interactions, config, rated=config.min_rating is not None), config.min_rating
    )
    if rows.is_empty():
        raise FastTowerError(
            f"no row is rated at least {config.min_rating:g}, the run's min_rating: nothing to learn from."
        )
    users, rows, old_users = _extended(record.retriever.users, rows)
    items, rows, old_items = _extended(record.retriever.items, rows)

    known = record.known_positives
    device = known.items.device
    config, backend = _with_backend(config, device)
    old_users, old_items = old_users.to(device), old_items.to(device)
    before = torch.repeat_interleave(old_users, known.degrees), old_items[known.items.long()]
    pairs = Interactions(
        *(
            torch.cat([old.int(), torch.from_numpy(rows[name].to_numpy().astype(np.int32)).to(device)])
            for old, name in zip(before, ("user_index", "item_index"), strict=True)
        )
    )
    known = KnownPositives.from_pairs(pairs.user_index, pairs.item_index, users.height, items.height)
    model = extended_model(record.model, old_users, old_items, pairs, users.height, items.height, config)
    # The run may have been trained on a machine with more cores.
    with memory_of(device, "fewer rows"), cpu_threads(config.threads and min(config.threads, cpu_cores())):
        data, plan = (
            TrainingData(pairs, known),
            Plan((config.seed,), epochs, name="update"),
        )
        history = Trainer(data, config, plan=plan, model=model, observer=observer).train().history
        recommendations = recommend_to_all(model, known, users, items, config)
    metrics: Outcome = {
        "test": {},
        "popularity": {},
        "test_users": 0,
        "settings": record.metrics["settings"],
        "best_epoch": record.metrics["best_epoch"],
        "interrupted": observer.should_stop(),
        "updates": [
            *record.metrics.get("updates", []),
            {"rows": len(rows), "new_users": users.height - record.users.height,
             "new_items": items.height - record.items.height, "epochs": len(history)},
        ],
        "timing_s": {"total": time.perf_counter() - began},
        "device": str(device),
        "backend": backend,
    }  # fmt: skip
    return dataclasses.replace(
        record,
        model=model,
        users=users,
        items=items,
        config=config,
        device=str(device),
        backend=backend,
        history=[*record.history, *history],
        recommendations=recommendations,
        metrics=metrics,
        known_positives=known,
    )


def _with_backend(config: ResolvedConfig, device: torch.device) -> tuple[ResolvedConfig, str]:
    """The configuration and the backend of an update, which may be on another device than the run was.

    Warns where the backend that the run asked for cannot run there, and auto takes its place.
    """
    try:
        backend, why = choose_backend(config.backend, device)
        line = fallback_note(str(device), backend, why)
    except FastTowerError as error:
        backend, why = choose_backend("auto", device)
        line = f"the run asked for backend {config.backend} ({error}); the update takes {backend}, {why}."
        config = dataclasses.replace(config, backend="auto")
    if backend == "numba":  # it reads the tables, which are float32 in every run, as they are
        config = dataclasses.replace(config, table_dtype="float32")
    if line is not None:
        warnings.warn(line, stacklevel=4)  # where Run.update was called
    return config, backend


def _extended(id_map: IdMap, rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, Tensor]:
    """The map with the ids of the rows in it, the rows with its indices, and where its old rows went."""
    column, index = id_map.id_name, id_map.index_name
    unknown = id_map.with_index(rows).filter(pl.col(index).is_null())[column].unique()
    ids = pl.concat(_of_one_type(id_map.ids, unknown)).sort()
    extended = pl.DataFrame({column: ids, index: np.arange(len(ids), dtype=np.int32)})
    lookup = IdMap(extended)
    places = lookup.with_index(id_map.ids.to_frame())[index]
    if "title" in id_map.frame.columns:
        titles = pl.DataFrame({index: places, "title": id_map.frame["title"]})
        extended = extended.join(titles, on=index, how="left", maintain_order="left")
    return extended, lookup.with_index(rows), torch.from_numpy(places.to_numpy().astype(np.int64))


def _of_one_type(old: pl.Series, new: pl.Series) -> tuple[pl.Series, pl.Series]:
    """The ids of a run and new ones in the run's type, or in 64 bits where that is too narrow."""
    for dtype in (old.dtype, pl.Int64, pl.UInt64):
        try:
            return old.cast(dtype), new.cast(dtype)
        except pl.exceptions.InvalidOperationError:
            continue
    raise FastTowerError(
        f"{old.name} is {old.dtype} in the run and {new.dtype} in the new rows, which no type of 64 bits"
        " holds together; write the new rows with the run's type."
    )
