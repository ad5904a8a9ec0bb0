"""The settings of a peer, chosen on validation parts as fasttower chooses its own.

The search begins with a coarse grid and goes uphill from its best point: one value after another is
multiplied by 4, or divided by it, for as long as the mean NDCG of all validation users gains, then by 2. So
it does not stop at the edge of a grid. A peer that is trained by iterations is scored after them, and its
best iteration is part of the choice.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from scipy.sparse import csr_matrix

from benchmarks.peers import Peer, Ranker
from fasttower.data.preparation import PreparedData
from fasttower.evaluation.ranking import means, metrics_per_user
from fasttower_kernels.known_positives import KnownPositives

MOST_USERS = 4_096
"""Validation users who are scored; of more, every n-th, as fasttower does."""


@dataclass(frozen=True)
class Holdout:
    """Rows to train on and the pairs held out from them.

    Attributes:
        matrix: (U, I), float32, 1 for each pair to train on.
        seen: the same pairs.
        users: (R,), int64: who has held-out pairs.
        truth: their items; row r belongs to ``users[r]``.
        k: the cutoff of the metrics.
    """

    matrix: csr_matrix
    seen: KnownPositives
    users: torch.Tensor
    truth: KnownPositives
    k: int

    @staticmethod
    def of(
        train: pl.DataFrame, held_out: pl.DataFrame, data: PreparedData, k: int, most_users: int | None = None
    ) -> Holdout:
        """From two parts of prepared data."""
        num_users, num_items = data.users.height, data.items.height
        seen = KnownPositives.from_pairs(*_tensors(train), num_users, num_items)
        users, items = _tensors(held_out)
        asked, row = torch.unique(users.long(), return_inverse=True)
        every = 1 if most_users is None else -(-len(asked) // most_users)
        kept = row % every == 0
        asked = asked[::every]
        truth = KnownPositives.from_pairs(row[kept] // every, items[kept], len(asked), num_items)
        ones = np.ones(len(seen.items), np.float32)
        matrix = csr_matrix((ones, seen.items.numpy(), seen.indptr.numpy()), shape=(num_users, num_items))
        return Holdout(matrix, seen, asked, truth, k)

    def metrics(self, ranker: Ranker) -> tuple[dict[str, float], torch.Tensor]:
        """The ranking metrics of a model, and the NDCG of each user."""
        found = ranker.top(self.users, min(self.k, self.matrix.shape[1]), self.seen)
        train_items = torch.zeros(self.matrix.shape[1], dtype=torch.bool)
        train_items[self.seen.items.long()] = True
        per_user, coverage = metrics_per_user(found, self.truth, train_items, self.k)
        return means(per_user, coverage, self.k), per_user["NDCG"]


def validation_cuts(data: PreparedData, k: int) -> list[Holdout]:
    """The validation cuts of prepared data."""
    return [Holdout.of(train, valid, data, k, MOST_USERS) for train, valid in data.cuts]


def test_holdout(data: PreparedData, k: int) -> Holdout:
    """All rows before the test cut, and the test pairs."""
    assert data.test is not None  # every protocol has a test part
    return Holdout.of(data.fit, data.test, data, k)


def _tensors(part: pl.DataFrame) -> tuple[torch.Tensor, torch.Tensor]:
    users, items = (torch.tensor(part[name].to_numpy()) for name in ("user_index", "item_index"))
    return users, items


@dataclass(frozen=True)
class Choice:
    """What a search has found.

    Attributes:
        settings: of the best mean NDCG; with the iterations of a peer that has some.
        ndcg: that mean, over the validation users of all cuts.
        tried: settings that were trained.
        cpu_s: of the whole search.
    """

    settings: dict[str, float]
    ndcg: float
    tried: int
    cpu_s: float


def choose(peer: Peer, cuts: Sequence[Holdout], seed: int = 0) -> Choice:
    """Search for the settings of a peer; see the module."""
    began = time.process_time()
    scores: dict[tuple[float, ...], tuple[float, int | None]] = {}

    def score(settings: Mapping[str, float]) -> float:
        key = tuple(settings.values())
        if key not in scores:
            scores[key] = _score(peer, settings, cuts, seed)
        return scores[key][0]

    grid = (dict(zip(peer.grid, values, strict=True)) for values in itertools.product(*peer.grid.values()))
    best = max(grid, key=score)
    for factor in (4, 2):
        moved = True
        while moved:
            moved = False
            for name, ratio in itertools.product(peer.grid, (factor, 1 / factor)):
                while (further := _changed(best, name, ratio, peer.most)) and score(further) > score(best):
                    best, moved = further, True
    ndcg, iterations = scores[tuple(best.values())]
    if iterations is not None:
        best["iterations"] = iterations
    return Choice(best, ndcg, len(scores), time.process_time() - began)


def _changed(
    settings: Mapping[str, float], name: str, ratio: float, most: Mapping[str, float]
) -> dict[str, float] | None:
    """The settings with one value multiplied; None beyond its largest, or for a whole number below 1."""
    value = settings[name]
    changed = type(value)(value * ratio)
    return {**settings, name: changed} if 0 < changed <= most.get(name, math.inf) else None


def _score(
    peer: Peer, settings: Mapping[str, float], cuts: Sequence[Holdout], seed: int
) -> tuple[float, int | None]:
    """The mean NDCG over the users of all cuts, and after which iteration, from 1, it is largest."""
    if peer.most_iterations is None:
        ndcg = torch.cat([cut.metrics(peer.fit(cut.matrix, **settings))[1] for cut in cuts])
        return float(ndcg.mean()), None
    curves = [curve(peer, settings, cut, seed) for cut in cuts]
    users = sum(len(cut.users) for cut in cuts)
    # Only iterations that were scored on all cuts are compared.
    means = {
        iteration: sum(len(cut.users) * one[iteration] for cut, one in zip(cuts, curves, strict=True)) / users
        for iteration in curves[0]
        if all(iteration in one for one in curves)
    }
    best = max(means, key=lambda iteration: means[iteration])
    return means[best], best


def curve(peer: Peer, settings: Mapping[str, float], cut: Holdout, seed: int) -> dict[int, float]:
    """The mean NDCG by the number of iterations, until many more have not made it better."""
    assert peer.most_iterations is not None
    patience = max(8, peer.most_iterations // 3)  # with a small learning rate the first ones show nothing
    ndcg: dict[int, float] = {}

    def after(iteration: int, ranker: Ranker) -> bool:
        if is_scored(iteration):
            ndcg[iteration] = float(cut.metrics(ranker)[1].mean())
        best = max(ndcg, key=lambda scored: ndcg[scored])
        return iteration >= 2 * best + patience

    peer.fit(cut.matrix, iterations=peer.most_iterations, seed=seed, after=after, **settings)
    return ndcg


def is_scored(iteration: int) -> bool:
    """Whether a model is scored after this iteration: eight times, then four times per doubling."""
    return iteration <= 8 or iteration % (1 << (iteration - 1).bit_length() - 3) == 0


def fit_and_test(peer: Peer, settings: Mapping[str, Any], holdout: Holdout, seed: int) -> dict[str, Any]:
    """Train on all rows before the test cut: the test metrics, and the CPU time with the ranking."""
    began = time.process_time()
    seeded = {} if peer.most_iterations is None else {"seed": seed}
    metrics, _ = holdout.metrics(peer.fit(holdout.matrix, **settings, **seeded))
    return {"cpu_s": time.process_time() - began, "test": metrics}
