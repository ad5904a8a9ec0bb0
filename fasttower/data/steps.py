"""What each step of the preparation leaves: the rows, the users and items in them, and their numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from fasttower.data import filters
from fasttower.data.ids import present
from fasttower.errors import FastTowerError


@dataclass(frozen=True)
class StepCount:
    """What is there after a step: one line of the table that the user sees."""

    step: str
    rows: int
    users: int
    items: int
    dropped_rows: int


@dataclass(frozen=True)
class Part:
    """Rows with codes for ids, and which codes occur in them.

    Attributes:
        rows: user_id and item_id, UInt32 codes, and whatever else is still needed.
        users: (number of user codes,) bool.
        items: (number of item codes,) bool.
    """

    rows: pl.DataFrame
    users: np.ndarray
    items: np.ndarray

    def warm(self) -> pl.Expr:
        """Those of any rows whose user and item are both in this part."""
        users, items = (
            pl.Series(np.flatnonzero(flags).astype(np.uint32)) for flags in (self.users, self.items)
        )
        return filters.warm(users, items)


class Steps:
    """The log of the steps, over a known number of user and item codes."""

    def __init__(self, num_users: int, num_items: int) -> None:
        self.num_users, self.num_items = num_users, num_items
        self.counts: list[StepCount] = []

    def add(self, step: str, rows: pl.DataFrame, dropped_from: Part | None = None) -> Part:
        """Log a step that leaves `rows`, of those that were there before if it drops any."""
        part = self.part(rows)
        users, items = int(np.count_nonzero(part.users)), int(np.count_nonzero(part.items))
        dropped = len(dropped_from.rows) - len(rows) if dropped_from else 0
        self.counts.append(StepCount(step, len(rows), users, items, dropped))
        return part

    def part(self, rows: pl.DataFrame) -> Part:
        """Rows with their users and items, without a line in the log."""
        return Part(rows, present(rows["user_id"], self.num_users), present(rows["item_id"], self.num_items))

    def keep(self, step: str, condition: pl.Expr, part: Part) -> Part:
        """Log and take a step that keeps the rows of a condition."""
        return self.add(step, part.rows.lazy().filter(condition).collect(), dropped_from=part)

    def check_left(self, name: str, rows_before: int | None = None) -> None:
        """Raise if the last step left nothing.

        Args:
            name: how its steps begin.
            rows_before: how many rows there were; those that the step dropped if not given.

        Raises:
            FastTowerError: it names the first of the steps of `name` that left nothing.
        """
        if self.counts[-1].rows:
            return
        empty = next(count for count in self.counts if count.step.startswith(name) and not count.rows)
        raise FastTowerError(
            f"nothing is left after the step {empty.step!r} "
            f"({empty.dropped_rows if rows_before is None else rows_before} rows before it);"
            " lower the minimum ratings and counts, change the fractions, or check that files share their ids"
        )
