"""The caller's ids, looked up in a run's maps."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import polars as pl

from fasttower.data.columns import find_id_column
from fasttower.data.sources import open_table
from fasttower.errors import FastTowerError

Unknown = Literal["raise", "skip"]

_NAMED_IN_ERRORS = 5


def find_ids(ids: Any, id_map: pl.DataFrame, unknown: Unknown = "raise") -> pl.DataFrame:  # noqa: ANN401
    """The rows of a map for some ids, in the order given, each once.

    Args:
        ids: one id, or a list, set, array or series of them, or a frame with a column of a usual name, or one
            column alone; text where the map has text, integers of any width where it has integers.
        id_map: ``user_id, user_index`` or ``item_id, item_index``, and whatever else; a row an id.
        unknown: what to do about ids that the map does not have: "raise", or "skip" them.

    Returns:
        The map's columns.

    Raises:
        FastTowerError: ids of another type, or unknown ones, some of which are named.
    """
    column, index = id_map.columns[:2]
    wanted = _as_series(ids, id_map[column]).unique(maintain_order=True)
    found = with_index(wanted.to_frame(), id_map)
    check_known(found, id_map, unknown)
    return id_map[found[index].drop_nulls().to_numpy()]


def with_index(rows: pl.DataFrame, id_map: pl.DataFrame) -> pl.DataFrame:
    """The rows in their order, with the map's index of their ids; null where it does not have one.

    Args:
        rows: has the map's column of ids.
        id_map: an id, its index, and whatever else.

    Raises:
        FastTowerError: integers where the map has text, or the other way round.
    """
    column, index = id_map.columns[:2]
    wanted, found = id_map.schema[column], rows.schema[column]
    if wanted.is_integer() != found.is_integer():
        raise FastTowerError(
            f"the {_plural(column)} given are {found}, those of the run are {wanted};"
            " convert them to that type."
        )
    # What does not fit the map's type is not in the map.
    key = pl.col(column) if wanted == found else pl.col(column).cast(wanted, strict=False)
    return (
        rows.with_columns(key.alias("key"))
        .join(id_map.select(pl.col(column).alias("key"), index), on="key", how="left", maintain_order="left")
        .drop("key")
    )


def check_known(rows: pl.DataFrame, id_map: pl.DataFrame, unknown: Unknown) -> None:
    """Check that the map has every id, unless unknown ones are to be skipped.

    Args:
        rows: as `with_index` returns them.
        id_map: the same.
        unknown: "raise" or "skip".

    Raises:
        FastTowerError: it has not.
    """
    check_choice(unknown)
    column, index = id_map.columns[:2]
    missing = rows.filter(pl.col(index).is_null())[column].unique(maintain_order=True)
    if unknown == "raise" and len(missing):
        some = ", ".join(repr(value) for value in missing.head(_NAMED_IN_ERRORS))
        more = ", ..." if len(missing) > _NAMED_IN_ERRORS else ""
        raise FastTowerError(
            f"{len(missing):,} of {rows[column].n_unique():,} {_plural(column)} are not in the run:"
            f" {some}{more}; it knows those of its training data alone. Leave them out, or skip them"
            " (unknown='skip', --unknown skip)."
        )


def check_choice(unknown: Unknown) -> None:
    """Check what is to be done about unknown ids.

    Raises:
        FastTowerError: neither "raise" nor "skip".
    """
    if unknown not in get_args(Unknown):
        raise FastTowerError(f"unknown is {unknown!r}; expected 'raise' or 'skip'.")


def _as_series(ids: Any, like: pl.Series) -> pl.Series:  # noqa: ANN401
    """Ids of whatever shape as a series: text or integers, as the map has it."""
    if ids is None:
        raise FastTowerError(f"the {_plural(like.name)} are None; give one, or a list of them.")
    if isinstance(ids, np.ndarray | np.generic):
        ids = ids.tolist()
    elif isinstance(ids, pl.LazyFrame) or hasattr(ids, "columns"):
        with open_table(ids) as table:
            rows = table.scan({})
            column = find_id_column(rows.collect_schema().names(), like.name, table.name)
            ids = rows.select(column).collect().to_series()
    if isinstance(ids, str | int | float):
        ids = [ids]
    elif isinstance(ids, set | frozenset):
        ids = list(ids)
    try:
        if isinstance(ids, bytes):
            raise TypeError("they are bytes")  # noqa: TRY301 - the same message as other types get
        series = pl.Series(like.name, ids)
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise FastTowerError(
            f"{_plural(like.name)} cannot be read ({reason}); expected a list of {like.dtype}."
        ) from error
    if series.is_empty():
        return like.clear()
    if series.dtype == pl.Null:
        return series.cast(like.dtype)
    if series.dtype in (pl.Categorical, pl.Enum):
        return series.cast(pl.String)
    if series.dtype != like.dtype and not (series.dtype.is_integer() and like.dtype.is_integer()):
        raise FastTowerError(
            f"the {_plural(like.name)} given are {series.dtype}, those of the run are {like.dtype};"
            " convert them to that type."
        )
    return series


def _plural(column: str) -> str:
    return f"{column.removesuffix('_id')} ids"
