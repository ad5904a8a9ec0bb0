"""A run's directory: its files, and whether those that are read belong together."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasttower.config import Config, ResolvedTrainingConfig
from fasttower.errors import FastTowerError
from fasttower.model import TwoTower
from fasttower.run.new_directory import all_or_nothing
from fasttower.run.record import Record
from fasttower.training.observer import EpochRecord
from fasttower_kernels.known_positives import KnownPositives

FORMAT = 3
"""The format that runs are written in. Format 1, which has no number, calls the score a rating."""


def run_path(path: Any) -> Path:  # noqa: ANN401 - what it is, is looked at here
    """The path of a run directory, ``~`` expanded.

    Raises:
        FastTowerError: it is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise FastTowerError(f"the path is {path!r}; expected that of a directory.")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FastTowerError(f"{path} is no path that can be read: {error}.") from error


def write_run(record: Record, run_dir: Path) -> None:
    """Write a run's files into its directory, which exists and is empty.

    Raises:
        FastTowerError: a file cannot be written.
    """
    with all_or_nothing(run_dir) as path:
        config = record.config.to_json(device=record.device, backend=record.backend)
        write_json(path / "config.json", {"format": FORMAT, **config})
        _write_tensors(path / "model.safetensors", record.model.saved_tensors())
        record.users.write_parquet(path / "users.parquet")
        record.items.write_parquet(path / "items.parquet")
        lines = (json.dumps(dataclasses.asdict(epoch)) + "\n" for epoch in record.history)
        (path / "history.jsonl").write_text("".join(lines))
        record.recommendations.write_parquet(path / "recommendations.parquet")
        known = record.known_positives.to("cpu")
        tensors = {"indptr": known.indptr, "items": known.items}
        _write_tensors(path / "known_positives.safetensors", tensors)
        write_json(path / "metrics.json", record.metrics)


def read_run(path: Path) -> dict[str, Any]:
    """The fields of a `Record`, on the CPU, from its directory.

    Raises:
        FastTowerError: a file is missing, is not what it should be, or is another run's; or a newer version
            wrote the run.
    """
    try:
        config = _read_object(path / "config.json")
        written = _checked_format(path, config.pop("format", 1))
        metrics = _read_object(path / "metrics.json")
        if "l2" in metrics:  # what was chosen among several once stood there only
            l2 = metrics.pop("l2")
            config["l2"], metrics["settings"] = l2, f"L2 {l2:g}"
        lines = (path / "history.jsonl").read_text().splitlines()
        settings = Config.from_json(config)
        users, items = (pl.read_parquet(path / f"{name}.parquet") for name in ("users", "items"))
        fields = {
            "model": TwoTower.from_saved(
                load_file(path / "model.safetensors"), settings.resolved(0, 0).loss_settings.norm_temperature
            ),
            "users": users,
            "items": items,
            "config": settings,
            "device": config["device"],
            "backend": config["backend"],
            "history": [_epoch_record(line) for line in lines],
            "recommendations": _read_recommendations(path / "recommendations.parquet", written),
            "metrics": metrics,
            "known_positives": _read_known_positives(path / "known_positives.safetensors", items.height),
        }
        _check(**fields, written=written)
        fields["config"] = fields["config"].resolved(0, 0)  # the check saw that nothing is open
    except (FileNotFoundError, NotADirectoryError) as error:
        if not path.is_dir():
            found = "it is a file" if path.exists() else "there is nothing of that name"
            raise FastTowerError(f"{path} is not a run directory: {found}.") from error
        # Libraries say more than the name where they say the name at all.
        missing = [file for file in _FILES if not (path / file).exists()]
        found = f"{', '.join(missing)} not there" if missing else str(error)
        raise FastTowerError(f"{path} is not a run directory: {found}.") from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, pl.exceptions.PolarsError) as error:
        raise FastTowerError(f"{path} holds a damaged run: {error}.") from error
    return fields


_FILES = (
    "config.json",
    "metrics.json",
    "history.jsonl",
    "users.parquet",
    "items.parquet",
    "model.safetensors",
    "known_positives.safetensors",
    "recommendations.parquet",
)


_RESOLVED = tuple(ResolvedTrainingConfig.__annotations__)


def _check(
    model: TwoTower,
    users: pl.DataFrame,
    items: pl.DataFrame,
    config: Config,
    metrics: dict[str, Any],
    known_positives: KnownPositives,
    written: int,
    **_: object,
) -> None:
    """Raise ValueError where the parts are not of one run: in what follows rows are found by position."""
    for kind, id_map, tower in (("user", users, model.user_tower), ("item", items, model.item_tower)):
        if id_map.columns[:2] != [f"{kind}_id", f"{kind}_index"]:
            raise ValueError(f"{kind}s.parquet has the columns {', '.join(id_map.columns)}")
        if not np.array_equal(id_map[f"{kind}_index"].to_numpy(), np.arange(tower.num_rows)):
            raise ValueError(
                f"{kind}s.parquet has {id_map.height} rows that are not in the order of {kind}_index, or not"
                f" those of the model, which has {tower.num_rows}"
            )
        ids = id_map[f"{kind}_id"]
        is_id = ids.dtype.is_integer() or ids.dtype == pl.String
        if ids.null_count() or ids.n_unique() < len(ids) or not is_id:
            raise ValueError(f"{kind}s.parquet has ids that are missing, there twice, or of type {ids.dtype}")
    if (model.embedding_dim, model.item_bias is not None) != (config.embedding_dim, config.item_bias):
        raise ValueError("config.json is of another model than model.safetensors")
    needed = ["embedding_dim", "init_scale", "batch_size"] if written < 3 else _RESOLVED
    if missing := [name for name in needed if name not in config.given]:
        raise ValueError(f"config.json leaves open: {', '.join(missing)}")
    if not isinstance(metrics.get("settings"), str) or "best_epoch" not in metrics:
        raise ValueError("metrics.json does not say with which settings, and for how many epochs")
    if not _is_rows(known_positives.indptr, known_positives.items, users.height, items.height):
        raise ValueError("known_positives.safetensors does not hold rows of these users and items")


def _is_rows(indptr: Tensor, items: Tensor, num_users: int, num_items: int) -> bool:
    """Whether these are the compressed rows of a `KnownPositives`."""
    if (
        items.ndim != 1
        or indptr.shape != (num_users + 1,)
        or int(indptr[0]) != 0
        or int(indptr[-1]) != len(items)
    ):
        return False
    degrees = indptr[1:] - indptr[:-1]
    if (degrees < 0).any() or (len(items) and not 0 <= int(items.min()) <= int(items.max()) < num_items):
        return False
    rows = torch.repeat_interleave(degrees)
    keys = rows * num_items + items
    return bool((keys[1:] > keys[:-1]).all())


def _checked_format(path: Path, number: Any) -> int:  # noqa: ANN401 - what it is, is looked at here
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"config.json says that its format is {number!r}, not a number from 1 on")
    if number > FORMAT:
        raise FastTowerError(
            f"{path} was written in format {number} by a newer fasttower; this one reads up to {FORMAT};"
            " update fasttower."
        )
    return number


def _epoch_record(line: str) -> EpochRecord:
    fields = {"cut": None, **json.loads(line)}
    if "l2" in fields:
        fields["settings"] = f"L2 {fields.pop('l2'):g}"
    return EpochRecord(**fields)


def _read_recommendations(path: Path, written: int) -> pl.DataFrame:
    frame = pl.read_parquet(path)
    return frame.rename({"rating": "score"}) if written == 1 else frame


def _read_known_positives(path: Path, num_items: int) -> KnownPositives:
    tensors = load_file(path)
    try:
        return KnownPositives(tensors["indptr"], tensors["items"], num_items)
    except FastTowerError as error:
        raise ValueError(f"{path.name}: {str(error).rstrip('.')}") from error


def _read_object(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} holds a {type(values).__name__}, not an object")  # noqa: TRY004
    return values


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write an object as people read it."""
    path.write_text(json.dumps(values, indent=2) + "\n")


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path)
    # safetensors lets only the owner read what it writes; whoever may read the rest may read this.
    shutil.copymode(path.parent / "config.json", path)
