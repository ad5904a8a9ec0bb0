"""`fasttower recommend`: a run's recommendations for some users, all of them, or new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from fasttower.cli import parse
from fasttower.commands.inputs import RunFlags, bytes_from_text, ids_from_file, ids_from_words, with_columns
from fasttower.commands.output import check_output, counted, say, show_frame, warn, write_frames
from fasttower.config import Device
from fasttower.data.later_rows import positives, read_later_rows
from fasttower.errors import FastTowerError, shown
from fasttower.retrieval.ids import IdMap, Unknown
from fasttower.run import Run
from fasttower_kernels.topk import Scoring

DESCRIPTION = (
    "Recommend to users of a run, or to new users from what they touched.\n\n"
    "Example: fasttower recommend runs/mine --k 20 --output recommendations.parquet"
)
_SHOWN_USERS = 3


@dataclass(frozen=True, kw_only=True)
class Flags(RunFlags):
    """What to recommend, to whom, and where to write it."""

    user: tuple[str, ...] = ()
    """Ids of users to recommend to."""
    users: Path | None = None
    """A file of user ids: .txt with one a line, csv, tsv or parquet. Without it and --user, all."""
    new: Path | None = None
    """A file of interactions of users who were not there at training, to recommend to instead."""
    user_column: str | None = None
    """Column of user ids in --new or --users; that of the run's data or a usual name if not given."""
    item_column: str | None = None
    """Column of item ids in --new, --deny or --allow."""
    rating_column: str | None = None
    """Column of ratings in --new."""
    k: int = 10
    """Recommendations a user; fewer where fewer are left."""
    filter_seen: bool = True
    """Leave out what a user has touched."""
    deny: Path | None = None
    """A file of ids of items that nobody is to get."""
    allow: Path | None = None
    """A file of ids of the only items that may be given."""
    unknown: Unknown = "raise"
    """What to do about ids that the run does not know: fail, or skip them."""
    scoring: Scoring = "float32"
    """Precision of the matmul; tf32 and bfloat16 are for GPUs, and give the results of float32."""
    memory_budget: str | None = None
    """Bound on the memory that scoring takes beside the tables and the result, such as 500MB."""
    device: Device = "auto"
    """Where to score."""
    output: Path | None = None
    """A .parquet, .csv, .json or .jsonl file for all of it; without one a table of the first is printed."""


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(Flags, arguments, prog="fasttower recommend", description=DESCRIPTION)
    check_output(flags.output)
    budget = bytes_from_text(flags.memory_budget)
    if flags.new is not None and (flags.user or flags.users):
        raise FastTowerError("--new is given with --user or --users; give one of them.")
    trained = flags.load(flags.device)
    columns = flags.user_column, flags.item_column, flags.rating_column
    asked = with_columns(trained, flags.new, *columns).config
    deny, allow = _items(flags, trained, asked.item_column)
    users: pl.Series | None = None
    if flags.user or flags.users:
        named = [ids_from_words(flags.user, trained.users)] if flags.user else []
        listed = [ids_from_file(flags.users, trained.users, asked.user_column)] if flags.users else []
        frames_of_ids = [ids.to_frame() for ids in named + listed]
        users = pl.concat(frames_of_ids, how="vertical_relaxed").to_series()
        if flags.unknown == "skip":
            _warn_of_unknown("--user, --users", users, trained.retriever.users)
    elif flags.output is None and flags.new is None:
        users = trained.users["user_id"].head(_SHOWN_USERS)

    if flags.new is not None:
        maps = (trained.users, trained.items)
        new = read_later_rows(flags.new, asked, rated=asked.min_rating is not None, like=maps)
        count = new["user_id"].n_unique()
        if flags.unknown == "skip":
            _warn_of_unknown(str(flags.new), new["item_id"], trained.retriever.items)
        if low := len(new) - len(positives(new, asked.min_rating)):
            warn(
                f"{low:,} of {len(new):,} rows are rated below the run's min_rating of"
                f" {asked.min_rating:g}: taken for seen, not for liked"
            )
        frames = with_columns(trained, None, "user_id", "item_id", "rating").recommend_new_in_blocks(
            new,
            flags.k,
            filter_seen=flags.filter_seen,
            deny=deny,
            allow=allow,
            unknown=flags.unknown,
            scoring=flags.scoring,
            memory_budget_bytes=budget,
        )
    else:
        count = len(trained.users) if users is None else users.n_unique()
        frames = trained.recommend_in_blocks(
            users,
            flags.k,
            filter_seen=flags.filter_seen,
            deny=deny,
            allow=allow,
            unknown=flags.unknown,
            scoring=flags.scoring,
            memory_budget_bytes=budget,
        )
    if flags.output is None:
        show_frame(pl.concat(frames))
        if users is not None and not (flags.user or flags.users):
            say(f"{len(trained.users):,} users; --output FILE writes all, --user and --users choose")
        return 0
    rows = write_frames(counted(frames, count), flags.output)
    say(f"{rows:,} recommendations written to {flags.output}")
    return 0


def _items(flags: Flags, trained: Run, column: str | None) -> tuple[pl.Series | None, pl.Series | None]:
    """The ids of the --deny and --allow files."""
    files, id_map = (flags.deny, flags.allow), trained.retriever.items
    deny, allow = (None if file is None else ids_from_file(file, trained.items, column) for file in files)
    if allow is not None and not len(id_map.find(allow, "skip")):
        raise FastTowerError(f"{shown(flags.allow)}: the run knows none of its items; allow at least one.")
    for file, ids in zip(files, (deny, allow), strict=True):
        if ids is not None:
            _warn_of_unknown(shown(file), ids, id_map)
    return deny, allow


def _warn_of_unknown(where: str, ids: pl.Series, id_map: IdMap) -> None:
    """Warn of ids that the run does not know."""
    unknown = id_map.with_index(ids.unique().to_frame())[id_map.index_name].null_count()
    if unknown:
        kind = id_map.id_name.removesuffix("_id")
        warn(f"{where}: {unknown:,} of {ids.n_unique():,} {kind}s are not in the run")
