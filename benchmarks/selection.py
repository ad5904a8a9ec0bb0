"""How the default preset's numbers were chosen: a grid on the validation part of RePlay's ML-1M protocol.

    FASTTOWER_DATA=... python -m benchmarks.selection --output benchmarks/results/selection-ml-1m.json

Every point of the grid is trained on the training part for several seeds; the curve of the validation
NDCG@10 is averaged over them, and the point's value is the curve's maximum. The test part is never read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch

from fasttower.config import Config
from fasttower.data.preparation import prepare
from fasttower.fit import to_training_data
from fasttower.run import versions
from fasttower.training.selection import train_model
from fasttower.training.trainer import EpochRecord

GRID = {
    "embedding_dim": [16, 32, 64],
    "l2": [0.01, 0.02, 0.03, 0.045, 0.06],
    "learning_rate": [0.002, 0.005, 0.01],
}


def curve(data, config: Config, seeds: int) -> dict[str, list[float]]:
    """The validation curves of a point, averaged over seeds; the best epoch by seed beside them."""
    histories: list[list[EpochRecord]] = []
    for seed in range(seeds):
        seeded = Config(**{**vars(config), "seed": seed})
        histories.append(train_model(data, seeded, k=10, refit=False).history)
    names = ("NDCG@10", "HitRate@10")
    averaged = {
        name: [statistics.fmean(h[e].valid[name] for h in histories) for e in range(config.epochs)]
        for name in names
    }
    averaged["best_epochs"] = [max(h, key=lambda record: record.valid["NDCG@10"]).epoch for h in histories]
    return averaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="ml-1m")
    parser.add_argument("--min-rating", type=float, default=3)
    parser.add_argument("--valid-fraction", type=float, default=Config().valid_fraction)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    for name, values in GRID.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(values[0]), nargs="+", default=values)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    base = Config(
        data=arguments.data,
        min_rating=arguments.min_rating,
        valid_fraction=arguments.valid_fraction,
        batch_size=arguments.batch_size,
        epochs=arguments.epochs,
    )
    data = to_training_data(prepare(base.data, base), torch.device("cpu"))
    valid_users = len(torch.unique(data.valid.user_index))
    print(f"{len(data.train):,} training rows, {valid_users:,} validation users")
    points = []
    for values in itertools.product(*(getattr(arguments, name) for name in GRID)):
        point = dict(zip(GRID, values, strict=True))
        began = time.perf_counter()
        curves = curve(data, Config(**{**vars(base), **point}), arguments.seeds)
        best = max(range(arguments.epochs), key=curves["NDCG@10"].__getitem__)
        points.append({**point, "best": curves["NDCG@10"][best], "epoch": best + 1, "curves": curves})
        line = "  ".join(f"{name} {value}" for name, value in point.items())
        print(
            f"{line}  NDCG@10 {points[-1]['best']:.4f} at epoch {best + 1}, by seed {curves['best_epochs']}, "
            f"{time.perf_counter() - began:.1f} s",
            flush=True,
        )
    if arguments.output:
        settings = {name: str(value) for name, value in vars(arguments).items() if name not in GRID}
        result = {"settings": settings, "valid_users": valid_users, "versions": versions(), "points": points}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
