"""Timestamps in seconds, milliseconds, microseconds, nanoseconds, or as dates: recognised, never converted.

Only their order matters for a split, so they stay as they came.
"""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl

# Largest magnitude of each unit: seconds reach the year 5138, and every later unit starts in March 1973.
_UNITS = (("s", 1e11), ("ms", 1e14), ("us", 1e17), ("ns", float("inf")))
# Below this a number may be a placeholder (0, -1) as well as a time.
_CERTAIN = 1e8

_DATE_FORMATS = (
    "%Y-%m-%d",
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%d %H:%M:%S%.f%#z",
    "%Y-%m-%dT%H:%M:%S%.f%#z",
    "%Y-%m-%d %H:%M",
    "%Y-%m-%dT%H:%M",
    "%Y/%m/%d",
    "%Y/%m/%d %H:%M:%S%.f",
)


def unit_of(magnitude: float) -> str:
    """The unit in which a number of this size is a time since 1970."""
    return next(unit for unit, limit in _UNITS if abs(magnitude) < limit or unit == "ns")


def recognise(timestamps: pl.Series) -> str:
    """Unit of a column without nulls: "s", "ms", "us", "ns", or "datetime"."""
    if not timestamps.dtype.is_numeric():
        return "datetime"
    return unit_of(timestamps.max()) if len(timestamps) else "s"  # type: ignore[arg-type]


def in_unit(timestamps: pl.Expr, unit: str) -> pl.Expr:
    """Which numbers, 0 or more, are times in this unit."""
    place = [name for name, _ in _UNITS].index(unit)
    lowest = _UNITS[place - 1][1] if place else 0
    return (timestamps >= lowest) & (timestamps < _UNITS[place][1])


def mixed_units(timestamps: pl.Series) -> tuple[str, str] | None:
    """The rarest and the commonest of several units in one column, or None: no real time line holds two."""
    if not timestamps.dtype.is_numeric() or timestamps.is_empty():
        return None
    lowest, highest = timestamps.min(), timestamps.max()
    if unit_of(lowest) == unit_of(highest) or lowest < _CERTAIN:  # type: ignore[arg-type, operator]
        return None
    column = pl.col(timestamps.name)
    counts = timestamps.to_frame().select(in_unit(column, unit).sum().alias(unit) for unit, _ in _UNITS)
    found = sorted((count, place) for place, count in enumerate(counts.row(0)) if count)
    return _UNITS[found[0][1]][0], _UNITS[found[-1][1]][0]


def parse_expression(column: str, sample: Iterable[str]) -> pl.Expr:
    """Expression that turns a text column into timestamps; null where a value is none.

    The kind (integers, decimals, or one of the date formats) is the first that fits the whole sample.
    """
    text = pl.col(column)
    values = pl.Series(list(sample), dtype=pl.String)
    candidates = [text.cast(pl.Int64, strict=False), text.cast(pl.Float64, strict=False)]
    candidates += [
        text.str.to_datetime(form, strict=False, time_unit="us", time_zone=_zone(form))
        for form in _DATE_FORMATS
    ]
    frame = values.alias(column).to_frame()
    fits = (kind for kind in candidates if not frame.select(kind.is_null().any()).item())
    return next(fits, candidates[0])


def _zone(form: str) -> str | None:
    return "UTC" if form.endswith("z") else None
