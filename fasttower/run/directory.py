"""A run's directory: its files, and whether those that are read belong together."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasttower.config import Config
from fasttower.errors import FastTowerError, listed, quoted, reason, shown
from fasttower.files import check_regular, open_regular
from fasttower.json_files import MOST_BYTES, parse_object, read_object, write_object
from fasttower.model import TwoTower
from fasttower.run.checks import check_parts, check_tables
from fasttower.run.manifest import (
    MANIFEST,
    check_manifest,
    newer_format,
    without_manifest,
    write_manifest,
)
from fasttower.run.new_directory import all_or_nothing
from fasttower.run.record import Record
from fasttower.training.observer import EpochRecord
from fasttower.typed import check_typed
from fasttower_kernels.known_positives import KnownPositives

FORMAT = 4
"""The format that runs are written in. Format 1, which has no number, calls the score a rating; the manifest
came with format 4."""


def write_run(record: Record, run_dir: Path) -> None:
    """Write a run's files into its directory, which exists and is empty.

    Raises:
        FastTowerError: a file cannot be written.
    """
    with all_or_nothing(run_dir, last=MANIFEST) as path:
        config = record.config.to_json(device=record.device, backend=record.backend)
        write_object(path / "config.json", {"format": FORMAT, **config})
        _write_tensors(path / "model.safetensors", record.model.saved_tensors())
        record.users.write_parquet(path / "users.parquet")
        record.items.write_parquet(path / "items.parquet")
        lines = (json.dumps(dataclasses.asdict(epoch)) + "\n" for epoch in record.history)
        (path / "history.jsonl").write_text("".join(lines), encoding="utf-8")
        record.recommendations.write_parquet(path / "recommendations.parquet")
        known = record.known_positives.to("cpu")
        tensors = {"indptr": known.indptr, "items": known.items}
        _write_tensors(path / "known_positives.safetensors", tensors)
        write_object(path / "metrics.json", record.metrics)
        write_manifest(path, FILES, FORMAT)


def read_run(path: Path, *, trust_files: bool = False) -> dict[str, Any]:
    """The fields of a `Record`, on the CPU, from its directory.

    What the files hold is checked in any case, before compiled code reads it.

    Args:
        path: the directory.
        trust_files: do not ask for the manifest.

    Raises:
        FastTowerError: a file is missing, is not what it should be, or is not the one that the run was
            written with; or a newer version wrote the run.
    """
    try:
        if not trust_files:
            _check_whole(path)
        return _read_parts(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not path.is_dir():
            found = "it is a file" if path.exists() else "there is nothing of that name"
            raise FastTowerError(f"{shown(path)} is not a run directory: {found}.") from error
        # Libraries say more than the name where they say the name at all.
        missing = [file for file in FILES if not (path / file).exists()]
        found = f"{', '.join(missing)} not there" if missing else reason(error)
        raise FastTowerError(f"{shown(path)} is not a run directory: {found}.") from error
    except OSError as error:
        raise FastTowerError(f"{shown(error.filename or path)} cannot be read: {reason(error)}.") from error


FILES = (
    "config.json",
    "metrics.json",
    "history.jsonl",
    "users.parquet",
    "items.parquet",
    "model.safetensors",
    "known_positives.safetensors",
    "recommendations.parquet",
)
"""What a run's directory holds beside the manifest."""


def _check_whole(path: Path) -> None:
    """Check the files against the manifest, or say that there is none."""
    if (path / MANIFEST).exists():
        check_manifest(path, FILES, FORMAT)
    elif (path / "config.json").exists():
        with contextlib.suppress(ValueError):
            number = read_object(path / "config.json").get("format", 1)
            if isinstance(number, int) and number > FORMAT:
                raise newer_format(path, number, FORMAT)
            raise without_manifest(path, number)
        raise without_manifest(path, None)
    else:
        raise FileNotFoundError


def _read_parts(path: Path) -> dict[str, Any]:
    try:
        config = _read_json(path / "config.json")
        number = _format(config.pop("format", 1))
        if number <= FORMAT:
            return _parts(path, config, number)
    except (
        ValueError,
        FastTowerError,
        SafetensorError,
        pl.exceptions.PolarsError,
        pl.exceptions.PanicException,
    ) as error:
        raise FastTowerError(f"{shown(path)} holds a damaged run: {str(error).rstrip('.')}.") from error
    raise newer_format(path, number, FORMAT)


def _format(number: object) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"config.json says that its format is {quoted(number)}, not a number from 1 on")
    return number


def _parts(path: Path, config: dict[str, Any], written: int) -> dict[str, Any]:
    """The fields of a `Record`; raises ValueError, FastTowerError or a library's error without them."""
    metrics = _read_json(path / "metrics.json")
    if written < 3 and "l2" in metrics:  # what was chosen among several once stood there only
        check_typed(metrics["l2"], float, "metrics.json.l2")
        l2 = metrics.pop("l2")
        config["l2"], metrics["settings"] = l2, f"L2 {l2:g}"
    for name in ("device", "backend"):
        check_typed(config.get(name), str, f"config.json.{name}")
    settings = Config.from_json({"format": written, **config})
    tensors = _read_tensors(path / "model.safetensors")
    check_tables(tensors)
    known = _read_tensors(path / "known_positives.safetensors")
    found = {name: tensor.dtype for name, tensor in known.items()}
    if found != {"indptr": torch.int64, "items": torch.int32}:
        raise ValueError(
            f"known_positives.safetensors holds {listed(f'{name} {dtype}' for name, dtype in found.items())};"
            " expected indptr torch.int64, items torch.int32"
        )
    users, items, recommendations = (
        _read_frame(path / f"{name}.parquet") for name in ("users", "items", "recommendations")
    )
    fields = {
        "model": TwoTower.from_saved(tensors, settings.resolved(0, 0).loss_settings.norm_temperature),
        "users": users,
        "items": items,
        "config": settings,
        "device": config["device"],
        "backend": config["backend"],
        "history": _read_history(path / "history.jsonl"),
        "recommendations": recommendations.rename({"rating": "score"}) if written == 1 else recommendations,
        "metrics": metrics,
        "known_positives": KnownPositives(known["indptr"], known["items"], items.height),
    }
    check_parts(**fields, written=written)
    fields["config"] = settings.resolved(0, 0)  # the check saw that nothing is open
    return fields


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _read_history(path: Path) -> list[EpochRecord]:
    with open_regular(path, most_bytes=MOST_BYTES) as file:
        lines = file.read().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        name = f"{path.name}, line {number}"
        try:
            fields = {"cut": None, **parse_object(line)}
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if "l2" in fields:  # of format 2
            check_typed(fields["l2"], float, f"{name}.l2")
            fields["settings"] = f"L2 {fields.pop('l2'):g}"
        check_typed(fields, EpochRecord, name)
        records.append(EpochRecord(**fields))
    return records


def _read_frame(path: Path) -> pl.DataFrame:
    # From the opened file, for Polars takes a path with brackets for a pattern.
    with open_regular(path) as file:
        try:
            return pl.read_parquet(file)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise ValueError(f"{path.name} cannot be read: {reason(error)}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    check_regular(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path.name} cannot be read: {reason(error)}") from error


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path)
    # safetensors lets only the owner read what it writes; whoever may read the rest may read this.
    shutil.copymode(path.parent / "config.json", path)
