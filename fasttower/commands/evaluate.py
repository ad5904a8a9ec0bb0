"""`fasttower evaluate`: a run against interactions that came later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fasttower.cli import parse
from fasttower.commands.inputs import RunFlags, with_columns
from fasttower.commands.output import check_output, metrics_frame, say, show_frame, warn, write_frames
from fasttower.config import Device
from fasttower.run.evaluate import METRICS

DESCRIPTION = (
    "RePlay's metrics of a run's recommendations against a file of interactions, beside popularity's.\n\n"
    "Example: fasttower evaluate runs/mine --test later.csv --k 20 --metrics NDCG Recall"
)


@dataclass(frozen=True, kw_only=True)
class Flags(RunFlags):
    """What to measure."""

    test: Path
    """A file of interactions; rows rated below the run's --min-rating or --test-min-rating are none."""
    user_column: str | None = None
    """Column of user ids in the file; that of the run's data or a usual name if not given."""
    item_column: str | None = None
    """Column of item ids in the file."""
    rating_column: str | None = None
    """Column of ratings in the file."""
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
    trained = flags.load(flags.device)
    trained = with_columns(trained, flags.test, flags.user_column, flags.item_column, flags.rating_column)
    found = trained.evaluate(flags.test, flags.metrics, flags.k, filter_seen=flags.filter_seen)
    table = metrics_frame(found.metrics, found.popularity)
    if found.cold_rows:
        warn(f"{found.cold_rows:,} rows of users or items that the run does not know were dropped")
    if found.low_rated_rows:
        warn(f"{found.low_rated_rows:,} rows that are rated too low to be relevant were dropped")
    if found.pairs_in_fit and flags.filter_seen:
        warn(
            f"{found.pairs_in_fit:,} pairs were in the run's training data; left out as seen, each is a miss"
        )
    if flags.output is not None:
        write_frames(iter([table]), flags.output)
        say(f"written to {flags.output}")
        return 0
    show_frame(table, f"{found.users:,} users, {found.pairs:,} pairs")
    return 0
