"""Which rows come before a cut: by time, at random, or all but each user's last.

Each split is a Polars expression, true for the rows that stay before the cut; it works on any frame, and the
rows keep their order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl


def earlier_rows(keys: np.ndarray, fraction: float) -> np.ndarray:
    """The first `int(n * (1 - fraction))` rows in the order (key, row), without sorting them.

    The key at the cut is selected in linear time; rows below it are before the cut, and of its ties the first
    in the file, as many as are missing.

    Args:
        keys: (n,), any ordered dtype without NaN.
        fraction: the share of rows after the cut, 0 to 1.

    Returns:
        (n,) bool, true before the cut.
    """
    cut = int(len(keys) * (1 - fraction))
    if cut == len(keys):
        return np.ones(len(keys), dtype=bool)
    at_cut = np.partition(keys, cut)[cut]
    earlier = keys < at_cut
    missing = cut - np.count_nonzero(earlier)
    earlier[np.flatnonzero(keys == at_cut)[:missing]] = True
    return earlier


def before_time_cut(fraction: float) -> pl.Expr:
    """All but the last `fraction` of the time line, in the stable order of (timestamp, row).

    Source: RePlay's `TimeSplitter` with a fraction, in its Polars version.
    """
    return _of_whole_column("timestamp", lambda timestamps: earlier_rows(timestamps, fraction))


def before_random_cut(fraction: float, key: tuple[int, int]) -> pl.Expr:
    """All but a random `fraction` of the rows: the time cut over random keys, drawn from PCG64 of `key`.

    The raw 64-bit words are used because numpy keeps them the same from version to version, unlike what the
    methods of its `Generator` return.
    """

    def draw(column: np.ndarray) -> np.ndarray:
        return earlier_rows(np.random.PCG64(list(key)).random_raw(len(column)), fraction)

    return _of_whole_column("user_id", draw)


def before_last() -> pl.Expr:
    """All but each user's last row, in the stable order of (timestamp, row)."""
    return pl.col("timestamp").rank("ordinal").over("user_id") < pl.len().over("user_id")


def _of_whole_column(column: str, select: Callable[[np.ndarray], np.ndarray]) -> pl.Expr:
    return pl.col(column).map_batches(
        lambda values: pl.Series(select(values.to_physical().to_numpy())), return_dtype=pl.Boolean
    )
