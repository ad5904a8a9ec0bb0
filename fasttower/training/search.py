"""The search for settings: which candidate to train next and how far, and which one to choose.

Candidates are trained for a few epochs, the better half of them for twice as many, and so on, each going on
from where it stopped (successive halving). What no longer gains is not trained further. Where the best
candidate of a family stands at the edge of the values tried, its untried neighbours are tried too.

All decisions are functions of the trials so far, so that a search that was stopped goes on as if it had not
been.

Source: Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization"
(AISTATS 2016), algorithm 1; Breiman et al., "Classification and Regression Trees" (1984), section 3.4.3, for
the rule of one standard error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fasttower.config import Preference, ResolvedTrainingConfig, TrainingConfig
from fasttower.errors import TrainingError
from fasttower.training.families import OWN_NEGATIVES, Family, families
from fasttower_kernels.settings import LossName, Proposal, Similarity

GRIDS = {
    "l2": (0.004, 0.0075, 0.015, 0.03, 0.06, 0.12, 0.24, 0.48),
    "temperature": (0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.8),
}
"""Values of a family's axis, in steps of 2 and of the square root of 2."""

QUICK = {"l2": (0.03, 0.06, 0.12), "temperature": (0.14, 0.4)}
THOROUGH = {"l2": (0.015, 0.03, 0.06, 0.12, 0.24), "temperature": (0.1, 0.14, 0.2, 0.28, 0.4)}
"""What a quick search begins with, and what a thorough one goes on with."""

FIRST_RUNG = 2
"""Epochs before any candidate is left, from the spectral start; half as many with negatives that a block
shares, of which a positive has hundreds."""

MOST_EPOCHS = 64
"""Of a candidate; half as many in a quick search."""

TOLERANCE: dict[Preference, float] = {"accuracy": 0.0, "balanced": 1.0, "coverage": 2.0}
"""Standard errors within which coverage decides."""


class Candidate(NamedTuple):
    """Settings to try, as fields of a configuration."""

    loss: LossName
    negatives: Proposal
    similarity: Similarity
    l2: float
    temperature: float
    embedding_dim: int

    @staticmethod
    def of(config: ResolvedTrainingConfig) -> Candidate:
        """The settings of a configuration that leaves none open."""
        return Candidate(*(getattr(config, name) for name in Candidate._fields))

    @property
    def family(self) -> Family:
        """What it is one of."""
        return Family(self.loss, self.negatives, self.similarity)

    @property
    def value(self) -> float:
        """On its family's axis."""
        return self.l2 if self.family.axis == "l2" else self.temperature

    def with_value(self, value: float) -> Candidate:
        """The same with another value on the axis."""
        return self._replace(l2=value) if self.family.axis == "l2" else self._replace(temperature=value)

    def __str__(self) -> str:
        """As a person reads it."""
        number = f"L2 {self.l2:g}" if self.family.axis == "l2" else f"temperature {self.temperature:g}"
        return f"{self.loss}, {self.negatives}, {self.similarity}, {number}, dim {self.embedding_dim}"


@dataclass(frozen=True)
class Scores:
    """What the validation part says of a candidate's model.

    Attributes:
        epoch: after which it was scored, from 1.
        users: (R,), int64, ascending.
        per_user: (R,), float64: the metric that decides, such as NDCG.
        coverage: share of the training items that were recommended.
    """

    epoch: int
    users: Tensor
    per_user: Tensor
    coverage: float

    @property
    def mean(self) -> float:
        """Over the users, the larger the better."""
        return float(self.per_user.mean())

    def behind(self, other: Scores) -> tuple[float, float]:
        """How far the mean is below another model's, and the standard error of that, paired by user."""
        difference = other.per_user - self.per_user
        count = len(difference)
        return float(difference.mean()), float(difference.std()) / math.sqrt(count) if count > 1 else math.inf


@dataclass(frozen=True)
class Trial:
    """A candidate and how it has done.

    Attributes:
        candidate: the settings.
        rungs: for each rung that it has been through the scores of its epochs.
        seconds: that it took.
        diverged: whether its loss or parameters ceased to be finite: it is not trained further, nor chosen.
    """

    candidate: Candidate
    rungs: list[list[Scores]]
    seconds: float = 0.0
    diverged: bool = False

    @property
    def epochs(self) -> int:
        """That it was trained for."""
        return self.rungs[-1][-1].epoch if self.rungs else 0

    def best(self, rung: int | None = None) -> Scores:
        """The best scores up to a rung, or of all; the first of equals."""
        rungs = self.rungs if rung is None else self.rungs[: rung + 1]
        return max((scores for one in rungs for scores in one), key=lambda scores: scores.mean)

    def gains(self, rung: int, errors: float) -> bool:
        """Whether going on to this rung has gained more than so many standard errors."""
        if rung == 0:
            return True
        gain, error = self.best(rung - 1).behind(max(self.rungs[rung], key=lambda scores: scores.mean))
        return gain > errors * error


@dataclass(frozen=True)
class Search:
    """A search among candidates.

    Attributes:
        start: the candidates to begin with.
        wider: what is tried when these are done.
        most_epochs: up to which a candidate is trained.
        opens: whether untried neighbours of the best values are tried.
        seconds: of training, compilation included, after which no candidate is trained further; None for no
            limit.
    """

    start: tuple[Candidate, ...]
    wider: tuple[Candidate, ...]
    most_epochs: int
    opens: bool = True
    seconds: float | None = None

    @staticmethod
    def of(config: TrainingConfig, num_items: int) -> Search:
        """The search of a configuration over so many items."""
        wider: list[Candidate] = []
        if config.search == "none":
            start = _candidates(config.families[:1], {}, config, num_items)
        else:
            start = _candidates(config.families, QUICK, config, num_items)
            if config.search != "quick":
                wider = _candidates(families(config.given, thorough=True), THOROUGH, config, num_items)
                if "embedding_dim" not in config.given:
                    wider += [one._replace(embedding_dim=min(2 * one.embedding_dim, 512)) for one in start]
        most = MOST_EPOCHS if wider else MOST_EPOCHS // 2
        seconds = None if isinstance(config.search, str) else float(config.search)
        return Search(
            tuple(start), tuple(wider), config.epochs or most, opens=config.search != "none", seconds=seconds
        )

    def epochs(self, candidate: Candidate, rung: int) -> int:
        """Up to which a candidate is trained in a rung before it is compared with others."""
        first = FIRST_RUNG if candidate.negatives in OWN_NEGATIVES else FIRST_RUNG // 2
        return min(first << rung, self.most_epochs)

    def next(self, trials: Sequence[Trial]) -> tuple[Candidate, int] | None:
        """The candidate to train and the rung to train it to, given all trials so far; None at the end."""
        sound = [trial for trial in trials if not trial.diverged]
        spent = sum(trial.seconds for trial in trials)
        if sound and self.seconds is not None and spent >= self.seconds:
            return None
        tried = {trial.candidate for trial in trials}
        for candidate in self.start:
            if candidate not in tried:
                return candidate, 0
        for rung in range(max((len(trial.rungs) for trial in sound), default=0)):
            reached = [trial for trial in sound if len(trial.rungs) > rung]
            reached.sort(key=lambda trial: -trial.best(rung).mean)  # stable: the first of equals stays so
            for candidate in self._neighbours(reached, rung, tried):
                return candidate, 0
            for trial in _promoted(reached, rung, 0.5 if len(trials) > 1 else 0.0):
                ended = self.epochs(trial.candidate, rung) == self.most_epochs
                if len(trial.rungs) == rung + 1 and not ended:
                    return trial.candidate, rung + 1
        return next(((candidate, 0) for candidate in self.wider if candidate not in tried), None)

    def _neighbours(self, ranked: Sequence[Trial], rung: int, tried: set[Candidate]) -> Iterator[Candidate]:
        """The untried neighbours of the best trial of each family that is not clearly behind."""
        if not self.opens:
            return
        seen: set[tuple[Family, int]] = set()
        for trial in ranked:
            candidate = trial.candidate
            kind = candidate.family, candidate.embedding_dim
            grid = GRIDS[candidate.family.axis]
            if kind in seen or candidate.value not in grid:
                continue
            seen.add(kind)
            behind, error = trial.best(rung).behind(ranked[0].best(rung))
            if behind > 2 * error:
                continue
            place = grid.index(candidate.value)
            for neighbour in grid[max(place - 1, 0) : place + 2]:
                outward = candidate.with_value(neighbour)
                if outward not in tried and len(self._values(candidate, tried)) > 1:
                    yield outward

    def _values(self, candidate: Candidate, tried: set[Candidate]) -> set[float]:
        """Tried of the same kind: a value that was given is the only one."""
        return {other.value for other in tried if other == candidate.with_value(other.value)}


def _candidates(
    tried: Sequence[Family], values: Mapping[str, Sequence[float]], config: TrainingConfig, num_items: int
) -> list[Candidate]:
    """Of each family one for each value of its axis, or for the one that is given; what is standard else."""
    found = []
    for family in tried:
        standard = Candidate.of(config.resolved(0, num_items, **family._asdict()))
        if family.axis in config.given or not values:
            found.append(standard)
        else:
            found += [standard.with_value(value) for value in values[family.axis]]
    return found


def _promoted(ranked: Sequence[Trial], rung: int, errors: float) -> list[Trial]:
    """Those that go on: the better half, at first the best of each family too, if they still gain."""
    kept = [trial for place, trial in enumerate(ranked) if 2 * place < len(ranked)]
    if rung == 0:
        present = {trial.candidate.family for trial in kept}
        for trial in ranked:
            if trial.candidate.family not in present:
                present.add(trial.candidate.family)
                kept.append(trial)
    return [trial for trial in kept if trial.gains(rung, errors)]


def is_scored(epoch: int, last: int) -> bool:
    """Whether a candidate is scored after this epoch: eight times, then four times per doubling."""
    return epoch == last or epoch <= 8 or epoch % (1 << (epoch - 1).bit_length() - 3) == 0


def merged(cuts: Sequence[Scores]) -> Scores:
    """The scores after one epoch on several cuts as one: of all their users, and the mean coverage.

    A user of several cuts counts once, by the mean: such scores are not independent of each other.
    """
    users, row, counts = torch.cat([scores.users for scores in cuts]).unique(
        return_inverse=True, return_counts=True
    )
    total = torch.zeros(len(users), dtype=torch.float64)
    total.index_add_(0, row, torch.cat([scores.per_user for scores in cuts]))
    coverage = sum(scores.coverage for scores in cuts) / len(cuts)
    return Scores(cuts[0].epoch, users, total / counts, coverage)


def chosen(trials: Sequence[Trial], prefer: Preference) -> tuple[Candidate, Scores]:
    """The candidate with the largest coverage within some standard errors of the best score; its best epoch.

    Epochs are not compared by coverage: a model that has hardly been trained covers much.

    Raises:
        TrainingError: all candidates diverged.
    """
    trials = [trial for trial in trials if not trial.diverged]
    if not trials:
        raise TrainingError("the training diverged with all settings tried; try a smaller --learning-rate.")
    best = max(trials, key=lambda trial: trial.best().mean)

    def is_close(trial: Trial) -> bool:
        behind, error = trial.best().behind(best.best())
        return math.isfinite(error) and behind <= TOLERANCE[prefer] * error

    close = [trial for trial in trials if trial is best or (TOLERANCE[prefer] and is_close(trial))]
    choice = max(close, key=lambda trial: trial.best().coverage)
    return choice.candidate, choice.best()
