"""What tuning varies, and between which values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from fasttower.config import Config, ResolvedConfig
from fasttower.errors import FastTowerError
from fasttower.training.families import IN_BATCH, OWN_NEGATIVES, STANDARD, THOROUGH, Family, among
from fasttower.training.search import MOST_EPOCHS, Candidate, Search

if TYPE_CHECKING:
    import optuna

VARIED = (
    "loss",
    "negatives",
    "similarity",
    "temperature",
    "l2",
    "bias_l2",
    "embedding_dim",
    "init_scale",
    "learning_rate",
    "batch_size",
    "block_size",
    "num_negatives",
    "negative_pool",
    "popularity_power",
    "calibration",
)
"""Fields of a configuration that are varied where they are left open."""

FAMILIES = (
    STANDARD,
    IN_BATCH,
    *THOROUGH,
    Family("softmax", "mixed", "dot"),
    Family("softmax", "uniform", "cosine"),
    Family("bce", "popularity", "dot"),
    Family("gbce", "uniform", "dot"),
    Family("bpr", "uniform", "dot"),
)
"""Losses with their negatives and their similarity."""

_NAMES = {", ".join(family): family for family in FAMILIES}

_LEAST_BATCH, _LARGEST_BATCH = 64, 1 << 17


class Space:
    """The settings among which a study looks.

    A field of `VARIED` is kept if it differs from the default configuration's, or is named in ``keep``.

    Args:
        config: what is kept, and what is not varied.
        keep: names of fields that stay at their default.
        num_rows: interactions before the test cut.
        num_items: items before the test cut.

    Attributes:
        kept: names of the fields of `VARIED` that are not varied.
        families: that what is kept leaves open.

    Raises:
        FastTowerError: nothing is left open.
    """

    def __init__(self, config: Config, keep: Collection[str], num_rows: int, num_items: int) -> None:
        default = Config()
        self.kept = tuple(
            name for name in VARIED if name in keep or getattr(config, name) != getattr(default, name)
        )
        self._config, self._sizes = config, (num_rows, num_items)
        tried = [
            family
            for family in FAMILIES
            # On a GPU only these repeat bit for bit.
            if not config.deterministic or (family.similarity == "dot" and family.negatives in OWN_NEGATIVES)
        ]
        standard = config.families[0]._asdict()
        kept_of_family = {name: value for name, value in standard.items() if name in self.kept}
        self.families = among(tried, config.given | kept_of_family)
        if not self.varied:
            raise FastTowerError(f"all settings are given; leave some of {', '.join(VARIED)} open to vary.")

    @property
    def varied(self) -> list[str]:
        """Names of the fields that trials differ in."""
        return [
            name
            for name in VARIED
            if (
                len({getattr(family, name) for family in self.families}) > 1
                if name in Family._fields
                else any(self._is_varied(name, family) for family in self.families)
            )
        ]

    def _is_varied(self, name: str, family: Family) -> bool:
        """Whether a field is open and has an effect with a family."""
        without_effect = {
            "temperature": family.similarity != "cosine",
            "l2": family.similarity != "dot",
            # On a GPU, runs with it do not repeat bit for bit.
            "bias_l2": not self._config.item_bias or self._config.deterministic,
            "block_size": family.negatives in OWN_NEGATIVES,
            "num_negatives": family.negatives == "in-batch",
            "negative_pool": family.negatives not in OWN_NEGATIVES,
            "popularity_power": family.negatives != "popularity",
            "calibration": family.loss != "gbce",
        }
        return name not in self.kept and not without_effect.get(name, False)

    def settings(self, trial: optuna.Trial) -> ResolvedConfig:
        """What a trial trains with, and the epochs after which it ends at the latest.

        Each open field is asked for where the others let it have an effect.
        """
        fields: dict[str, Any] = {}
        family = self.families[0]
        if len(self.families) > 1:
            family = _NAMES[trial.suggest_categorical("family", [", ".join(one) for one in self.families])]
        fields |= family._asdict() | self._negatives(trial, family)
        if self._is_varied("temperature", family):
            fields["temperature"] = _rounded(trial.suggest_float("temperature", 0.05, 1.0, log=True))
        if self._is_varied("l2", family):
            fields["l2"] = _rounded(trial.suggest_float("l2", 0.005, 0.5, log=True))
        if self._is_varied("bias_l2", family):
            fields["bias_l2"] = trial.suggest_categorical("bias_l2", [0.0, 0.003, 0.03])
        if self._is_varied("embedding_dim", family):
            fields["embedding_dim"] = 8 * trial.suggest_int("embedding_dim / 8", 2, 32, log=True)
        if self._is_varied("learning_rate", family):
            fields["learning_rate"] = _rounded(trial.suggest_float("learning_rate", 0.002, 0.05, log=True))
        if self._is_varied("calibration", family):
            fields["calibration"] = _rounded(trial.suggest_float("calibration", 0.0, 1.0))

        standard = dataclasses.replace(self._config, **fields).resolved(*self._sizes)
        if self._is_varied("batch_size", family):
            batch = standard.batch_size * 2.0 ** trial.suggest_int("log2(batch_size / standard)", -2, 2)
            fields["batch_size"] = int(min(max(batch, _LEAST_BATCH), _LARGEST_BATCH))
        if self._is_varied("init_scale", family):
            factor = trial.suggest_float("init_scale * sqrt(embedding_dim)", 0.03, 1.0, log=True)
            fields["init_scale"] = _rounded(factor / math.sqrt(standard.embedding_dim))
        fields["epochs"] = self._config.epochs or MOST_EPOCHS
        return dataclasses.replace(self._config, **fields).resolved(*self._sizes)

    def _negatives(self, trial: optuna.Trial, family: Family) -> dict[str, Any]:
        """How many negatives there are, and how they are drawn."""
        fields: dict[str, Any] = {}
        count, pool = self._config.num_negatives, self._config.negative_pool
        if self._is_varied("block_size", family):
            fields["block_size"] = 1 << trial.suggest_int("log2(block_size)", 6, 10)
        if self._is_varied("num_negatives", family):
            if family.negatives in OWN_NEGATIVES:
                count = trial.suggest_int("num_negatives", 2, 32, log=True)
                count = min(count, pool) if pool else count
            else:
                count = trial.suggest_int("num_negatives of a block", 16, 256, log=True)
            fields["num_negatives"] = count
        if self._is_varied("negative_pool", family):
            factor = trial.suggest_categorical("negative_pool / num_negatives", [0, 2, 8])
            fields["negative_pool"] = min(factor * count, 100_000)
        if self._is_varied("popularity_power", family):
            fields["popularity_power"] = _rounded(trial.suggest_float("popularity_power", 0.25, 1.0))
        return fields

    def standard(self) -> list[dict[str, Any]]:
        """The parameters of the candidates that a training's own search begins with."""
        search = Search.of(dataclasses.replace(self._config, search="quick"), self._sizes[1])
        found: list[dict[str, Any]] = []
        for candidate in search.start:
            parameters = self._parameters(candidate)
            for name in {"l2", "temperature"} & set(self.kept):
                del parameters[name]  # candidates that differ in it only are one
            if candidate.family in self.families and parameters not in found:
                found.append(parameters)
        return found

    def _parameters(self, candidate: Candidate) -> dict[str, Any]:
        return {
            "family": ", ".join(candidate.family),
            "temperature": candidate.temperature,
            "l2": candidate.l2,
            "bias_l2": 0.0,
            "embedding_dim / 8": candidate.embedding_dim // 8,
            "learning_rate": 0.01,
            "log2(block_size)": 8,
            "num_negatives": 10,
            "negative_pool / num_negatives": 0,
            "log2(batch_size / standard)": 0,
            "init_scale * sqrt(embedding_dim)": 0.1,
        }


def _rounded(value: float) -> float:
    """To three digits, as a person would write it."""
    return float(f"{value:.3g}")


def described(config: ResolvedConfig) -> str:
    """Settings as a person reads them."""
    parts = [
        str(Candidate.of(config)),
        f"learning rate {config.learning_rate:.3g}",
        f"batch {config.batch_size:,}",
    ]
    negatives = config.negative_settings
    if negatives.is_shared:
        parts.append(f"block {config.block_size}")
    if negatives.drawn:
        pool = f" of {config.negative_pool}" if config.negative_pool else ""
        parts.append(f"{config.num_negatives} negatives{pool}")
    if config.negatives == "popularity":
        parts.append(f"popularity power {config.popularity_power:.2g}")
    if config.loss == "gbce":
        parts.append(f"calibration {config.calibration:.2g}")
    parts.append(f"initial scale {config.init_scale:.2g}")
    if config.bias_l2:
        parts.append(f"bias L2 {config.bias_l2:g}")
    return ", ".join(parts)
