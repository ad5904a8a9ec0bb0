"""From a source of interactions to dense, split frames, with a count of what every step kept and dropped.

    read -> min_rating -> min_user_interactions -> min_item_interactions      each once, in this order
         -> test cut, if any -> validation cut, if any                        fit = all before the test cut
         -> cold rows dropped -> test_min_rating -> repeated pairs dropped    on test and valid
         -> dense indices in the order of the ids of fit

The ids are replaced by small codes before anything else, so that every later step moves and compares 4 bytes.
With files for validation or test instead of cuts, min_rating holds for their rows too, the minimum counts are
those of the source alone, and fit is the source with the warm validation rows behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from fasttower.config import DataConfig
from fasttower.data import catalog, filters, splits
from fasttower.data.ids import densify, look_up, present
from fasttower.data.loading import load
from fasttower.data.steps import Part, StepCount, Steps
from fasttower_kernels.philox import Purpose, derive_key

__all__ = ["PreparedData", "StepCount", "prepare"]


ENOUGH_USERS = 2_000
"""Validation users below which there is another validation cut."""

MOST_CUTS = 2


@dataclass(frozen=True)
class PreparedData:
    """Interactions ready to train and to test on.

    The parts have the columns user_index and item_index, Int32.

    Attributes:
        fit: all rows before the test cut, in the order of the file, repeats kept; without a test part all.
        train: fit's rows before the validation cut; equal to fit where there is no validation part.
        valid: validation rows whose user and item are in train, unique pairs; None where there are none.
        earlier_cuts: (train, valid) of more validation cuts, each within the train of the one before.
        test: test rows whose user and item are in fit, unique pairs; None with a test fraction of 0.
        users: user_id (the caller's type) and user_index, sorted by id: the users of fit.
        items: item_id and item_index, likewise; and title, null where there is none, for MovieLens.
        steps: what each step kept and dropped.
        timestamp_unit: "s", "ms", "us", "ns", "datetime", or None without timestamps.
        test_pairs_in_fit: test pairs that fit has already; they count as relevant, and cannot be recommended
            where seen items are left out.
    """

    fit: pl.DataFrame
    train: pl.DataFrame
    valid: pl.DataFrame | None
    earlier_cuts: tuple[tuple[pl.DataFrame, pl.DataFrame], ...]
    test: pl.DataFrame | None
    users: pl.DataFrame
    items: pl.DataFrame
    steps: tuple[StepCount, ...]
    timestamp_unit: str | None
    test_pairs_in_fit: int

    @property
    def cuts(self) -> tuple[tuple[pl.DataFrame, pl.DataFrame], ...]:
        """(train, valid) of all validation cuts, the last one in time first."""
        return () if self.valid is None else ((self.train, self.valid), *self.earlier_cuts)

    def original_ids(self, part: pl.DataFrame) -> pl.DataFrame:
        """The rows of a part in the caller's ids: user_id and item_id."""
        return pl.DataFrame(
            [
                self.users["user_id"].gather(part["user_index"]),
                self.items["item_id"].gather(part["item_index"]),
            ]
        )


def prepare(
    source: Any,  # noqa: ANN401 - frames of libraries that may not be there
    config: DataConfig,
    seed: int = 0,
    on_download: catalog.Progress | None = None,
) -> PreparedData:
    """Read, filter, split and index interactions.

    Args:
        source: a name of the catalogue, a path, or a Polars, pandas or Arrow frame; stands for `config.data`.
        config: columns, filters and split.
        seed: of synthetic data and of the random split.
        on_download: told of the progress of a download.

    Raises:
        FastTowerError: a source that cannot be read, a setting whose column it lacks, or a part left empty.
    """
    loaded = load(source, config, seed, on_download)
    steps = Steps(len(loaded.user_ids), len(loaded.item_ids))
    test, valid = _beside("test", loaded.test, config, steps), _beside("valid", loaded.valid, config, steps)
    user_ids, item_ids, timestamp_unit = loaded.user_ids, loaded.item_ids, loaded.timestamp_unit
    titles = loaded.titles
    part = steps.add("read", loaded.source)
    del loaded  # every row is held once
    for step, condition in _filters(config):
        part = steps.keep(step, condition, part)
        steps.check_left(step)
    num_rows = len(part.rows)
    rows = part.rows if config.test_min_rating is not None else part.rows.drop("rating", strict=False)
    del part

    if test is None and config.test_fraction > 0:
        before = _before_cut(rows, config, config.test_fraction, derive_key(seed, Purpose.RANDOM_SPLIT, 0))
        rows, test = rows.filter(before), rows.filter(~before)
    in_train = None
    if valid is not None:
        rows, valid, in_train = _append_warm(rows, valid, steps)
    elif config.valid_fraction > 0:
        in_train = _before_cut(rows, config, config.valid_fraction, derive_key(seed, Purpose.RANDOM_SPLIT, 1))
        valid = rows.filter(~in_train)

    fit = steps.add("fit (no test part)" if test is None else "fit (before the test cut)", rows)
    steps.check_left("fit", num_rows)
    if valid is not None and in_train is not None:
        train = steps.add("train (before the validation cut)", rows.filter(in_train))
        valid = _to_evaluate("valid", valid, train, config.test_min_rating, steps)
        del train
        if config.valid_data:
            steps.check_left("valid")
        if valid.is_empty():
            valid = None
    earlier_cuts = _earlier_cuts(rows, in_train, valid, config, seed, steps)
    if test is not None:
        test = _to_evaluate("test", test, fit, config.test_min_rating, steps)
        steps.check_left("test")

    index = _Index(densify(fit.users), densify(fit.items))
    fit_rows, test = index.apply(fit.rows), None if test is None else index.apply(test)
    users = _id_map("user", user_ids, fit.users)
    return PreparedData(
        fit=fit_rows,
        train=fit_rows if valid is None or in_train is None else fit_rows.filter(in_train),
        valid=None if valid is None else index.apply(valid),
        earlier_cuts=tuple((index.apply(train), index.apply(valid)) for train, valid in earlier_cuts),
        test=test,
        users=users,
        items=_with_titles(_id_map("item", item_ids, fit.items), titles),
        steps=tuple(steps.counts),
        timestamp_unit=timestamp_unit,
        test_pairs_in_fit=0 if test is None else _pairs_in_common(test, fit_rows, len(users)),
    )


def _earlier_cuts(
    rows: pl.DataFrame,
    in_train: pl.Series | None,
    valid: pl.DataFrame | None,
    config: DataConfig,
    seed: int,
    steps: Steps,
) -> list[tuple[pl.DataFrame, pl.DataFrame]]:
    """More validation cuts where the users of the first one are few: what they say together is less noisy."""
    cuts: list[tuple[pl.DataFrame, pl.DataFrame]] = []
    if in_train is None or valid is None or config.valid_data:
        return cuts
    num_users = valid["user_id"].n_unique()
    apart = Steps(steps.num_users, steps.num_items)  # the log tells of the first cut
    while num_users < ENOUGH_USERS and len(cuts) + 1 < MOST_CUTS:
        rows = rows.filter(in_train)
        key = derive_key(seed, Purpose.RANDOM_SPLIT, 2 + len(cuts))
        in_train = _before_cut(rows, config, config.valid_fraction, key)
        train = rows.filter(in_train)
        valid = _to_evaluate(
            "valid", rows.filter(~in_train), steps.part(train), config.test_min_rating, apart
        )
        if valid.is_empty():
            break
        num_users += valid["user_id"].n_unique()
        cuts.append((train, valid))
    return cuts


@dataclass(frozen=True)
class _Index:
    """The dense index of each code of fit: (number of codes,) int32."""

    users: np.ndarray
    items: np.ndarray

    def apply(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Codes to indices: user_index, item_index, Int32."""
        users, items = look_up(self.users, rows["user_id"]), look_up(self.items, rows["item_id"])
        return pl.DataFrame({"user_index": users, "item_index": items})


def _id_map(kind: str, ids: pl.Series, there: np.ndarray) -> pl.DataFrame:
    kept = ids.filter(pl.Series(there))
    return pl.DataFrame({f"{kind}_id": kept, f"{kind}_index": np.arange(len(kept), dtype=np.int32)})


def _with_titles(items: pl.DataFrame, titles: pl.DataFrame | None) -> pl.DataFrame:
    """The map of items with a column of titles, where the ids are the numbers that titles are known by."""
    if titles is None or not items["item_id"].dtype.is_integer():
        return items
    titles = titles.cast({"item_id": items["item_id"].dtype}, strict=False).drop_nulls()
    return items.join(titles, on="item_id", how="left", maintain_order="left")


def _filters(config: DataConfig) -> Iterator[tuple[str, pl.Expr]]:
    """The filters that are on, by the name of their step, in their order."""
    if config.min_rating is not None:
        yield f"min_rating >= {config.min_rating:g}", filters.rated_at_least(config.min_rating)
    if config.min_user_interactions > 1:
        step = f"min_user_interactions >= {config.min_user_interactions}"
        yield step, filters.occurs_at_least("user_id", config.min_user_interactions)
    if config.min_item_interactions > 1:
        step = f"min_item_interactions >= {config.min_item_interactions}"
        yield step, filters.occurs_at_least("item_id", config.min_item_interactions)


def _beside(name: str, rows: pl.DataFrame | None, config: DataConfig, steps: Steps) -> pl.DataFrame | None:
    """A validation or test file's rows that are rated enough to be interactions at all."""
    if rows is None:
        return None
    part = steps.add(f"{name}: read", rows)
    if config.min_rating is not None:
        condition = filters.rated_at_least(config.min_rating)
        part = steps.keep(f"{name}: min_rating >= {config.min_rating:g}", condition, part)
    return part.rows


def _before_cut(rows: pl.DataFrame, config: DataConfig, fraction: float, key: tuple[int, int]) -> pl.Series:
    """(n,) Boolean: the rows that stay before the cut of the configured kind."""
    if config.split == "time":
        before = splits.before_time_cut(fraction)
    elif config.split == "random":
        before = splits.before_random_cut(fraction, key)
    else:
        before = splits.before_last()
    return rows.select(before.alias("before")).to_series()


def _append_warm(
    rows: pl.DataFrame, valid: pl.DataFrame, steps: Steps
) -> tuple[pl.DataFrame, pl.DataFrame, pl.Series]:
    """The source with the warm rows of a validation file behind it, the file's rows, and who is in train."""
    warm = valid.filter(steps.part(rows).warm())
    in_train = pl.Series(np.arange(len(rows) + len(warm)) < len(rows))
    # After the cuts nothing but the ids is needed, and other columns may be of other types.
    ids = ["user_id", "item_id"]
    return pl.concat([rows.select(ids), warm.select(ids)]), valid, in_train


def _to_evaluate(
    name: str, rows: pl.DataFrame, training: Part, min_rating: float | None, steps: Steps
) -> pl.DataFrame:
    """The unique pairs of a part that a model of `training` can be asked for, and that are rated enough."""
    part = steps.add(f"{name}: all", rows)
    part = steps.keep(f"{name}: cold rows dropped", training.warm(), part)
    if min_rating is not None:
        part = steps.keep(
            f"{name}: test_min_rating >= {min_rating:g}", filters.rated_at_least(min_rating), part
        )
    pairs = part.rows.select("user_id", "item_id").unique(maintain_order=True)
    return steps.add(f"{name}: repeated pairs dropped", pairs, dropped_from=part).rows


def _pairs_in_common(test: pl.DataFrame, fit: pl.DataFrame, num_users: int) -> int:
    """Number of rows of `test`, which are unique pairs, that `fit` has too."""
    tested = present(test["user_index"], num_users)
    theirs = fit.filter(look_up(tested, fit["user_index"]))
    # The hash table is made of the right side, which is the short one.
    return len(theirs.join(test, on=["user_index", "item_index"], how="semi").unique())
