"""fasttower beside implicit's BPR and ALS on the same rows: quality, and the time that it takes to get there.

    pip install -e '.[bench]'
    FASTTOWER_DATA=... python -m benchmarks.against_implicit              measures
    FASTTOWER_DATA=... python -m benchmarks.against_implicit --select     chooses implicit's settings anew

RePlay's ML-1M protocol (ratings >= 3, the last 20% of the time line is the test part), as fasttower prepares
it. Settings: fasttower searches for its own. implicit's are chosen on validation parts only: each point of
the grid is trained for the same three validation cuts, and the point and the epoch with the best mean
validation NDCG@10 count (all curves: `results/implicit-ml-1m.json`).

Quality: each way is trained on all rows before the test cut, and RePlay reports on the test part. fasttower
searches for its settings and epochs in every run, on that run's validation part.

Time to a level: a way trains on the rows before the validation cut, and its validation NDCG@10 is taken after
every epoch. The levels are the best validation NDCG@10 of each way's curve (the mean of the repeats). The
time to a level is what a repeat's training took until the end of the first epoch at or above it: wall time
without evaluation, imports and compilation; without implicit's grid search, but with all that fasttower's
search tries. Reported is the median of the repeats that arrive, with how many did.
Repeats have seeds of their own and are interleaved: one of each way, and again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import implicit
import numpy as np
import torch
from implicit.cpu.als import AlternatingLeastSquares
from implicit.cpu.bpr import BayesianPersonalizedRanking
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

from fasttower.config import PRESETS, Config
from fasttower.data.preparation import PreparedData, prepare
from fasttower.device import cpu_threads
from fasttower.evaluation.replay_report import replay_metrics
from fasttower.model import TwoTower
from fasttower.pipeline import to_training_data
from fasttower.retrieval import IdMap, recommendation_frame
from fasttower.training.data import TrainingData
from fasttower.training.trainer import Trainer
from fasttower.training.validation import Validation
from fasttower.versions import versions
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.tables import Interactions
from fasttower_kernels.topk import top_k

K = 10
RESULTS = Path(__file__).parent / "results" / "implicit-ml-1m.json"
PROTOCOL = dataclasses.replace(PRESETS["default"], data="ml-1m", min_rating=3, test_fraction=0.2, k=K)
VALID_FRACTIONS = (0.1, 0.2, 0.3)

MODELS = {"implicit BPR": BayesianPersonalizedRanking, "implicit ALS": AlternatingLeastSquares}
EPOCHS = {"implicit ALS": 10, "implicit BPR": 100}
GRID: dict[str, dict[str, Sequence[float]]] = {
    "implicit ALS": {
        "factors": (8, 16, 32),
        "regularization": (30.0, 100.0, 300.0),
        "alpha": (1.0, 4.0, 16.0),
    },
    "implicit BPR": {
        "factors": (2, 4, 8, 16, 64),
        "learning_rate": (0.001, 0.003, 0.01),
        "regularization": (0.003, 0.01, 0.03, 0.1, 0.3),
    },
}


class Factors(NamedTuple):
    """A model of implicit's as `top_k` takes it: BPR's bias is a column of the factors."""

    users: torch.Tensor
    items: torch.Tensor
    item_bias: None = None

    @staticmethod
    def of(model: Any) -> Factors:
        """Views of the model's arrays."""
        return Factors(torch.from_numpy(model.user_factors), torch.from_numpy(model.item_factors))

    def infer_users(self, user_index: torch.Tensor | None = None) -> torch.Tensor:
        """Of all users, or of some."""
        return self.users if user_index is None else self.users[user_index]

    def infer_items(self) -> torch.Tensor:
        """Of all items."""
        return self.items


class Curve(NamedTuple):
    """What a training went through: after each epoch the seconds of training so far, and the quality."""

    seconds: list[float]
    ndcg: list[float]

    def time_to(self, level: float) -> float | None:
        """Seconds until the first epoch at that level or above."""
        return next((s for s, ndcg in zip(*self, strict=True) if ndcg >= level), None)


def train_implicit(
    name: str,
    settings: dict[str, float],
    epochs: int,
    rows: Interactions,
    known: KnownPositives,
    *,
    seed: int,
    threads: int,
    validation: Validation | None = None,
) -> tuple[Factors, Curve]:
    """Train one of implicit's models; without a validation part the curve holds times alone."""
    pairs = rows.user_index.numpy(), rows.item_index.numpy()
    shape = known.num_users, known.num_items
    matrix = csr_matrix((np.ones(len(rows), dtype=np.float32), pairs), shape=shape)
    model = MODELS[name](**settings, iterations=epochs, num_threads=threads, random_state=seed)
    curve = Curve([], [])
    began = time.perf_counter()

    def after_epoch(*_: Any) -> None:
        nonlocal began
        curve.seconds.append(time.perf_counter() - began)
        if validation is not None:
            curve.ndcg.append(validation.metrics(Factors.of(model))[0][f"NDCG@{K}"])  # type: ignore[arg-type]
        began = time.perf_counter() - curve.seconds[-1]

    model.fit(matrix, show_progress=False, callback=after_epoch)
    return Factors.of(model), curve


def validation_of(data: TrainingData) -> Validation:
    known, (train, valid) = data.known_positives, data.cuts[0]
    seen = KnownPositives.from_pairs(train.user_index, train.item_index, known.num_users, known.num_items)
    return Validation.of(valid, seen, K)


def test_metrics(model: TwoTower | Factors, data: TrainingData, prepared: PreparedData) -> dict[str, float]:
    """RePlay's report on the test part."""
    users = torch.tensor(prepared.test["user_index"].unique().sort().to_numpy()).long()
    with torch.no_grad():
        topk = top_k(
            model.infer_users(users),
            model.infer_items(),
            k=K,
            item_bias=model.item_bias,
            seen=data.known_positives,
            seen_users=users,
        )
    user_ids = prepared.users["user_id"].gather(users.numpy())
    frame = recommendation_frame(user_ids, topk, IdMap(prepared.items))
    return replay_metrics(frame, prepared.original_ids(prepared.test), prepared.items, K)


def select(threads: int) -> None:
    """Train the grids on the validation cuts and keep all curves."""
    cuts = {}
    for fraction in VALID_FRACTIONS:
        config = dataclasses.replace(PROTOCOL, valid_fraction=fraction)
        data = to_training_data(prepare(config.data, config))
        cuts[fraction] = data, validation_of(data)
    result: dict[str, Any] = {"epochs": EPOCHS, "threads": threads, "versions": all_versions(), "models": {}}
    for name, grid in GRID.items():
        points = []
        for values in itertools.product(*grid.values()):
            settings = dict(zip(grid, values, strict=True))
            curves = {}
            began = time.perf_counter()
            for fraction, (data, validation) in cuts.items():
                _, curve = train_implicit(
                    name,
                    settings,
                    EPOCHS[name],
                    data.cuts[0].train,
                    data.known_positives,
                    seed=0,
                    threads=threads,
                    validation=validation,
                )
                curves[fraction] = [round(ndcg, 5) for ndcg in curve.ndcg]
            mean = [statistics.fmean(ndcg) for ndcg in zip(*curves.values(), strict=True)]
            points.append(
                {**settings, "best": max(mean), "epochs": mean.index(max(mean)) + 1, "curves": curves}
            )
            line = "  ".join(f"{key} {value:<5g}" for key, value in settings.items())
            print(
                f"{name}  {line}  best {max(mean):.4f} after {points[-1]['epochs']:3d} epochs  "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )
        winner = max(points, key=lambda point: point["best"])
        chosen = {key: winner[key] for key in grid}
        result["models"][name] = {"settings": chosen, "epochs": winner["epochs"], "points": points}
        print(f"{name}: {chosen}, {winner['epochs']} epochs")
    RESULTS.write_text(json.dumps(result) + "\n")


def all_versions() -> dict[str, str]:
    return versions() | {"implicit": implicit.__version__}


class Repeat(NamedTuple):
    """One training of a way: its curve, the seconds that each phase took, and RePlay's report."""

    curve: Curve
    fit_s: float
    run_s: float
    metrics: dict[str, float]


def repeat_fasttower(config: Config, data: TrainingData, prepared: PreparedData) -> Repeat:
    trained = Trainer(data, config).train()
    searched = [record for record in trained.history if record.phase == "search"]
    seconds = list(itertools.accumulate(record.epoch_s for record in searched))
    scored = [at for at, record in enumerate(searched) if record.valid and record.cut == 0]
    curve = Curve([seconds[at] for at in scored], [searched[at].valid[f"NDCG@{K}"] for at in scored])
    fit_s = sum(record.epoch_s for record in trained.history if record.phase == "refit")
    return Repeat(curve, fit_s, fit_s + seconds[-1], test_metrics(trained.model, data, prepared))


def repeat_implicit(
    name: str, chosen: dict[str, Any], data: TrainingData, prepared: PreparedData, seed: int, threads: int
) -> Repeat:
    known = data.known_positives
    options = {"seed": seed, "threads": threads}
    settings, epochs = chosen["settings"], chosen["epochs"]
    validation = validation_of(data)
    _, curve = train_implicit(
        name, settings, EPOCHS[name], data.cuts[0].train, known, validation=validation, **options
    )
    model, times = train_implicit(name, settings, epochs, data.fit, known, **options)
    fit_s = times.seconds[-1]
    return Repeat(curve, fit_s, fit_s, test_metrics(model, data, prepared))


def measure(repeats: int, threads: int) -> None:
    prepared = prepare(PROTOCOL.data, PROTOCOL)
    data = to_training_data(prepared)
    models = json.loads(RESULTS.read_text())["models"]
    print(
        f"{len(data.cuts[0].train):,} training rows, {len(data.cuts[0].valid):,} validation pairs, "
        f"{len(data.fit):,} rows before the test cut; {threads} threads; "
        + ", ".join(f"{name} {version}" for name, version in all_versions().items())
    )
    for name, chosen in models.items():
        print(f"{name}: {chosen['settings']}, {chosen['epochs']} epochs")
    once = dataclasses.replace(PROTOCOL, epochs=1, refit=False)
    Trainer(data, once).train()  # compiles
    ways: dict[str, list[Repeat]] = {"fasttower": []} | {name: [] for name in models}
    for seed in range(repeats):
        ways["fasttower"].append(repeat_fasttower(dataclasses.replace(PROTOCOL, seed=seed), data, prepared))
        for name, chosen in models.items():
            ways[name].append(repeat_implicit(name, chosen, data, prepared, seed, threads))
        print(f"repeat {seed + 1} of {repeats} done", flush=True)

    print(f"\nTest part, RePlay's metrics, mean of {repeats}; seconds of training, the median")
    names = [f"NDCG@{K}", f"HitRate@{K}", f"Recall@{K}", f"Coverage@{K}"]
    print(f"{'':14s}" + "".join(f"{name:>13s}" for name in names) + "  NDCG std   on all rows   whole run")
    for way, runs in ways.items():
        columns = [[run.metrics[name] for run in runs] for name in names]
        deviation = statistics.stdev(columns[0]) if repeats > 1 else float("nan")
        print(
            f"{way:14s}"
            + "".join(f"{statistics.fmean(column):13.4f}" for column in columns)
            + f"{deviation:10.4f}"
            + f"{statistics.median(run.fit_s for run in runs):12.2f} s"
            + f"{statistics.median(run.run_s for run in runs):10.2f} s"
        )
    print("Whole run: fasttower's choice of L2 and epochs included; implicit's search is not.")

    print("\nSeconds of training to a validation NDCG@10, the median of the repeats that reach it")
    print(f"{'level':34s}" + "".join(f"{way:>20s}" for way in ways))
    for leader, led in ways.items():
        level = max(statistics.fmean(ndcg) for ndcg in zip(*(run.curve.ndcg for run in led), strict=True))
        line = f"{f'{leader} best, {level:.4f}':34s}"
        for runs in ways.values():
            times = [s for run in runs if (s := run.curve.time_to(level)) is not None]
            when = f"{statistics.median(times):.2f} s" if times else "never"
            line += f"{f'{when} ({len(times)}/{repeats})':>20s}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--select", action="store_true", help="choose implicit's settings, and do no more")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    # implicit has threads of its own, and wants BLAS to have none.
    with cpu_threads(arguments.threads) as threads, threadpool_limits(1, "blas"):
        if arguments.select:
            select(threads)
        else:
            measure(arguments.repeats, threads)


if __name__ == "__main__":
    main()
