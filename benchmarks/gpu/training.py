"""Training end to end, on a GPU with Triton and on the CPU with numba, from the same synthetic ratings.

    python -m benchmarks.gpu.training FOLDER

Ratings are split by time: the last fifth is the test part, the last tenth of the rest the validation part.
Rows go to FOLDER/training.json: each way's losses, NDCG@10 and seconds, and how far ways differ from each
other. Both see the same batches and negatives, so that losses and NDCG must agree to rounding, and runs in
deterministic mode must repeat bit for bit; where they do not, the row has an error.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.results import Results
from fasttower.config import TrainingConfig
from fasttower.data.synthetic import generate
from fasttower.evaluation.ranking import ranking_metrics
from fasttower.training.data import Cut, TrainingData
from fasttower.training.trainer import TrainedModel, Trainer
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.tables import Interactions
from fasttower_kernels.topk import top_k

K = 10
CONFIG = TrainingConfig(embedding_dim=64, l2=0.06, epochs=6, batch_size=8_192, k=K)
LOSS_BOUND = 1e-3  # relative, of the training loss
NDCG_BOUND = 0.01


@dataclass(frozen=True)
class Split:
    """The parts of a data set on the CPU; rows of users or items without a row in fit are dropped."""

    parts: TrainingData
    test_users: Tensor
    truth: KnownPositives

    @staticmethod
    def of(name: str) -> Split:
        """Generate a data set and split it by time."""
        data = generate(name, seed=0)
        order = np.argsort(data.timestamp, kind="stable")
        users, items = (torch.from_numpy(ids[order] - 1).int() for ids in (data.user_id, data.item_id))
        num_users, num_items = int(users.max()) + 1, int(items.max()) + 1
        cut, end = int(len(order) * 0.72), int(len(order) * 0.8)
        fit = Interactions(users[:end], items[:end])
        train = Interactions(users[:cut], items[:cut])
        later = Interactions(users[cut:end], items[cut:end])
        seen = KnownPositives.from_pairs(fit.user_index, fit.item_index, num_users, num_items)
        test = _warm(Interactions(users[end:], items[end:]), fit, num_users, num_items)
        test_users, rows = test.user_index.unique(return_inverse=True)
        return Split(
            TrainingData(
                fit,
                seen,
                (Cut(train, _warm(later, train, num_users, num_items)),),
            ),
            test_users.long(),
            KnownPositives.from_pairs(rows, test.item_index, len(test_users), num_items),
        )

    def ndcg(self, trained: TrainedModel) -> float:
        """NDCG@10 of the test users."""
        model, seen = trained.model, self.parts.known_positives
        device = model.item_tower.vectors.device
        users, seen, truth = self.test_users.to(device), seen.to(device), self.truth.to(device)
        with torch.no_grad():
            best = top_k(
                model.infer_users(users),
                model.infer_items(),
                k=K,
                item_bias=model.item_bias,
                seen=seen,
                seen_users=users,
            )
        known_items = torch.zeros(seen.num_items, dtype=torch.bool, device=device)
        known_items[seen.items.long()] = True
        return ranking_metrics(best.items, truth, known_items, K)[f"NDCG@{K}"]


def _warm(rows: Interactions, known: Interactions, num_users: int, num_items: int) -> Interactions:
    warm = torch.ones(len(rows), dtype=torch.bool)
    for index, of, size in (
        (rows.user_index, known.user_index, num_users),
        (rows.item_index, known.item_index, num_items),
    ):
        warm &= (torch.bincount(of, minlength=size) > 0)[index.long()]
    return Interactions(rows.user_index[warm], rows.item_index[warm])


def differences(one: TrainedModel, other: TrainedModel) -> dict[str, float]:
    """The largest absolute difference of each table, and the relative one of all of them."""
    pairs = [
        (a.detach().cpu().double(), b.detach().cpu().double())
        for a, b in zip(one.model.tables, other.model.tables, strict=True)
    ]
    distance = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
    largest = {
        f"largest difference of {name}": float((a - b).abs().max())
        for name, (a, b) in zip(("users", "items", "item_bias"), pairs, strict=False)
    }
    return largest | {"relative difference": distance / sum(float(b.square().sum()) for _, b in pairs) ** 0.5}


class Comparison:
    """Trains in several ways, and adds a row for each."""

    def __init__(self, results: Results, split: Split, config: TrainingConfig) -> None:
        self._results = results
        self._split = split
        self._config = config

    def train(self, way: str, device: str, *, validated: bool = False, **changes: object) -> TrainedModel:
        """Train with a changed configuration; without a validation part, the last epoch counts."""
        parts = self._split.parts.to(torch.device(device))
        parts = parts if validated else replace(parts, cuts=())
        began = time.perf_counter()
        config = replace(self._config, **changes)
        trained = Trainer(parts, config).train()
        seconds = time.perf_counter() - began
        self._results.add(
            way=way,
            validated=validated,
            seconds=seconds,
            epoch_s=min(record.epoch_s for record in trained.history),
            best_epoch=trained.best_epoch,
            train_loss=[record.train_loss for record in trained.history],
            valid_loss=[record.valid_loss for record in trained.history if record.valid_loss is not None],
            valid_ndcg=[record.valid[f"NDCG@{K}"] for record in trained.history if record.valid],
            test_ndcg=self._split.ndcg(trained),
        )
        return trained

    def compare(
        self, ways: str, one: TrainedModel, other: TrainedModel, *, bit_for_bit: bool = False
    ) -> None:
        """Add how far two models and their losses are from each other."""
        row: dict[str, object] = {"compared": ways, **differences(one, other)}
        losses = [[record.train_loss for record in trained.history] for trained in (one, other)]
        loss = max(abs(a - b) / b for a, b in zip(*losses, strict=True))
        ndcg = abs(self._split.ndcg(one) - self._split.ndcg(other))
        row |= {"relative difference of the loss": loss, "difference of NDCG": ndcg}
        equal = all(a.cpu().equal(b.cpu()) for a, b in zip(one.model.tables, other.model.tables, strict=True))
        if bit_for_bit and not (equal and losses[0] == losses[1]):
            row["error"] = "two deterministic runs differ"
        elif not (loss < LOSS_BOUND and ndcg < NDCG_BOUND):
            row["error"] = f"expected a loss within {LOSS_BOUND} and NDCG within {NDCG_BOUND}"
        self._results.add(**row)


def compare_backends(
    results: Results, split: Split, config: TrainingConfig, device: str = "cuda", backend: str = "triton"
) -> None:
    """Train with a backend of a device and with numba, and compare."""
    ways = Comparison(results, split, config)
    ours = ways.train(backend, device, backend=backend)
    deterministic = [
        ways.train(f"{backend} deterministic", device, backend=backend, deterministic=True) for _ in range(2)
    ]
    ways.compare(f"{backend} deterministic, twice", *deterministic, bit_for_bit=True)
    chosen = ways.train(backend, device, validated=True, backend=backend)
    numba = ways.train("numba", "cpu", backend="numba")
    ways.compare(f"{backend} and numba", ours, numba)
    ways.compare(f"{backend} deterministic and numba", deterministic[0], numba)
    chosen_by_numba = ways.train("numba", "cpu", validated=True, backend="numba")
    if chosen.best_epoch == chosen_by_numba.best_epoch:
        ways.compare(f"{backend} and numba, validated", chosen, chosen_by_numba)
    ways.train(f"{backend} bfloat16", device, backend=backend, table_dtype="bfloat16")
    for optimiser in ("adam", "lazy_adam"):
        ways.train(f"{backend} {optimiser}", device, backend=backend, optimiser=optimiser)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    results = Results(parser.parse_args().folder / "training.json")
    compare_backends(results, Split.of("synthetic-1m"), CONFIG)
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())
