"""Anything that holds interactions as one frame: `user_id`, `item_id` and, if there, `rating`, `timestamp`.

Only these columns are read, in one streaming pass. A text file has no types, and its columns are not guessed
at from a sample: ids are integers only if every one of them is written as an integer is ("7", not "007"), so
that they come back as they were.

There are two ways to read a text file. The quick one lets the CSV parser make the numbers, twice as fast, and
is taken back when the parser stumbles, when a value is missing, or when the bytes show a number that is
spelled in an unusual way. The careful one keeps the text until it is known what it is; it decides about
types, and finds the first bad row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fasttower.data import timestamps
from fasttower.data.columns import POSITIONAL, find_columns
from fasttower.data.sources import Table, check_fields, open_table
from fasttower.errors import FastTowerError, quoted

_SAMPLE_ROWS = 1000
_BLOCK_BYTES = 1 << 18  # fits the second-level cache
_IDS = ("user_id", "item_id")


@dataclass(frozen=True)
class Interactions:
    """What a source holds.

    Attributes:
        frame: rows in file order; user_id and item_id integers or categoricals of strings, rating Float64,
            timestamp integers, Float64 or Datetime; no nulls, no NaN.
        timestamp_unit: "s", "ms", "us", "ns", "datetime", or None without timestamps.
        name: the file or "the frame", for messages.
    """

    frame: pl.DataFrame
    timestamp_unit: str | None
    name: str


def read_interactions(
    source: Any,  # noqa: ANN401
    asked: Mapping[str, str | None] | None = None,
    *,
    roles: Sequence[str] = POSITIONAL,
    insist: bool = True,
    empty: bool = False,
) -> Interactions:
    """Read a path (file, folder, zip, glob) or a Polars, pandas or Arrow frame.

    Args:
        source: a path, or a frame.
        asked: the source's own columns for `user_id`, `item_id`, `rating`, `timestamp`; None finds them.
        roles: which of these to read; others are not looked at.
        insist: whether a column that was asked for must be there, or its usual names will do.
        empty: whether there may be no rows; the columns' types are then the source's.

    Raises:
        FastTowerError: nothing there, not what the name says, columns not found, or a value that is missing
            or unreadable; the file and its first bad row are named.
    """
    with open_table(source) as table:
        try:
            columns = find_columns(
                table.scan({}).collect_schema().names(), asked or {}, table.name, insist=insist
            )
            frame = _read(
                table, {role: column for role, column in columns.items() if role in roles}, empty=empty
            )
        except pl.exceptions.ComputeError as error:
            if "more fields" in str(error):
                check_fields(table)
            raise
    unit = timestamps.recognise(frame["timestamp"]) if "timestamp" in frame.columns else None
    return Interactions(frame, unit, table.name)


def _read(table: Table, columns: Mapping[str, str], *, empty: bool) -> pl.DataFrame:
    rows = _select(table.scan({}), columns)
    sample = rows.head(_SAMPLE_ROWS).collect()
    if sample.is_empty() and empty:
        return sample
    if sample.is_empty():
        raise FastTowerError(f"{table.name}: no rows; expected one for each interaction")
    frame = _read_quickly(table, columns, sample) if table.is_text else None
    return _read_carefully(table, rows, sample, columns) if frame is None else frame


def _select(rows: pl.LazyFrame, columns: Mapping[str, str]) -> pl.LazyFrame:
    return rows.select(pl.col(column).alias(role) for role, column in columns.items())


def _read_quickly(table: Table, columns: Mapping[str, str], sample: pl.DataFrame) -> pl.DataFrame | None:
    """A text file with its numbers made by the parser; None if they may not be what the text says."""
    types: dict[str, Any] = {}
    for role, column in columns.items():
        if role in _IDS:
            types[column] = pl.Int64 if _fits(_canonical_integer(role), sample[role]) else pl.Categorical
        elif role == "rating":
            types[column] = pl.Float64
        else:
            # Seconds fit 32 bits; where they do not, the parser says so.
            fitting = (
                kind
                for kind in (pl.Int32, pl.Int64)
                if _fits(pl.col(role).cast(kind, strict=False), sample[role])
            )
            types[column] = next(fitting, pl.String)
    if pl.Int64 in [types[columns[role]] for role in _IDS] and not _spelled_plainly(table):
        return None
    rows = _select(table.scan(types), columns)
    if types.get(columns.get("timestamp", "")) == pl.String:
        rows = rows.with_columns(timestamps.parse_expression("timestamp", sample["timestamp"].drop_nulls()))
    try:
        frame = rows.collect(engine="streaming")
    except pl.exceptions.ComputeError:
        return None  # the careful way finds out what it was, and says so
    return None if any(_problem(column) for column in frame) else frame


def _read_carefully(
    table: Table, rows: pl.LazyFrame, sample: pl.DataFrame, columns: Mapping[str, str]
) -> pl.DataFrame:
    """Any source, with null for what cannot be read; raises at the first such row."""
    parsed = {role: _expression(role, sample[role], table) for role in sample.columns}
    frame = rows.select(parsed.values()).collect(engine="streaming")
    for role in _IDS:
        nulls = frame[role].null_count()
        if table.is_text and nulls and frame[role].dtype.is_integer() and nulls > _missing(rows, role):
            # Not integers throughout: as text, only missing ids are null.
            parsed[role] = _as_text(role)
            frame = frame.with_columns(rows.select(parsed[role]).collect(engine="streaming"))
    frame = _without_blank_end(frame)
    for role in sample.columns:
        problem = _problem(frame[role])
        if problem is not None:
            if len(table.files) > 1:  # the one that has the row complains for itself
                for file in table.files:
                    read_interactions(file, columns, roles=tuple(columns))
            bad = _bad_rows(parsed[role], frame[role])
            found = rows.select(pl.col(role), bad.alias("bad")).with_row_index("row")
            row, value, _ = found.filter("bad").head(1).collect().row(0)
            raise FastTowerError(
                f"{table.name}, {table.row_word} {table.first_row + row}: {role} is {problem}"
                f" (found {quoted(value)}); correct or remove such rows, or name another column"
            )
    return frame


def _missing(rows: pl.LazyFrame, role: str) -> int:
    return rows.select(pl.col(role).null_count()).collect(engine="streaming").item()


def _without_blank_end(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows up to the last that has any value: blank lines at the end of a file are no rows."""
    end = len(frame)
    while end and all(value is None for value in frame.row(end - 1)):
        end -= 1
    return frame[:end]


def _expression(role: str, sample: pl.Series, table: Table) -> pl.Expr:
    """How a column becomes what the project wants; null where a value cannot."""
    dtype, column = sample.dtype, pl.col(role)
    expression = None
    if role in _IDS:
        if _is_integer(dtype):
            expression = column
        elif table.is_text and _fits(_canonical_integer(role), sample):
            expression = _canonical_integer(role)
        elif dtype in (pl.String, pl.Categorical, pl.Enum):
            expression = _as_text(role)
    elif role == "rating":
        if dtype.is_numeric() or dtype in (pl.String, pl.Boolean):
            expression = column.cast(pl.Float64, strict=False)
    elif dtype == pl.String:
        expression = timestamps.parse_expression(role, sample.drop_nulls())
    elif _is_integer(dtype) or dtype.is_float() or dtype in (pl.Datetime, pl.Date):
        expression = column
    if expression is None:
        expected = {"rating": "numbers", "timestamp": "numbers of at most 64 bits or datetimes"}.get(
            role, "integers of at most 64 bits or strings"
        )
        raise FastTowerError(
            f"{table.name}: {role} is {dtype}, expected {expected}; convert the column first"
        )
    return expression


def _is_integer(dtype: pl.DataType) -> bool:
    """Whether numpy has the integers: it ends at 64 bits, and Polars does not."""
    return dtype.is_integer() and dtype not in (pl.Int128, getattr(pl, "UInt128", pl.Int128))


def _fits(expression: pl.Expr, text: pl.Series) -> bool:
    """Whether the expression makes something of every value that is there."""
    return text.drop_nulls().to_frame().select(expression.is_not_null().all()).item()


def _canonical_integer(role: str) -> pl.Expr:
    """The integer whose usual spelling is the text, else null: "007", "+7" and " 7" are no integers."""
    number = pl.col(role).cast(pl.Int64, strict=False)
    return pl.when(number.cast(pl.String) == pl.col(role)).then(number).alias(role)


def _as_text(role: str) -> pl.Expr:
    """Text as categoricals: 4 bytes a row instead of 16 and more. An empty id, "", is a missing one."""
    return pl.col(role).cast(pl.String).replace("", None).cast(pl.Categorical)


def _spelled_plainly(table: Table) -> bool:
    """Whether no field of the files begins as a number that the parser would quietly respell.

    The CSV parser reads "007", "+7", " 7" and "-07" as 7 and -7. Looking at all the bytes is several times
    cheaper than keeping the ids as text.
    """
    return not any(_odd_spelling(block, table.separator) for file in table.files for block in _blocks(file))


def _odd_spelling(block: np.ndarray, separator: int) -> bool:
    """Whether a field in these bytes begins with a plus, a blank, "0" and a digit, or "-0"."""
    before, first, second = block[:-2], block[1:-1], block[2:]
    starts = (before == separator) | (before == ord("\n")) | (before == ord('"'))
    # Few fields begin with a byte up to "0": only these need a closer look.
    at = np.flatnonzero(starts & (first <= ord("0")))
    first, second = first[at], second[at]
    zero = (first == ord("0")) & (second >= ord("0")) & (second <= ord("9"))
    minus_zero = (first == ord("-")) & (second == ord("0"))
    blank = (first <= ord(" ")) & (first != ord("\n")) & (first != ord("\r")) & (first != separator)
    return bool((zero | minus_zero | blank | (first == ord("+"))).any())


def _blocks(file: Path) -> Iterator[np.ndarray]:
    """The bytes of a file as if a line end came first, in blocks that overlap by two bytes."""
    block = np.empty(_BLOCK_BYTES + 2, dtype=np.uint8)
    block[:2] = ord("\n")
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(block[2:].data):
            yield block[: count + 2]
            block[:2] = block[count : count + 2]


def _problem(values: pl.Series) -> str | None:
    """What is wrong with a column, in words, or None."""
    if values.null_count():
        return "missing or unreadable"
    if values.dtype == pl.Categorical and (values == "").any():
        return "missing or unreadable"
    if values.dtype.is_float() and values.is_nan().any():
        return "not a number"
    if values.dtype.is_float() and values.is_infinite().any():
        return "infinite"
    if values.name == "timestamp" and (units := timestamps.mixed_units(values)):
        return "in {} where others are in {}".format(*units)
    return None


def _bad_rows(parsed: pl.Expr, values: pl.Series) -> pl.Expr:
    """The rows that have the problem."""
    if values.null_count():
        return parsed.is_null()
    if values.dtype.is_float() and values.is_nan().any():
        return parsed.is_nan()
    if values.dtype.is_float() and values.is_infinite().any():
        return parsed.is_infinite()
    units = timestamps.mixed_units(values)
    assert units is not None  # nothing else is left
    return timestamps.in_unit(parsed, units[0])
