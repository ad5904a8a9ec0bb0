"""`python -m fasttower.train`, the same as `fasttower train`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fasttower import __version__
from fasttower.cli import EXIT_INTERRUPTED, end, guarded, parse
from fasttower.config import PRESETS, Config, Preset
from fasttower.errors import FastTowerError, quoted, reason, shown
from fasttower.json_files import read_object

if TYPE_CHECKING:
    from fasttower.report import ConsoleObserver

DESCRIPTION = (
    "Train a two-tower model on interactions, recommend to its users, evaluate on the test part.\n\n"
    "Example: python -m fasttower.train --data ml-1m --embedding-dim 64\n\n"
    "To serve, on all rows: python -m fasttower.train --data my.csv --test-fraction 0"
)


@dataclass(frozen=True, kw_only=True)
class TrainFlags(Config):
    """The configuration, and what concerns this command alone."""

    preset: Preset = "default"
    """Where the defaults come from: default, or notebook (the published notebook's protocol)."""
    run_dir: Path | None = None
    """Where the run is written; runs/<data>-<time> if not given. A directory that is not empty, or in use, is
    refused."""
    config: Path | None = None
    """A config.json to take defaults from, such as a run's; flags go before it, it goes before the preset."""
    quiet: bool = False
    """Print nothing but errors."""
    json: bool = False
    """Print the metrics as JSON to stdout, and everything else to stderr."""
    version: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the version and exit."""


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    flags = read_flags(arguments)
    if flags.version:
        sys.stdout.write(f"fasttower {__version__}\n")
        return 0
    from fasttower.pipeline import fit  # noqa: PLC0415 - after the flags are known to be good: it imports torch
    from fasttower.report import ConsoleObserver  # noqa: PLC0415
    from fasttower.run.directory import write_run  # noqa: PLC0415
    from fasttower.run.new_directory import reserved  # noqa: PLC0415

    config = Config(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(Config)})
    # `resolve` would raise at a loop of links.
    name = re.sub(r"[^\w.-]+", "_", Path(os.path.realpath(config.data)).stem)[:50]
    run_dir = flags.run_dir or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    observer = ConsoleObserver(quiet=flags.quiet, to_stderr=flags.json)
    # A place where nothing can be written, or another run will be, is found out before the training.
    with (
        reserved(run_dir, numbered=flags.run_dir is None) as run_dir,
        stop_on_signals(observer, "the run") as stopped,
        observer,
    ):
        finished = fit(config=config, observer=observer)
        write_run(finished, run_dir)
    observer.show_result(finished, run_dir)
    if flags.json:
        sys.stdout.write(json.dumps(finished.metrics, indent=2) + "\n")
    return stopped.exit_code if finished.interrupted else 0


def read_flags(arguments: Sequence[str]) -> TrainFlags:
    """Flags over the ``--config`` file over the ``--preset``."""
    preset, _, base = base_of_flags(arguments)
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(Config)}
    default = TrainFlags(**fields, preset=preset)
    return parse(TrainFlags, arguments, prog="fasttower train", default=default, description=DESCRIPTION)


def base_of_flags(arguments: Sequence[str]) -> tuple[Preset, dict[str, object], Config]:
    """What flags go over: the name of the ``--preset``, the fields of the ``--config`` file, both together.

    Raises:
        FastTowerError: there is no such preset or file, or the file holds no configuration.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset", default="default")
    early.add_argument("--config", type=Path, default=None)
    try:
        known, _ = early.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise FastTowerError(str(error)) from None
    if known.preset not in PRESETS:
        raise FastTowerError(f"--preset is {quoted(known.preset)}; expected one of {', '.join(PRESETS)}.")
    base, read = PRESETS[known.preset], {}
    if known.config is not None:
        try:
            read = read_object(known.config)
        except (OSError, ValueError) as error:
            raise FastTowerError(
                f"--config {shown(known.config)} cannot be read as JSON: {reason(error)}."
            ) from error
        base = Config.from_json(read, base)
    return known.preset, read, base


@dataclass
class Stopped:
    """By which signal a training was stopped.

    Attributes:
        exit_code: of the process then: 128 and the signal's number, as shells have it.
    """

    exit_code: int = EXIT_INTERRUPTED


@contextlib.contextmanager
def stop_on_signals(observer: ConsoleObserver, result: str) -> Iterator[Stopped]:
    """The first signal in the training stops it and has the result written; others end the process at once.

    The signals are Ctrl-C's, SIGTERM, by which schedulers and `kill` end a process, and that of a terminal
    that is closed.
    """
    stopped = Stopped()

    def leave(signum: int, frame: object) -> None:
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signum)

    def ask(signum: int, frame: object) -> None:
        for number in before:
            signal.signal(number, leave)
        if not observer.training:
            leave(signum, frame)
        stopped.exit_code = 128 + signum
        observer.stop()
        # Past Python's buffers, which the signal may have interrupted.
        with contextlib.suppress(OSError):  # of a terminal that is gone
            os.write(2, f"\nstopping; {result} will be written. Ctrl-C again gives it up.\n".encode())

    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    # Under nohup the closed terminal is ignored, and stays so.
    before = {
        number: was for number in numbers if (was := signal.getsignal(number)) not in (None, signal.SIG_IGN)
    }
    for number in before:
        signal.signal(number, ask)
    try:
        yield stopped
    finally:
        for number, was in before.items():
            signal.signal(number, was)


if __name__ == "__main__":
    end(guarded(run, sys.argv[1:]))
