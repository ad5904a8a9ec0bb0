"""Interactions that come after training, read by the run's rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from fasttower.config import DataConfig
from fasttower.data import filters
from fasttower.data.columns import columns_asked_for
from fasttower.data.readers import read_interactions


def read_later_rows(
    source: Any,  # noqa: ANN401
    config: DataConfig,
    *,
    rated: bool = False,
    like: Sequence[pl.DataFrame] = (),
) -> pl.DataFrame:
    """The users and items of a path or frame, in its order.

    Args:
        source: a path, or a Polars, pandas or Arrow frame.
        config: the run's; its columns are looked for first, the usual names where they are not there.
        rated: read a column of ratings too, if there is one.
        like: the run's maps of users and items, which give the ids' types where there are no rows; without
            them this is an error.

    Returns:
        user_id and item_id, integers or String, and maybe rating (Float64).

    Raises:
        FastTowerError: as `read_interactions` does.
    """
    roles = ("user_id", "item_id", "rating") if rated else ("user_id", "item_id")
    asked = columns_asked_for(config)
    frame = read_interactions(source, asked, roles=roles, insist=False, empty=bool(like)).frame
    if frame.is_empty():
        types = {name: dtype for id_map in like for name, dtype in id_map.schema.items()}
        return pl.DataFrame(schema={name: types.get(name, pl.Float64()) for name in frame.columns})
    return frame.with_columns(pl.col(pl.Categorical).cast(pl.String))


def positives(rows: pl.DataFrame, min_rating: float | None) -> pl.DataFrame:
    """The rows that are rated enough; all of them where there is no rating or no such limit."""
    if min_rating is None or "rating" not in rows.columns:
        return rows
    return rows.filter(filters.rated_at_least(min_rating))
