"""Going on from a run with more interactions, with users and items that it has not seen."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fasttower.data.later_rows import read_later_rows, with_index
from fasttower.device import cpu_cores, cpu_threads
from fasttower.errors import FastTowerError
from fasttower.retrieval import recommend
from fasttower.training.extension import extended_model
from fasttower.training.trainer import Observer, train
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.tables import Interactions

if TYPE_CHECKING:
    from fasttower.run import Run


def update_run(run: Run, interactions: Any, *, epochs: int, observer: Observer) -> Run:  # noqa: ANN401
    """See `Run.update`."""
    if epochs < 1:
        raise FastTowerError(f"epochs is {epochs}; expected 1 or more.")
    began = time.perf_counter()
    config, l2 = run.config, run.metrics["l2"]
    rows = read_later_rows(interactions, config, config.min_rating)
    users, rows, old_users = _extended(run.users, rows)
    items, rows, old_items = _extended(run.items, rows)

    known = run.known_positives
    device = known.items.device
    old_users, old_items = old_users.to(device), old_items.to(device)
    before = torch.repeat_interleave(old_users, known.degrees), old_items[known.items.long()]
    positives = Interactions(
        *(
            torch.cat([old.int(), torch.from_numpy(rows[name].to_numpy().astype(np.int32)).to(device)])
            for old, name in zip(before, ("user_index", "item_index"), strict=True)
        )
    )
    known = KnownPositives.from_pairs(positives.user_index, positives.item_index, users.height, items.height)
    model = extended_model(run.model, old_users, old_items, positives, users.height, items.height, config, l2)
    # The run may have been trained on a machine with more cores.
    with cpu_threads(config.threads and min(config.threads, cpu_cores())):
        history = train(
            model, positives, known, config, l2=l2, epochs=epochs, phase="update", observer=observer
        )
    everybody = torch.arange(users.height, device=device)
    frames = recommend(
        model.infer_users(),
        users["user_id"],
        model,
        items.select("item_id", "item_index"),
        k=config.k,
        seen=known if config.filter_seen else None,
        seen_users=everybody,
    )
    metrics = {
        "l2": l2,
        "best_epoch": run.metrics["best_epoch"],
        "interrupted": observer.should_stop(),
        "updates": [
            *run.metrics.get("updates", ()),
            {"rows": len(rows), "new_users": users.height - run.users.height,
             "new_items": items.height - run.items.height, "epochs": len(history)},
        ],
        "timing_s": {"total": time.perf_counter() - began},
        "device": run.device,
        "backend": run.backend,
    }  # fmt: skip
    return dataclasses.replace(
        run,
        model=model,
        users=users,
        items=items,
        history=[*run.history, *history],
        recommendations=pl.concat(frames),
        metrics=metrics,
        known_positives=known,
    )


def _extended(id_map: pl.DataFrame, rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, Tensor]:
    """The map with the ids of the rows in it, the rows with its indices, and where its old rows went."""
    column, index = id_map.columns[:2]
    unknown = with_index(rows, id_map).filter(pl.col(index).is_null())[column].unique()
    ids = pl.concat([id_map[column], unknown.cast(id_map.schema[column])]).sort()
    joined = pl.DataFrame({column: ids, index: np.arange(len(ids), dtype=np.int32)})
    if "title" in id_map.columns:
        titles = id_map.select(column, "title")
        joined = joined.join(titles, on=column, how="left", maintain_order="left")
    places = with_index(id_map.select(column), joined)[index]
    return joined, with_index(rows, joined), torch.from_numpy(places.to_numpy().astype(np.int64))
