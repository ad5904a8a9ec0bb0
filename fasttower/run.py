"""A run: a trained model, its ids, configuration, history, recommendations and metrics; and its directory."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fasttower.config import Config
from fasttower.errors import FastTowerError
from fasttower.model import TwoTower
from fasttower.training.trainer import EpochRecord


@dataclass(frozen=True)
class Run:
    """What `fasttower.fit` returns and `fasttower.load_run` reads back.

    Attributes:
        model: the trained model.
        users: user_id (as it came), user_index (Int32); sorted by id.
        items: item_id, item_index; likewise.
        config: as asked for, with what was left open filled in.
        device: where the training ran.
        backend: the implementation of the training step that ran.
        history: the record of every epoch.
        recommendations: user_id, item_id, rating (the score), rank (from 1) for every user.
        metrics: the contents of ``metrics.json``.
    """

    model: TwoTower
    users: pl.DataFrame
    items: pl.DataFrame
    config: Config
    device: str
    backend: str
    history: list[EpochRecord]
    recommendations: pl.DataFrame
    metrics: dict[str, Any]

    @property
    def interrupted(self) -> bool:
        """Whether a stop signal ended the training early."""
        return bool(self.metrics["interrupted"])

    def save(self, path: str | Path) -> None:
        """Write the run to a directory.

        Raises:
            FastTowerError: the directory is not empty, or cannot be written.
        """
        path = Path(path)
        with reserved(path):
            self._write(path)

    def _write(self, run_dir: Path) -> None:
        with _all_or_nothing(run_dir) as path:
            config = self.config.to_json(device=self.device, backend=self.backend)
            _write_json(path / "config.json", config)
            save_file(self.model.saved_tensors(), path / "model.safetensors")
            self.users.write_parquet(path / "users.parquet")
            self.items.write_parquet(path / "items.parquet")
            lines = (json.dumps(dataclasses.asdict(record)) + "\n" for record in self.history)
            (path / "history.jsonl").write_text("".join(lines))
            self.recommendations.write_parquet(path / "recommendations.parquet")
            _write_json(path / "metrics.json", self.metrics)


def load_run(path: str | Path) -> Run:
    """Read a run directory; the model is on the CPU, wherever it was trained.

    Raises:
        FastTowerError: a file is missing or is not what it should be.
    """
    if not isinstance(path, str | os.PathLike):
        raise FastTowerError(f"the run is {path!r}; expected the path of a run directory.")
    path = Path(path)
    try:
        config, metrics = _read_object(path / "config.json"), _read_object(path / "metrics.json")
        lines = (path / "history.jsonl").read_text().splitlines()
        return Run(
            model=TwoTower.from_saved(load_file(path / "model.safetensors")),
            users=pl.read_parquet(path / "users.parquet"),
            items=pl.read_parquet(path / "items.parquet"),
            config=Config.from_json(config),
            device=config["device"],
            backend=config["backend"],
            history=[EpochRecord(**json.loads(line)) for line in lines],
            recommendations=pl.read_parquet(path / "recommendations.parquet"),
            metrics=metrics,
        )
    except FileNotFoundError as error:
        raise FastTowerError(
            f"{path} is not a run directory: {error.filename or error} is missing."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, pl.exceptions.PolarsError) as error:
        raise FastTowerError(f"{path} holds a damaged run: {error}.") from error


@contextlib.contextmanager
def reserved(path: Path) -> Iterator[None]:
    """Make a run's directory before there is a run, and take it away again if the block fails.

    Raises:
        FastTowerError: there is a file, a directory that is not empty, or none can be made or written in.
    """
    try:
        if path.is_dir() and any(path.iterdir()):
            raise FastTowerError(f"the run directory {path} is not empty; give another --run-dir.")
        made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise FastTowerError(
            f"the run directory {path} cannot be written: {error}; give another --run-dir."
        ) from error
    try:
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def _all_or_nothing(run_dir: Path) -> Iterator[Path]:
    """A folder to write a run's files to; they come into the run's directory together, or not at all.

    The folder is inside the directory: what is beside it may be another disk, or not ours to write to.

    Raises:
        FastTowerError: a file cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=run_dir, prefix=".unfinished-") as folder:
            yield Path(folder)
            for file in Path(folder).iterdir():
                file.rename(run_dir / file.name)
    except (OSError, SafetensorError, pl.exceptions.PolarsError) as error:
        raise FastTowerError(f"the run cannot be written to {run_dir}: {error}.") from error


def versions() -> dict[str, str]:
    """The versions that a run's figures depend on."""
    names = ("fasttower", "torch", "numpy", "polars", "numba", "triton", "replay-rec")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _read_object(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} holds a {type(values).__name__}, not an object")  # noqa: TRY004
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
