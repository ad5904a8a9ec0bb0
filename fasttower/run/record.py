"""What a run is: a model with its ids, and how it came about."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NotRequired, TypedDict

import polars as pl
import torch

from fasttower.config import ResolvedConfig
from fasttower.model import TwoTower
from fasttower.retrieval import Retriever
from fasttower.training.observer import EpochRecord
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives


class Update(TypedDict):
    """What an update of a run brought."""

    rows: int
    new_users: int
    new_items: int
    epochs: int


class TrialRow(TypedDict):
    """Settings that a search tried, and what the validation part said of them."""

    settings: str
    epochs: int
    """That it was trained for."""
    best_epoch: int | None
    """None where the training diverged."""
    score: float | None
    """NDCG at the cutoff after the best epoch."""
    coverage: float | None
    """Then."""
    seconds: float


class Outcome(TypedDict):
    """How a training ended, as ``metrics.json`` has it.

    An update, which has no test part, leaves `test` and `popularity` empty.
    """

    test: dict[str, float]
    """Metrics of the test part, such as "NDCG@10"; the mean over the seeds where there are several."""
    popularity: dict[str, float]
    """The same of recommending the most popular items."""
    test_users: int
    """Users that these are means over."""
    settings: str
    """The settings that were chosen, in words; ``config.json`` has them as fields."""
    best_epoch: int
    """The number of epochs that was chosen."""
    interrupted: bool
    """Whether a stop signal ended the training early."""
    timing_s: dict[str, float]
    """Seconds by stage, and "total"."""
    device: str
    """Where the training ran."""
    backend: str
    """The implementation of the training step that ran."""
    test_pairs_in_fit: NotRequired[int]
    """Test pairs that the model was fitted to as well: where seen items are left out, each is a miss."""
    search: NotRequired[list[TrialRow]]
    """What was tried, of the first seed, in the order in which it was begun."""
    positives_per_s: NotRequired[float | None]
    """Median over the epochs of the last phase; None without any."""
    threads: NotRequired[int]
    """CPU threads."""
    versions: NotRequired[dict[str, str]]
    """Of what the figures depend on."""
    test_std: NotRequired[dict[str, float | None]]
    """With several seeds, the standard deviation of each metric; None for one that was interrupted."""
    test_seeds: NotRequired[list[dict[str, float]]]
    """With several seeds, the metrics of each."""
    updates: NotRequired[list[Update]]
    """What each update since the training brought, the oldest first."""


@dataclass(frozen=True, repr=False)
class Record:
    """What a run is made of, and what its directory holds.

    Its parts, and the tables, frames and tensors in them, must not change after the first question to the
    run: what was checked and looked up for it is kept.

    Attributes:
        model: the trained model.
        users: user_id (as it came), user_index (Int32); sorted by id.
        items: item_id, item_index and, if known, title; likewise.
        config: as asked for, with what was left open filled in.
        device: where the training ran.
        backend: the implementation of the training step that ran.
        history: the record of every epoch.
        recommendations: user_id, item_id, score, rank (from 1) for every user of the run.
        metrics: the contents of ``metrics.json``.
        known_positives: the unique pairs that the model was fitted to; what "seen" means.
    """

    model: TwoTower
    users: pl.DataFrame
    items: pl.DataFrame
    config: ResolvedConfig
    device: str
    backend: str
    history: list[EpochRecord]
    recommendations: pl.DataFrame
    metrics: Outcome
    known_positives: KnownPositives

    @cached_property
    def negatives(self) -> Negatives:
        """The negatives that the model was trained with, as far as the unique pairs tell."""
        known = self.known_positives
        return Negatives(
            self.config.negative_settings,
            known.num_users,
            known.num_items,
            known if self.config.exclude_known_positives else None,
            torch.bincount(known.items, minlength=known.num_items),
            len(known.items),
        )

    @cached_property
    def retriever(self) -> Retriever:
        """Answers questions about the model."""
        return Retriever(self.model, self.users, self.items, self.known_positives)
