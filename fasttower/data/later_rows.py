"""Interactions that come after training: read by the run's rules, and put beside its ids."""

from __future__ import annotations

from typing import Any

import polars as pl

from fasttower.config import DataConfig
from fasttower.data import filters
from fasttower.data.columns import columns_asked_for
from fasttower.data.readers import read_interactions
from fasttower.data.sources import open_table
from fasttower.errors import FastTowerError


def read_later_rows(source: Any, config: DataConfig, min_rating: float | None = None) -> pl.DataFrame:  # noqa: ANN401
    """The interactions of a path or frame, of which those rated too low are none.

    Args:
        source: a path, or a Polars, pandas or Arrow frame.
        config: the run's; its columns are looked for first, the usual names where they are not there.
        min_rating: rows rated less are left out; without a column of ratings all stay.

    Returns:
        user_id and item_id, integers or String.

    Raises:
        FastTowerError: as `read_interactions` does.
    """
    with open_table(source) as table:
        there = set(table.scan({}).collect_schema().names())
    asked = {role: name if name in there else None for role, name in columns_asked_for(config).items()}
    frame = read_interactions(source, asked).frame
    if min_rating is not None and "rating" in frame.columns:
        frame = frame.filter(filters.rated_at_least(min_rating))
    return frame.select(pl.col("user_id", "item_id")).with_columns(pl.col(pl.Categorical).cast(pl.String))


def with_index(rows: pl.DataFrame, id_map: pl.DataFrame) -> pl.DataFrame:
    """The rows in their order, with the map's index of their ids; null where it does not have one.

    Args:
        rows: has the map's column of ids.
        id_map: an id and its index.

    Raises:
        FastTowerError: integers where the map has text, or the other way round.
    """
    column, index = id_map.columns[:2]
    wanted, found = id_map.schema[column], rows.schema[column]
    if wanted.is_integer() != found.is_integer():
        kinds = ["integers" if dtype.is_integer() else "text" for dtype in (found, wanted)]
        raise FastTowerError(
            f"{column} holds {kinds[0]} where the run's data held {kinds[1]}; write both the same way."
        )
    if wanted.is_integer():
        rows = rows.with_columns(pl.col(column).cast(wanted, strict=False))
    return rows.join(id_map.select(column, index), on=column, how="left", maintain_order="left")
