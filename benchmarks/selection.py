"""How the default preset's numbers were chosen: a grid on validation parts of RePlay's ML-1M protocol.

    FASTTOWER_DATA=... python -m benchmarks.selection --min-rating 3 --output FILE

Every point of the grid is trained for several seeds and several validation cuts, each cut putting another
share of the end of the time line aside, since one cut alone has few users. The curves of the validation
NDCG@10 are averaged; a value is their mean over the later half of the epochs, so that a flat curve, on which
the epoch matters little, goes before a peak. The test part is never read.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from pathlib import Path

import torch

from fasttower.config import PRESETS
from fasttower.data.preparation import prepare
from fasttower.pipeline import to_training_data
from fasttower.training.trainer import Trainer
from fasttower.versions import versions

GRID = {
    "embedding_dim": [16, 32, 64],
    "l2": [0.03, 0.06, 0.1, 0.15],
    "learning_rate": [0.005, 0.01],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="ml-1m")
    parser.add_argument("--min-rating", type=float)
    parser.add_argument("--min-user-interactions", type=int, default=0)
    parser.add_argument("--test-min-rating", type=float)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--valid-fractions", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    for name, values in GRID.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(values[0]), nargs="+", default=values)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    passed_on = ("data", "min_rating", "min_user_interactions", "test_min_rating", "batch_size", "epochs")
    base = dataclasses.replace(PRESETS["default"], **{name: getattr(arguments, name) for name in passed_on})
    cuts = {}
    for fraction in arguments.valid_fractions:
        config = dataclasses.replace(base, valid_fraction=fraction)
        cuts[fraction] = to_training_data(prepare(base.data, config))
        valid = cuts[fraction].valid
        print(
            f"valid fraction {fraction}: {len(cuts[fraction].train):,} training rows, {len(valid):,} pairs of"
        )
        print(f"    {len(torch.unique(valid.user_index)):,} validation users")

    points = []
    for values in itertools.product(*(getattr(arguments, name) for name in GRID)):
        point = dict(zip(GRID, values, strict=True))
        began = time.perf_counter()
        curves = {}  # by cut, averaged over seeds
        for fraction, data in cuts.items():
            fields = {**point, "l2": (point["l2"],)}
            config = dataclasses.replace(base, **fields, seeds=arguments.seeds, refit=False)
            trainer = Trainer(data, config.resolved(len(data.fit)))
            histories = [trainer.train().history for _ in range(arguments.seeds)]
            curves[fraction] = [
                statistics.fmean(history[epoch].valid["NDCG@10"] for history in histories)
                for epoch in range(base.epochs)
            ]
        mean = [statistics.fmean(at_epoch) for at_epoch in zip(*curves.values(), strict=True)]
        value = statistics.fmean(mean[len(mean) // 2 :])
        points.append({**point, "value": value, "best": max(mean), "curves": curves})
        line = "  ".join(f"{name} {point[name]:<5}" for name in GRID)
        print(
            f"{line}  later half {value:.4f}  best {max(mean):.4f} at epoch {mean.index(max(mean)) + 1:2d}  "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
    if arguments.output:
        settings = {name: str(value) for name, value in vars(arguments).items()}
        result = {"settings": settings, "versions": versions(), "points": points}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
