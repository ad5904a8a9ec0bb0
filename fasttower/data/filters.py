"""The filters of the preparation, as Polars expressions over `user_id`, `item_id`, `rating`.

Each works on any frame, lazy or not, with whatever other columns, and equals RePlay's filter of the same
meaning row for row.
"""

from __future__ import annotations

import polars as pl

from fasttower.data.ids import counts, encode, look_up


def rated_at_least(minimum: float) -> pl.Expr:
    """Rows rated `minimum` or more. Source: RePlay's `LowRatingFilter`."""
    return pl.col("rating") >= minimum


def occurs_at_least(column: str, minimum: int) -> pl.Expr:
    """Rows whose id in `column` has `minimum` rows or more. Source: RePlay's `MinCountFilter`."""

    def often(ids: pl.Series) -> pl.Series:
        codes = ids if _are_codes(ids) else encode(ids)[0]
        if codes.is_empty():
            return pl.Series([], dtype=pl.Boolean)
        return look_up(counts(codes, int(codes.max()) + 1) >= minimum, codes)  # type: ignore[arg-type]

    # Counting in a table is several times faster than a window over groups.
    return pl.col(column).map_batches(often, return_dtype=pl.Boolean)


def _are_codes(ids: pl.Series) -> bool:
    """Whether ids can be counted as they are, in a table no longer than their column."""
    return ids.dtype.is_unsigned_integer() and not ids.is_empty() and int(ids.max()) <= len(ids)  # type: ignore[arg-type]


def warm(users: pl.Series, items: pl.Series) -> pl.Expr:
    """Rows whose user and item are both known. Source: RePlay's `drop_cold_users` and `drop_cold_items`."""
    return pl.col("user_id").is_in(users.implode()) & pl.col("item_id").is_in(items.implode())
