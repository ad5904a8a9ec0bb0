"""Interactions that come after training, read by the run's rules."""

from __future__ import annotations

from typing import Any

import polars as pl

from fasttower.config import DataConfig
from fasttower.data import filters
from fasttower.data.columns import columns_asked_for
from fasttower.data.readers import read_interactions


def read_later_rows(source: Any, config: DataConfig, *, rated: bool = False) -> pl.DataFrame:  # noqa: ANN401
    """The users and items of a path or frame, in its order.

    Args:
        source: a path, or a Polars, pandas or Arrow frame.
        config: the run's; its columns are looked for first, the usual names where they are not there.
        rated: read a column of ratings too, if there is one.

    Returns:
        user_id and item_id, integers or String, and maybe rating (Float64).

    Raises:
        FastTowerError: as `read_interactions` does.
    """
    roles = ("user_id", "item_id", "rating") if rated else ("user_id", "item_id")
    frame = read_interactions(source, columns_asked_for(config), roles=roles, insist=False).frame
    return frame.with_columns(pl.col(pl.Categorical).cast(pl.String))


def positives(rows: pl.DataFrame, min_rating: float | None) -> pl.DataFrame:
    """The rows that are rated enough; all of them where there is no rating or no such limit."""
    if min_rating is None or "rating" not in rows.columns:
        return rows
    return rows.filter(filters.rated_at_least(min_rating))
