"""Ids and sizes as they are written on the command line and in files."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import tyro

from fasttower.data.columns import check_named, find_id_column
from fasttower.data.sources import open_table
from fasttower.errors import FastTowerError, quoted, reason, shown, whole_number
from fasttower.files import check_regular, open_regular
from fasttower.run import Run, load_run

_UNITS = {"": 1, "B": 1}
_UNITS |= {unit: 10 ** (3 * n) for n, letter in enumerate("KMG", 1) for unit in (letter, f"{letter}B")}
_UNITS |= {f"{letter}IB": 2 ** (10 * n) for n, letter in enumerate("KMG", 1)}


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """The flags of every command that reads a run."""

    run: tyro.conf.Positional[Path]
    """The run directory."""
    trust_files: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Load the run though its files are not those of its manifest, or it has none, as those that an older
    version wrote. What the files hold is checked all the same."""

    def load(self, device: str = "cpu") -> Run:
        """The run."""
        return load_run(self.run, device, trust_files=self.trust_files)


def ids_from_words(words: Sequence[str], id_map: pl.DataFrame) -> pl.Series:
    """Ids from flags, in the type of the run's.

    Raises:
        FastTowerError: the run's ids are integers and a word is none.
    """
    text = pl.Series(id_map.columns[0], words, dtype=pl.String)
    return _as_in_run(text, id_map, "the command line")


def ids_from_file(path: Path, id_map: pl.DataFrame, asked: str | None) -> pl.Series:
    """Ids from a file, in the type of the run's.

    A .txt has one id a line; a csv, tsv or parquet file the column asked for or one of a usual name, or one
    column alone.

    Raises:
        FastTowerError: the file cannot be read, has no such column, or holds ids of another type.
    """
    column, suffix = id_map.columns[0], path.suffix.lower()
    try:
        check_regular(path)
        if suffix in (".parquet", ".pq"):
            rows = pl.scan_parquet(path, glob=False)
        elif suffix in (".csv", ".tsv"):
            separator = "," if suffix == ".csv" else "\t"
            rows = pl.scan_csv(path, separator=separator, infer_schema=False, glob=False)
        else:
            with open_regular(path) as file:
                lines = [line.strip() for line in file.read().decode("utf-8-sig").splitlines()]
            rows = pl.LazyFrame({column: [line for line in lines if line]}, schema={column: pl.String})
        found = rows.collect_schema().names()
        name = find_id_column(found, column, str(path), asked)
        if len(found) == 1 and name in id_map[column].cast(pl.String):
            raise FastTowerError(
                f"{shown(path)}: its first line should name the column, and is {quoted(name)}, an id of the"
                f" run; write {column} above it."
            )
        ids = rows.select(pl.col(name).alias(column)).collect().to_series().drop_nulls()
    except (OSError, UnicodeDecodeError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise FastTowerError(f"{shown(path)} cannot be read as a list of ids ({reason(error)}).") from error
    return _as_in_run(ids, id_map, str(path))


def _as_in_run(ids: pl.Series, id_map: pl.DataFrame, where: str) -> pl.Series:
    wanted = id_map.schema[ids.name]
    if ids.dtype in (pl.Categorical, pl.Enum):
        ids = ids.cast(pl.String)
    if not (ids.dtype.is_integer() or ids.dtype == pl.String):
        raise FastTowerError(
            f"{shown(where)}: {ids.name} is {ids.dtype}; expected {wanted}, as those of the run are."
        )
    if ids.dtype.is_integer() and wanted == pl.String:
        raise FastTowerError(
            f"{shown(where)}: {ids.name} holds integers; those of the run are text, write them so."
        )
    if ids.dtype.is_integer() or wanted == pl.String:
        return ids
    # In the run's type or, for ids that do not fit it and so are not in the run, in the widest.
    numbers = ids.cast(pl.Int128, strict=False)
    odd = ids.filter(numbers.is_null())
    if len(odd):
        raise FastTowerError(
            f"{shown(where)}: {ids.name} {quoted(odd[0])} is no integer, as those of the run are."
        )
    narrow = numbers.cast(wanted, strict=False)
    return numbers if narrow.null_count() else narrow


def bytes_from_text(text: str | None) -> int | None:
    """The number of bytes that "500MB", "4GB", "64 MiB" or "1000000" means; None for None.

    Raises:
        FastTowerError: it is none of these.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, flags=re.IGNORECASE)
    unit = match[2].upper() if match else None
    if match is None or unit not in _UNITS:
        raise FastTowerError(
            f"--memory-budget is {quoted(text)}; expected a number and a unit, such as 500MB or 4GB."
        )
    count = float(match[1]) * _UNITS[unit]
    return whole_number("--memory-budget", int(count) if math.isfinite(count) else sys.maxsize)


def with_columns(
    run: Run,
    file: Path | None,
    user_column: str | None,
    item_column: str | None,
    rating_column: str | None,
) -> Run:
    """The run, looking for these columns in later files where they are given.

    Raises:
        FastTowerError: the file, if there is one, does not have one of them.
    """
    given = {"user_column": user_column, "item_column": item_column, "rating_column": rating_column}
    changes: dict[str, Any] = {field: column for field, column in given.items() if column is not None}
    if file is not None and changes:
        named = {f"--{field.replace('_', '-')}": column for field, column in changes.items()}
        # What cannot be read is told about where it is.
        with open_table(str(file)) as table, suppress(pl.exceptions.PolarsError):
            check_named(table.scan({}).collect_schema().names(), named, table.name)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, **changes))
