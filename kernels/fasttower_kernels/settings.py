"""What training steps are told: the loss, the negatives, the optimiser and the batches.

Needs neither torch nor numpy, so that a configuration can be made of it at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.philox import seed_key

Backend = Literal["auto", "triton", "numba", "torch"]
LossName = Literal["bce", "gbce", "bpr", "softmax"]
LossScale = Literal["positives", "pairs"]
Optimiser = Literal["auto", "adam", "lazy_adam"]
Proposal = Literal["uniform", "popularity", "shared", "in-batch", "mixed"]
Similarity = Literal["dot", "cosine"]
TableDtype = Literal["float32", "bfloat16"]

MAX_BLOCK_SIZE = 1 << 14

LAZY_PAYS_FROM = 3
"""Rows of the tables for each row that a batch touches, from which `auto` is lazy on a CPU."""

LAZY_ROW = 1.5
"""Rows of a whole update in the time that a GPU takes for one that is updated lazily."""

LAZY_SAVES_FROM_BYTES = 16 << 20
"""Memory traffic per step from which `auto` is lazy on a GPU with a table that would save it."""


@dataclass(frozen=True)
class LossSettings:
    """The loss of a positive and its negatives.

    A logit is ``x = <u, v> + bias``, or with cosine similarity ``<u, v> / (|u| |v| temperature) + bias``,
    where a norm below 1e-8 counts as 1e-8. The batch's loss is the mean over its B positives of the loss's
    value and

        user_l2 |u|^2 + 2 / (N + 1) * sum_{j in {+, k}} (item_l2 |v_j|^2 + bias_l2 bias_j^2)

    with N the negatives that the positive is scored against (of shared ones, the length of the list).

    Attributes:
        name: the loss; each is a folder beside this file, with its formula and its source.
        calibration: t of gbce, 0 to 1; other losses do not read it.
        similarity: of a user's and an item's vector.
        temperature: of cosine similarity, above 0; dot does not read it.
        user_l2: weight of the users' L2 term, 0 or more.
        item_l2: weight of the items' L2 term, 0 or more.
        bias_l2: weight of the item biases' L2 term, 0 or more.
        scale: divide the batch's sum by its positives, or by its positive and negative pairs.
    """

    name: LossName = "bce"
    calibration: float = 0.75
    similarity: Similarity = "dot"
    temperature: float = 0.2
    user_l2: float = 0.0
    item_l2: float = 0.0
    bias_l2: float = 0.0
    scale: LossScale = "positives"

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_name("the loss", self.name, LossName)
        _check_name("the similarity", self.similarity, Similarity)
        _check_name("the loss's scale", self.scale, LossScale)
        for name in ("user_l2", "item_l2", "bias_l2"):
            if not 0 <= getattr(self, name) < math.inf:
                raise FastTowerError(f"{name} is {getattr(self, name)}; expected a finite number, 0 or more.")
        if not 0 < self.temperature < math.inf:
            raise FastTowerError(f"temperature is {self.temperature}; expected a finite number above 0.")
        if not 0 <= self.calibration <= 1:
            raise FastTowerError(f"calibration is {self.calibration}; expected a number from 0 to 1.")

    @property
    def has_l2(self) -> bool:
        """Whether there is an L2 term."""
        return bool(self.user_l2 or self.item_l2 or self.bias_l2)

    @property
    def is_cosine(self) -> bool:
        """Whether vectors are normalised."""
        return self.similarity == "cosine"

    @property
    def norm_temperature(self) -> float | None:
        """The temperature of normalised vectors; None for the dot product."""
        return self.temperature if self.is_cosine else None

    @property
    def reads_log_q(self) -> bool:
        """Whether the loss corrects for how often a negative is drawn."""
        return self.name == "softmax"

    def shared_positive_weight(self, drawn_rate: float) -> float:
        """Beta of gbce where a list is shared, 1 for other losses.

        Args:
            drawn_rate: how often an item is expected among the drawn ones of a list.
        """
        return 1 - self.calibration * (1 - min(drawn_rate, 1.0)) if self.name == "gbce" else 1.0

    def pairs(self, num_negatives: int) -> int:
        """Terms of the loss for each positive that it is averaged over: 1, or 1 + N."""
        return 1 if self.scale == "positives" else 1 + num_negatives

    def divisor(self, batch_size: int, num_negatives: int) -> int:
        """What the sum over a batch is divided by."""
        return batch_size * self.pairs(num_negatives)


@dataclass(frozen=True)
class NegativeSettings:
    """Where the negatives of a positive come from.

    Attributes:
        proposal: uniform and popularity draw ``count`` negatives for each positive. The others score a block
            of positives against one list: shared draws it uniformly, in-batch takes the block's own items,
            mixed takes both.
        count: N, drawn for each positive or for each block, 0 or more; in-batch does not read it.
        pool: where it is not 0, draw so many for each positive and keep the N with the largest logits.
        popularity_power: an item is drawn in proportion to its count to this power, 0 or more; only
            popularity reads it.
        block_size: positives that share a list: consecutive positions of the batch.
    """

    proposal: Proposal = "uniform"
    count: int = 10
    pool: int = 0
    popularity_power: float = 0.75
    block_size: int = 256

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_name("the negatives' proposal", self.proposal, Proposal)
        if self.count < 0:
            raise FastTowerError(f"the number of negatives is {self.count}; expected 0 or more.")
        if self.pool and (self.is_shared or not max(self.count, 1) <= self.pool):
            raise FastTowerError(
                f"the pool of hard negatives is {self.pool} for {self.count} {self.proposal} negatives; "
                "expected 0, or at least as many as are kept, with uniform or popularity."
            )
        if not 0 <= self.popularity_power < math.inf:
            raise FastTowerError(
                f"popularity_power is {self.popularity_power}; expected a finite number, 0 or more."
            )
        if not 1 <= self.block_size <= MAX_BLOCK_SIZE:
            raise FastTowerError(f"block_size is {self.block_size}; expected 1 to {MAX_BLOCK_SIZE}.")

    @property
    def is_shared(self) -> bool:
        """Whether a block of positives is scored against one list."""
        return self.proposal in ("shared", "in-batch", "mixed")

    @property
    def drawn(self) -> int:
        """How many are drawn for each positive, or for each block."""
        return 0 if self.proposal == "in-batch" else self.pool or self.count

    @property
    def scored(self) -> int:
        """Negatives in the loss of a positive of a full block, masked ones among them."""
        in_batch = self.block_size if self.proposal in ("in-batch", "mixed") else 0
        return in_batch + (0 if self.proposal == "in-batch" else self.count)


@dataclass(frozen=True)
class StepSettings:
    """Settings of a run's steps.

    Attributes:
        learning_rate: Adam's step size.
        batch_size: B, positives in a batch; the last one of an epoch may be shorter.
        seed: of the negatives and the order.
        loss: of a positive.
        negatives: of a positive.
        optimiser: adam updates every row in each step; lazy_adam, in the same way to rounding, the rows in
            use, and the others at the end of a call. auto chooses by the sizes: numba for both tables
            together (`is_lazy`), triton for each of them (`lazy_tables`; adam where negatives are shared,
            and lazy_adam is refused there); torch takes adam.
        table_dtype: of the user and item vectors as the loss and its gradients read them. With bfloat16 they
            are rounded, to nearest, ties to even; the item bias, all arithmetic, the gradients and the
            tables that Adam updates stay float32, so that updates too small for bfloat16 add up. Backends
            triton and torch. Against float64 of the unrounded tables, a batch of 8,192 of a MovieLens-1M run
            (dimension 64, 12 epochs) had a relative error of up to 7e-6 in the loss, 2e-3 in the gradients
            of users and items and 4e-4 in that of the bias, where float32 had 5e-8 and 1e-7 (``python -m
            benchmarks.bfloat16_error``). Source: Micikevicius et al., "Mixed Precision Training" (ICLR
            2018), section 3.1.
        deterministic: repeat bit for bit on a GPU too, without floating-point atomics; on a CPU steps do, for
            their number of threads. Backend triton holds the (B, 1 + N) items and slopes of a batch for it;
            `check_on_gpu` says what it does not go together with.
    """

    learning_rate: float
    batch_size: int
    seed: int
    loss: LossSettings = field(default_factory=LossSettings)
    negatives: NegativeSettings = field(default_factory=NegativeSettings)
    optimiser: Optimiser = "auto"
    table_dtype: TableDtype = "float32"
    deterministic: bool = False

    def __post_init__(self) -> None:
        """Check the ranges, and that the loss and the negatives go together."""
        if self.batch_size < 1:
            raise FastTowerError(f"batch_size is {self.batch_size}; expected 1 or more.")
        if not 0 < self.learning_rate < math.inf:
            raise FastTowerError(f"learning_rate is {self.learning_rate}; expected a finite number above 0.")
        _check_name("the optimiser", self.optimiser, Optimiser)
        _check_name("table_dtype", self.table_dtype, TableDtype)
        seed_key(self.seed)
        check_together(self.loss, self.negatives)

    def is_lazy(self, num_users: int, num_items: int) -> bool:
        """Whether the optimiser of the numba backend is lazy.

        `auto` is where the tables have at least `LAZY_PAYS_FROM` times the rows that a batch can touch:
        min(U, B) users, and of the items at most the positives and all that are drawn. That was measured.
        """
        if self.optimiser != "auto":
            return self.optimiser == "lazy_adam"
        touched = min(num_users, self.batch_size) + min(num_items, self.batch_size + self._drawn_per_batch)
        return num_users + num_items >= LAZY_PAYS_FROM * touched

    def lazy_tables(self, num_users: int, num_items: int, width: int) -> LazyTables:
        """Which tables the optimiser of the Triton backend is lazy with; none where negatives are shared.

        This is arithmetic, not a measurement. A whole update of R rows moves 32 * R * P bytes. Of a lazy
        table a batch updates at most R * (1 - exp(-draws / R)) rows, the expected number of distinct ones if
        all are drawn alike: B users, B * (1 + N) items. They are scattered, and each pair exchanges a stamp
        and, for the items, draws the negatives a second time, a sector of 32 bytes each: counted as
        `LAZY_ROW` rows of a whole update. What remains must be worth the chain of memory accesses from a
        position to its row, one after another: `LAZY_SAVES_FROM_BYTES`, which an H100 moves in 6
        microseconds. At MovieLens 20M's sizes (138,493 users, 26,744 items, 10 negatives, 64 dimensions)
        users are lazy up to batches of about 137,000, and items only up to 1,500.

        Args:
            num_users: U.
            num_items: I.
            width: P.
        """
        if self.negatives.is_shared:
            return LazyTables(users=False, items=False)
        if self.optimiser != "auto":
            lazy = self.optimiser == "lazy_adam"
            return LazyTables(lazy, lazy)

        def pays(rows: int, draws: int) -> bool:
            touched = -rows * math.expm1(-draws / max(rows, 1))
            return 32 * width * (rows - LAZY_ROW * touched) >= LAZY_SAVES_FROM_BYTES

        pairs = self.batch_size + self._drawn_per_batch
        return LazyTables(pays(num_users, self.batch_size), pays(num_items, pairs))

    @property
    def _drawn_per_batch(self) -> int:
        lists = -(-self.batch_size // self.negatives.block_size)
        return self.negatives.drawn * (lists if self.negatives.is_shared else self.batch_size)


class LazyTables(NamedTuple):
    """Which tables the optimiser is lazy with; the item bias goes with the items."""

    users: bool
    items: bool


def check_together(loss: LossSettings, negatives: NegativeSettings) -> None:
    """Check that a loss and negatives go together.

    Raises:
        FastTowerError: they do not; the message says what does.
    """
    if loss.name == "gbce" and negatives.proposal not in ("uniform", "shared"):
        raise FastTowerError(
            f"loss gbce is calibrated for uniform negatives, not {negatives.proposal} ones; choose uniform "
            "or shared negatives, or loss bce, bpr or softmax."
        )
    if loss.scale == "pairs" and negatives.is_shared:
        raise FastTowerError(
            f"loss scale pairs counts the negatives of each positive, which {negatives.proposal} ones share; "
            "choose loss scale positives, or uniform or popularity negatives."
        )


def check_on_gpu(
    loss: LossSettings, negatives: NegativeSettings, optimiser: Optimiser, *, deterministic: bool
) -> None:
    """Check that the Triton backend can do what is asked.

    Raises:
        FastTowerError: it cannot; the message says what goes together.
    """
    if optimiser == "lazy_adam" and negatives.is_shared:
        raise FastTowerError(
            f"backend triton updates whole tables where {negatives.proposal} negatives are used; choose "
            "optimiser auto or adam, or uniform or popularity negatives."
        )
    reasons = {
        f"{negatives.proposal} negatives": negatives.is_shared,
        "cosine similarity": loss.is_cosine,
        "an L2 of the item biases": loss.bias_l2 > 0,
    }
    found = next((reason for reason, there in reasons.items() if there), None)
    if deterministic and found:
        raise FastTowerError(
            f"on a GPU, runs with {found} do not repeat bit for bit; those with uniform or popularity "
            "negatives, the dot product and no bias_l2 do: choose these, device cpu, or deterministic off."
        )


def _check_name(what: str, value: str, kind: object) -> None:
    if value not in get_args(kind):
        raise FastTowerError(f"{what} is {value!r}; expected one of {', '.join(get_args(kind))}.")
