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
        if len(self.kept) == len(VARIED):
            raise FastTowerError(f"all settings are given; leave some of {', '.join(VARIED)} open to vary.")
        self._config, self._sizes = config, (num_rows, num_items)
        tried = [
            family
            for family in FAMILIES
            # On a GPU only these repeat bit for bit.
            if not config.deterministic or (family.similarity == "dot" and family.negatives in OWN_NEGATIVES)
        ]
        self.families = among(tried, config.given)

    def settings(self, trial: optuna.Trial) -> ResolvedConfig:
        """What a trial trains with, and the epochs after which it ends at the latest.

        Each open field is asked for where the others let it have an effect.
        """
        fields: dict[str, Any] = {}
        family = self.families[0]
        if len(self.families) > 1:
            family = _NAMES[trial.suggest_categorical("family", [", ".join(one) for one in self.families])]
        fields |= family._asdict() | self._negatives(trial, family)
        if self._is_open("temperature") and family.similarity == "cosine":
            fields["temperature"] = _rounded(trial.suggest_float("temperature", 0.05, 1.0, log=True))
        if self._is_open("l2") and family.similarity == "dot":
            fields["l2"] = _rounded(trial.suggest_float("l2", 0.005, 0.5, log=True))
        if self._is_open("bias_l2") and self._config.item_bias and not self._config.deterministic:
            fields["bias_l2"] = trial.suggest_categorical("bias_l2", [0.0, 0.003, 0.03])
        if self._is_open("embedding_dim"):
            fields["embedding_dim"] = 8 * trial.suggest_int("embedding_dim / 8", 2, 32, log=True)
        if self._is_open("learning_rate"):
            fields["learning_rate"] = _rounded(trial.suggest_float("learning_rate", 0.002, 0.05, log=True))
        if self._is_open("calibration") and family.loss == "gbce":
            fields["calibration"] = _rounded(trial.suggest_float("calibration", 0.0, 1.0))

        standard = dataclasses.replace(self._config, **fields).resolved(*self._sizes)
        if self._is_open("batch_size"):
            batch = standard.batch_size * 2.0 ** trial.suggest_int("log2(batch_size / standard)", -2, 2)
            fields["batch_size"] = int(min(max(batch, _LEAST_BATCH), _LARGEST_BATCH))
        if self._is_open("init_scale"):
            factor = trial.suggest_float("init_scale * sqrt(embedding_dim)", 0.03, 1.0, log=True)
            fields["init_scale"] = _rounded(factor / math.sqrt(standard.embedding_dim))
        fields["epochs"] = self._config.epochs or MOST_EPOCHS
        return dataclasses.replace(self._config, **fields).resolved(*self._sizes)

    def _negatives(self, trial: optuna.Trial, family: Family) -> dict[str, Any]:
        """How many negatives there are, and how they are drawn."""
        fields: dict[str, Any] = {}
        count, pool = self._config.num_negatives, self._config.negative_pool
        if family.negatives not in OWN_NEGATIVES:
            if self._is_open("block_size"):
                fields["block_size"] = 1 << trial.suggest_int("log2(block_size)", 6, 10)
            if self._is_open("num_negatives") and family.negatives != "in-batch":
                fields["num_negatives"] = trial.suggest_int("num_negatives of a block", 16, 256, log=True)
            return fields
        if self._is_open("num_negatives"):
            count = trial.suggest_int("num_negatives", 2, 32, log=True)
            fields["num_negatives"] = count = min(count, pool) if pool else count
        if self._is_open("negative_pool"):
            factor = trial.suggest_categorical("negative_pool / num_negatives", [0, 2, 8])
            fields["negative_pool"] = min(factor * count, 100_000)
        if self._is_open("popularity_power") and family.negatives == "popularity":
            fields["popularity_power"] = _rounded(trial.suggest_float("popularity_power", 0.25, 1.0))
        return fields

    def standard(self) -> list[dict[str, Any]]:
        """The parameters of the candidates that a training's own search begins with."""
        search = Search.of(dataclasses.replace(self._config, search="quick"), self._sizes[1])
        return [self._parameters(candidate) for candidate in search.start]

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

    def _is_open(self, name: str) -> bool:
        return name not in self.kept


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
