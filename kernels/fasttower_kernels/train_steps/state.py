"""What training steps carry along, and what they are told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.philox import seed_key
from fasttower_kernels.sampled_bce.settings import LossSettings
from fasttower_kernels.tables import Tables

Optimiser = Literal["auto", "adam", "lazy_adam"]
TableDtype = Literal["float32", "bfloat16"]

LAZY_PAYS_FROM = 3
"""Rows of the tables for each row that a batch touches, from which `auto` is lazy on a CPU."""

LAZY_ROW = 1.5
"""Rows of a whole update in the time that a GPU takes for one that is updated lazily."""

LAZY_SAVES_FROM_BYTES = 16 << 20
"""Memory traffic per step from which `auto` is lazy on a GPU with a table that would save it."""


class LazyTables(NamedTuple):
    """Which tables the optimiser is lazy with; the item bias goes with the items."""

    users: bool
    items: bool


@dataclass(frozen=True)
class TrainState:
    """The parameters and what Adam keeps of them, all of the same shapes.

    Gradients are zero between calls.

    Attributes:
        parameters: users, items and item bias.
        gradients: of the loss.
        moments_1: Adam's first.
        moments_2: Adam's second.
        prepared: what a backend keeps for further steps with these arrays; not a part of the state.
    """

    parameters: Tables
    gradients: Tables
    moments_1: Tables
    moments_2: Tables
    prepared: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @staticmethod
    def start(parameters: Tables) -> TrainState:
        """The state before step 0; the parameters are used in place."""
        return TrainState(
            parameters, parameters.zeros_like(), parameters.zeros_like(), parameters.zeros_like()
        )


@dataclass(frozen=True)
class StepSettings:
    """Settings of a run's steps.

    Attributes:
        loss: of a batch.
        learning_rate: Adam's step size.
        batch_size: B, positives in a batch; the last one of an epoch may be shorter.
        seed: of the negatives and the order.
        optimiser: adam updates every row in each step; lazy_adam, in the same way to rounding, the rows in
            use, and the others at the end of a call. auto chooses by the sizes: numba for both tables
            together (`is_lazy`), triton for each of them (`lazy_tables`); torch takes adam.
        table_dtype: of the user and item vectors as the loss and its gradients read them. With bfloat16 they
            are rounded, to nearest, ties to even; the item bias, all arithmetic, the gradients and the
            tables that Adam updates stay float32, so that updates too small for bfloat16 add up. Backends
            triton and torch. Against float64 of the unrounded tables, a batch of 8,192 of a MovieLens-1M run
            (dimension 64, 12 epochs) had a relative error of up to 7e-6 in the loss, 2e-3 in the gradients
            of users and items and 4e-4 in that of the bias, where float32 had 5e-8 and 1e-7 (``python -m
            benchmarks.bfloat16_error``). Source: Micikevicius et al., "Mixed Precision Training" (ICLR
            2018), section 3.1.
    """

    loss: LossSettings
    learning_rate: float
    batch_size: int
    seed: int
    optimiser: Optimiser = "auto"
    table_dtype: TableDtype = "float32"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.batch_size < 1:
            raise FastTowerError(f"batch_size is {self.batch_size}; expected 1 or more.")
        if not 0 < self.learning_rate < float("inf"):
            raise FastTowerError(f"learning_rate is {self.learning_rate}; expected a finite number above 0.")
        if self.optimiser not in get_args(Optimiser):
            raise FastTowerError(
                f"optimiser is {self.optimiser!r}; expected one of {', '.join(get_args(Optimiser))}."
            )
        if self.table_dtype not in get_args(TableDtype):
            raise FastTowerError(
                f"table_dtype is {self.table_dtype!r}; expected one of {', '.join(get_args(TableDtype))}."
            )
        seed_key(self.seed)

    def is_lazy(self, tables: Tables) -> bool:
        """Whether the optimiser of the numba backend is lazy.

        `auto` is where the tables have at least `LAZY_PAYS_FROM` times the rows that a batch can touch:
        min(U, B) users and min(I, B * (1 + N)) items. That was measured.
        """
        if self.optimiser != "auto":
            return self.optimiser == "lazy_adam"
        users, items = len(tables.users), len(tables.items)
        touched = min(users, self.batch_size) + min(items, self.batch_size * (1 + self.loss.num_negatives))
        return users + items >= LAZY_PAYS_FROM * touched

    def lazy_tables(self, tables: Tables) -> LazyTables:
        """Which tables the optimiser of the Triton backend is lazy with.

        This is arithmetic, not a measurement. A whole update of R rows moves 32 * R * P bytes. Of a lazy
        table a batch updates at most R * (1 - exp(-draws / R)) rows, the expected number of distinct ones if
        all are drawn alike: B users, B * (1 + N) items. They are scattered, and each pair exchanges a stamp
        and, for the items, draws the negatives a second time, a sector of 32 bytes each: counted as
        `LAZY_ROW` rows of a whole update. What remains must be worth the chain of memory accesses from a
        position to its row, one after another: `LAZY_SAVES_FROM_BYTES`, which an H100 moves in 6
        microseconds. At MovieLens 20M's sizes (138,493 users, 26,744 items, 10 negatives, 64 dimensions)
        users are lazy up to batches of about 137,000, and items only up to 1,500.
        """
        if self.optimiser != "auto":
            lazy = self.optimiser == "lazy_adam"
            return LazyTables(lazy, lazy)

        def pays(rows: int, draws: int) -> bool:
            touched = -rows * math.expm1(-draws / max(rows, 1))
            saved = 32 * tables.users.shape[1] * (rows - LAZY_ROW * touched)
            return saved >= LAZY_SAVES_FROM_BYTES

        pairs = self.batch_size * (1 + self.loss.num_negatives)
        return LazyTables(pays(len(tables.users), self.batch_size), pays(len(tables.items), pairs))


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """S = ceil(n / B)."""
    return -(-num_rows // batch_size)
