"""The caller's ids, looked up in a run's maps."""

from __future__ import annotations

from typing import Any, Literal

import polars as pl

from fasttower.errors import FastTowerError

Unknown = Literal["raise", "skip"]

_NAMED_IN_ERRORS = 5


def find_ids(ids: Any, id_map: pl.DataFrame, unknown: Unknown = "raise") -> pl.DataFrame:  # noqa: ANN401
    """The rows of a map for some ids, in the order given, each once.

    Args:
        ids: one id, or a list, array or series of them, of the map's type.
        id_map: ``user_id, user_index`` or ``item_id, item_index``, and whatever else; a row an id.
        unknown: what to do about ids that the map does not have: "raise", or "skip" them.

    Returns:
        The map's columns.

    Raises:
        FastTowerError: ids of another type, or unknown ones, some of which are named.
    """
    column = id_map.columns[0]
    if unknown not in ("raise", "skip"):
        raise FastTowerError(f"unknown is {unknown!r}; expected 'raise' or 'skip'.")
    wanted = _as_series(ids, id_map[column]).unique(maintain_order=True)
    found = wanted.to_frame().join(id_map, on=column, how="left", maintain_order="left")
    known = pl.col(id_map.columns[1]).is_not_null()
    if unknown == "raise":
        missing = found.filter(~known)[column]
        if len(missing):
            some = ", ".join(repr(value) for value in missing.head(_NAMED_IN_ERRORS))
            more = ", ..." if len(missing) > _NAMED_IN_ERRORS else ""
            raise FastTowerError(
                f"{len(missing):,} of {len(wanted):,} {_plural(column)} are not in the run: {some}{more};"
                " it knows those of its training data alone. Leave them out, or skip them"
                " (unknown='skip', --unknown skip)."
            )
    return found.filter(known)


def _as_series(ids: Any, like: pl.Series) -> pl.Series:  # noqa: ANN401
    """Ids as a series of the type of the map's."""
    if isinstance(ids, str | int):
        ids = [ids]
    try:
        series = pl.Series(like.name, ids)
        if series.dtype == pl.Null:  # there are none, or none has a value
            series = series.cast(like.dtype)
        if series.dtype in (pl.Categorical, pl.Enum):
            series = series.cast(pl.String)
        if series.dtype != like.dtype and series.dtype.is_integer() and like.dtype.is_integer():
            series = series.cast(like.dtype, strict=False)  # what does not fit is unknown
    except (TypeError, ValueError, pl.exceptions.PolarsError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise FastTowerError(
            f"{_plural(like.name)} cannot be read ({reason}); expected a list of {like.dtype}."
        ) from error
    if series.dtype != like.dtype:
        raise FastTowerError(
            f"{_plural(like.name)} are {like.dtype} in the run, those given are {series.dtype};"
            " convert them to that type."
        )
    return series


def _plural(column: str) -> str:
    return f"{column.removesuffix('_id')} ids"
