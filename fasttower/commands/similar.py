"""`fasttower similar`: items like an item, users like a user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from fasttower.cli import parse
from fasttower.commands.inputs import RunFlags, ids_from_words
from fasttower.commands.output import check_output, say, show_frame, write_frames
from fasttower.errors import FastTowerError
from fasttower.retrieval.ids import Unknown

DESCRIPTION = (
    "The items or users whose vectors have the largest cosine to those of some.\n\n"
    "Example: fasttower similar runs/mine --item 260 1240"
)


@dataclass(frozen=True, kw_only=True)
class Flags(RunFlags):
    """Whose neighbours."""

    item: tuple[str, ...] = ()
    """Ids of items."""
    user: tuple[str, ...] = ()
    """Ids of users; give these or items."""
    k: int = 10
    """Neighbours of each."""
    unknown: Unknown = "raise"
    """What to do about ids that the run does not know: fail, or skip them."""
    output: Path | None = None
    """A .parquet, .csv, .json or .jsonl file; without one a table is printed."""


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(Flags, arguments, prog="fasttower similar", description=DESCRIPTION)
    check_output(flags.output)
    if bool(flags.item) == bool(flags.user):
        raise FastTowerError("give the ids of items with --item, or of users with --user.")
    trained = flags.load()
    if flags.item:
        items = ids_from_words(flags.item, trained.items)
        frame = trained.similar_items(items, flags.k, unknown=flags.unknown)
    else:
        users = ids_from_words(flags.user, trained.users)
        frame = trained.similar_users(users, flags.k, unknown=flags.unknown)
    if flags.output is None:
        if frame.is_empty():
            say("the run knows none of these")
        for (query, *_), rows in frame.group_by(frame.columns[0], maintain_order=True):
            show_frame(rows.drop(frame.columns[0]), _heading(query, trained.items if flags.item else None))
    else:
        count = write_frames(iter([frame]), flags.output)
        say(f"{count:,} rows written to {flags.output}")
    return 0


def _heading(query: object, items: pl.DataFrame | None) -> str:
    """The id, and the title where there is one."""
    if items is None or "title" not in items.columns:
        return f"like {query}"
    title = items.filter(pl.col("item_id") == query)["title"][0]
    return f"like {query}" if title is None else f"like {query}, {title}"
