"""The caller's ids and their dense indices."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, Literal, get_args

import numpy as np
import polars as pl

from fasttower.data.columns import find_id_column
from fasttower.data.sources import open_table
from fasttower.errors import FastTowerError, listed, quoted, reason

Unknown = Literal["raise", "skip"]

_NAMED_IN_ERRORS = 5

# A binary search takes some 3 microseconds per id, a join 200 and then 10 nanoseconds per row of the map.
_SEARCHED, _ROWS_PER_SEARCHED = 16, 256


class IdMap:
    """Ids and their indices, checked once, so that a question of one id does not read all of them.

    The frame is taken without a copy, and must not change afterwards.

    Attributes:
        frame: (n,): the map as it was given.
        ids: (n,): its ids; the id at position i has index i.
        titles: (n,): what they are called, or None if the frame has no column ``title``.

    Args:
        frame: ``user_id, user_index`` or ``item_id, item_index``, and whatever else; row i holds index i.
            Lookups are fastest where it is sorted by id, as a run's maps are.

    Raises:
        FastTowerError: the indices have gaps or are out of order.
    """

    def __init__(self, frame: pl.DataFrame) -> None:
        self.id_name, self.index_name = frame.columns[:2]
        self.frame, self.ids, index = frame, frame[self.id_name], frame[self.index_name]
        self.titles = frame["title"] if "title" in frame.columns else None
        if not np.array_equal(index.to_numpy(), np.arange(len(index))):
            raise FastTowerError(
                f"the map of {self.id_name} has gaps or is out of order; sort it by {self.index_name}"
            )
        self._index_type = index.dtype
        self._is_sorted = self.ids.is_sorted()

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: Any, unknown: Unknown = "raise") -> np.ndarray:  # noqa: ANN401
        """The indices of some ids, in the order given, each once.

        Args:
            ids: one id, or a list, set, array or series of them, or a frame with a column of a usual name, or
                with only one column; text where the map has text, integers of any width where it has
                integers.
            unknown: what to do about ids that the map does not have: "raise", or "skip" them.

        Returns:
            (n,), integer.

        Raises:
            FastTowerError: ids of another type, or unknown ones, some of which are named.
        """
        wanted = _as_series(ids, self.ids)
        if len(wanted) > 1:
            wanted = wanted.unique(maintain_order=True)
        index = self._index_of(wanted)
        self._check_known(wanted, index, unknown)
        return (index.drop_nulls() if index.null_count() else index).to_numpy()

    def with_index(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The rows in their order, with the index of their ids; null where the map does not have one.

        Args:
            rows: has the map's column of ids.

        Raises:
            FastTowerError: integers where the map has text, or the other way round.
        """
        return rows.with_columns(self._index_of(rows[self.id_name]))

    def known(self, rows: pl.DataFrame, unknown: Unknown) -> pl.DataFrame:
        """The rows whose ids the map has, in their order, with the index of their ids.

        Args:
            rows: has the map's column of ids.
            unknown: what to do about ids that the map does not have: "raise", or "skip" their rows.

        Raises:
            FastTowerError: ids of another type, or unknown ones, some of which are named.
        """
        rows = self.with_index(rows)
        self._check_known(rows[self.id_name], rows[self.index_name], unknown)
        return rows.drop_nulls(self.index_name)

    def _index_of(self, wanted: pl.Series) -> pl.Series:
        """The index of each id, null where the map does not have it; of the type of the map's index."""
        if wanted.dtype.is_integer() != self.ids.dtype.is_integer():
            raise FastTowerError(
                f"the {_plural(self.id_name)} given are {wanted.dtype}, those of the run are"
                f" {self.ids.dtype}; convert them to that type."
            )
        # What does not fit the map's type is not in the map.
        key = wanted.cast(self.ids.dtype, strict=False)
        few = len(key) <= _SEARCHED + len(self) // _ROWS_PER_SEARCHED
        if few and self._is_sorted and not key.null_count():
            places = [self._place(value) for value in key]
            return pl.Series(self.index_name, places, dtype=self._index_type)
        keys = pl.DataFrame([key.alias(self.id_name)])
        return keys.join(
            self.frame.select(self.id_name, self.index_name),
            on=self.id_name,
            how="left",
            maintain_order="left",
        )[self.index_name]

    def _place(self, value: object) -> int | None:
        """Where an id is among the sorted ones, by binary search; None where it is not."""
        place = bisect_left(self.ids, value)
        return place if place < len(self) and self.ids[place] == value else None

    def _check_known(self, ids: pl.Series, index: pl.Series, unknown: Unknown) -> None:
        check_choice(unknown)
        if unknown == "skip" or not index.null_count():
            return
        missing = ids.filter(index.is_null()).unique(maintain_order=True)
        some = listed(map(repr, missing.head(_NAMED_IN_ERRORS)))
        more = ", ..." if len(missing) > _NAMED_IN_ERRORS else ""
        raise FastTowerError(
            f"{len(missing):,} of {ids.n_unique():,} {_plural(self.id_name)} are not in the run:"
            f" {some}{more}; it knows only those of its training data. Leave them out, or skip them"
            " (unknown='skip', --unknown skip)."
        )


def check_choice(unknown: Unknown) -> None:
    """Check what is to be done about unknown ids.

    Raises:
        FastTowerError: neither "raise" nor "skip".
    """
    if unknown not in get_args(Unknown):
        raise FastTowerError(f"unknown is {quoted(unknown)}; expected 'raise' or 'skip'.")


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
        raise FastTowerError(
            f"{_plural(like.name)} cannot be read ({reason(error)}); expected a list of {like.dtype}."
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
