"""What training steps carry along, and what they are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.philox import seed_key
from fasttower_kernels.sampled_bce.settings import LossSettings
from fasttower_kernels.tables import Tables

Optimiser = Literal["auto", "adam", "lazy_adam"]
TableDtype = Literal["float32", "bfloat16"]

LAZY_PAYS_FROM = 3
"""Rows of the tables for each row that a batch touches, from which `auto` is lazy."""


@dataclass(frozen=True)
class TrainState:
    """The parameters and what Adam keeps of them, all of the same shapes.

    Gradients are zero between calls.
    """

    parameters: Tables
    gradients: Tables
    moments_1: Tables
    moments_2: Tables

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
            use, and the others at the end of a call; auto takes what `is_lazy` says.
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
        """Whether the optimiser of the compiled backends is lazy.

        `auto` is where the tables have at least `LAZY_PAYS_FROM` times the rows that a batch can touch:
        min(U, B) users and min(I, B * (1 + N)) items. On a CPU that was measured. On a GPU it is arithmetic:
        with 32 bytes a parameter of the rows that it passes over, lazy Adam moves at most a third of what
        dense Adam does, and draws the negatives a second time, about a sector of 32 bytes each.
        """
        if self.optimiser != "auto":
            return self.optimiser == "lazy_adam"
        users, items = len(tables.users), len(tables.items)
        touched = min(users, self.batch_size) + min(items, self.batch_size * (1 + self.loss.num_negatives))
        return users + items >= LAZY_PAYS_FROM * touched


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """S = ceil(n / B)."""
    return -(-num_rows // batch_size)
