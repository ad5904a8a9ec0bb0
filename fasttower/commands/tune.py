"""`fasttower tune`: a longer search for settings, which writes a configuration."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fasttower.cli import parse
from fasttower.config import Config, Preset
from fasttower.errors import FastTowerError, shown
from fasttower.train import base_of_flags, stop_on_signals

if TYPE_CHECKING:
    from fasttower.tuning.tune import Tuned

DESCRIPTION = (
    "Look for better settings than a training's own search finds, for as long as you like, with optuna, and "
    "write them as a configuration.\n\n"
    "Example: fasttower tune --data ml-1m --minutes 60 --to tuned.json\n\n"
    "Then: fasttower train --config tuned.json\n\n"
    "Every setting of fasttower train --help may be given too, and stays as it is; what is left open is "
    "varied, and --prefer chooses. The same command with the same storage goes on."
)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """How long to look, and where to write."""

    trials: int | None = None
    """Trials in the end, those of earlier calls included; without --minutes, 50 if not given."""
    minutes: float | None = None
    """Stop after so many minutes; what was not finished is begun again by the next call."""
    to: Path = Path("tuned.json")
    """Where the configuration is written."""
    storage: Path | None = None
    """SQLite file that keeps the trials; --to with the ending .db if not given."""
    preset: Preset = "default"
    """As for fasttower train: default or notebook; what it sets otherwise than the default stays as it is."""
    config: Path | None = None
    """As for fasttower train: a config.json; what it sets stays as it is."""
    quiet: bool = False
    """Print nothing but errors."""
    json: bool = False
    """Print the result as JSON to stdout, and everything else to stderr."""


@dataclass(frozen=True, kw_only=True)
class _AllFlags(Flags, Config):
    """With the settings of a training."""


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    prog = "fasttower tune"
    if {"--help", "-h"} & set(arguments):
        parse(Flags, ["--help"], prog=prog, description=DESCRIPTION)
    preset, read, base = base_of_flags(arguments)
    settings = {field.name: getattr(base, field.name) for field in dataclasses.fields(Config)}
    default = _AllFlags(**settings, preset=preset)
    flags = parse(_AllFlags, arguments, prog=prog, description=DESCRIPTION, default=default)
    named = {word.partition("=")[0][2:].replace("-", "_") for word in arguments if word.startswith("--")}
    if "search" in named:
        raise FastTowerError("--search has no effect here: tune is a search; leave it out.")
    given = named | {name for name, value in read.items() if value is not None}
    keep = [name for name in settings if name in given]
    config = Config(**{name: getattr(flags, name) for name in settings})
    if flags.to.is_dir():
        raise FastTowerError(f"--to {shown(flags.to)} is a folder; expected the name of a file to write.")
    storage = flags.storage or flags.to.with_suffix(".db")
    _check_writable(flags.to, storage)

    # After the flags are known to be good: they import torch.
    from fasttower.json_files import write_object  # noqa: PLC0415
    from fasttower.run.directory import FORMAT  # noqa: PLC0415
    from fasttower.tuning.report import ConsoleTuneObserver  # noqa: PLC0415
    from fasttower.tuning.tune import tune  # noqa: PLC0415

    observer = ConsoleTuneObserver(quiet=flags.quiet, to_stderr=flags.json)
    with stop_on_signals(observer, "the best so far") as stopped, observer:
        tuned = tune(
            config=config,
            trials=flags.trials,
            minutes=flags.minutes,
            storage=storage,
            keep=keep,
            observer=observer,
        )
        fields = tuned.config.to_json(device=config.device, backend=config.backend)
        part = flags.to.with_name(f".{flags.to.name}.unfinished")
        write_object(part, {"format": FORMAT, **fields})  # as a run's config.json, and read as one
        part.replace(flags.to)
    observer.show_tuned(tuned, flags.to, storage)
    if flags.json:
        sys.stdout.write(json.dumps(_result(tuned, flags.to, storage), indent=2) + "\n")
    return stopped.exit_code if tuned.interrupted else 0


def _result(tuned: Tuned, to: Path, storage: Path) -> dict[str, object]:
    return {
        "config": str(to),
        "storage": str(storage),
        "score": tuned.score,
        "epochs": tuned.config.epochs,
        "interrupted": tuned.interrupted,
        "trials": tuned.trials.to_dicts(),
    }


def _check_writable(to: Path, storage: Path) -> None:
    """Refuse what could not be written, or would overwrite what is not this study's.

    Raises:
        FastTowerError: likewise.
    """
    for flag, path in (("--to", to), ("--storage", storage)):
        if path.is_dir() or not path.resolve().parent.is_dir():
            raise FastTowerError(f"{flag} {path} cannot be written: there is no folder for it, or it is one.")
    if to == storage:
        raise FastTowerError(f"--to and --storage are both {to}; choose two names.")
    if to.exists() and not storage.exists():
        raise FastTowerError(
            f"--to {to} is there already, without the study that it is of ({storage}); choose another --to."
        )
