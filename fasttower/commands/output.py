"""Frames on the terminal and in files."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import polars as pl
from polars.io.plugins import register_io_source
from rich.progress import Progress
from rich.table import Table

from fasttower.console import Console, literal
from fasttower.errors import FastTowerError, quoted, reason, shown
from fasttower.files import check_regular

SHOWN_ROWS = 50


def check_output(path: Path | None) -> None:
    """Raise where a result could not be written, before it is worked for.

    Raises:
        FastTowerError: another kind of file than can be written, or no such folder.
    """
    if path is None:
        return
    if path.suffix.lower() not in _WRITERS:
        raise FastTowerError(
            f"--output is {quoted(path)}; expected a name that ends in {', '.join(_WRITERS)}."
        )
    target = Path(os.path.realpath(path))
    if target.exists():
        check_regular(target, f"--output {shown(path)}")
    if not target.parent.is_dir():
        raise FastTowerError(f"--output {shown(path)} cannot be written: there is no folder for it.")


def write_frames(frames: Iterator[pl.DataFrame], path: Path) -> int:
    """Write frames to one file as they come; the file is there when all of it is. Returns the rows.

    Args:
        frames: at least one; all of the same columns.
        path: as `check_output` found it good.

    Raises:
        FastTowerError: the file cannot be written; and whatever the frames raise.
    """
    path = Path(os.path.realpath(path))  # what a link points to is what is replaced
    count = 0
    failure: BaseException | None = None

    def watched() -> Iterator[pl.DataFrame]:
        nonlocal count, failure
        try:
            for frame in frames:
                count += len(frame)
                yield frame
        except BaseException as error:
            failure = error  # Polars will make another one of it
            raise

    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fasttower-") as folder:
            part = Path(folder) / path.name
            _WRITERS[path.suffix.lower()](watched(), part)
            part.replace(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        if failure is not None:
            raise failure from None
        raise FastTowerError(f"--output {shown(path)} cannot be written: {reason(error)}.") from error
    return count


def _lazy(frames: Iterator[pl.DataFrame]) -> pl.LazyFrame:
    """At least one frame, as a query that may be run once."""
    first = next(frames)
    return register_io_source(lambda *_: itertools.chain([first], frames), schema=first.schema)


def _write_json(frames: Iterator[pl.DataFrame], path: Path) -> None:
    """One array, of which each frame is a piece."""
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        pieces = (frame.write_json()[1:-1] for frame in frames if not frame.is_empty())
        for number, piece in enumerate(pieces):
            file.write("," * (number > 0) + piece)
        file.write("]")


_WRITERS: dict[str, Callable[[Iterator[pl.DataFrame], Path], object]] = {
    ".parquet": lambda frames, path: _lazy(frames).sink_parquet(path),
    ".csv": lambda frames, path: _lazy(frames).sink_csv(path),
    ".jsonl": lambda frames, path: _lazy(frames).sink_ndjson(path),
    ".json": _write_json,
}


def metrics_frame(model: Mapping[str, float], popularity: Mapping[str, float]) -> pl.DataFrame:
    """A row a metric: the model's value beside popularity's."""
    return pl.DataFrame(
        {
            "metric": list(model),
            "model": list(model.values()),
            "popularity": [popularity[name] for name in model],
        }
    )


def show_frame(frame: pl.DataFrame, title: str = "") -> None:
    """Print a frame as a table, its first rows where there are many."""
    table = Table(title=literal(title) or None, title_justify="left")
    for name, dtype in frame.schema.items():
        number = dtype.is_float() or name == "rank"
        # An id that is cut short is another id.
        table.add_column(literal(name), justify="right" if number else "left", overflow="fold")
    for row in frame.head(SHOWN_ROWS).iter_rows():
        table.add_row(*(_text(value) for value in row))
    console = Console()
    console.print(table)
    if len(frame) > SHOWN_ROWS:
        console.print(f"and {len(frame) - SHOWN_ROWS:,} rows more; --output FILE writes all")


def warn(line: str) -> None:
    """Print a line that must not be missed, on stderr."""
    Console(stderr=True, wide=True).print(f"[bold yellow]warning:[/] {literal(line)}")


def say(line: str) -> None:
    """Print a line."""
    Console(wide=True).print(literal(line))


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else literal(value)


def counted(frames: Iterator[pl.DataFrame], users: int) -> Iterator[pl.DataFrame]:
    """The frames, with a bar on stderr that counts their users, where it is a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("recommend", total=users)
        for frame in frames:
            progress.advance(bar, frame["user_id"].n_unique())
            yield frame
