"""`fasttower evaluate`: a run against interactions that came later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import tyro

from fasttower.cli import parse
from fasttower.commands.output import check_output, say, show_frame, write_frames
from fasttower.config import Device
from fasttower.evaluation.later_test import METRICS
from fasttower.run import load_run

DESCRIPTION = (
    "RePlay's metrics of a run's recommendations against a file of interactions, beside popularity's.\n\n"
    "Example: fasttower evaluate runs/mine --test later.csv --k 20 --metrics NDCG Recall"
)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What to measure."""

    run: tyro.conf.Positional[Path]
    """The run directory."""
    test: Path
    """A file of interactions; rows rated below the run's --min-rating or --test-min-rating are none."""
    k: int = 10
    """The cutoff."""
    metrics: tuple[str, ...] = METRICS
    """Which of NDCG, HitRate, Recall, MAP, MRR and Coverage."""
    filter_seen: bool = True
    """Leave out what a user had touched at training."""
    device: Device = "auto"
    """Where to score."""
    output: Path | None = None
    """A .parquet, .csv, .json or .jsonl file for the table; without one it is printed."""


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(Flags, arguments, prog="fasttower evaluate", description=DESCRIPTION)
    check_output(flags.output)
    found = load_run(flags.run, flags.device).evaluate(
        flags.test, flags.metrics, flags.k, filter_seen=flags.filter_seen
    )
    table = pl.DataFrame(
        {
            "metric": list(found.metrics),
            "model": list(found.metrics.values()),
            "popularity": list(found.popularity.values()),
        }
    )
    if flags.output is not None:
        write_frames(iter([table]), flags.output)
        say(f"written to {flags.output}")
        return 0
    show_frame(table, f"{found.users:,} users, {found.pairs:,} pairs")
    if found.cold_rows:
        say(f"{found.cold_rows:,} rows of users or items that the run does not know were dropped")
    return 0
