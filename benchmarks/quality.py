"""The default's quality on real data beside popularity: `python -m benchmarks.quality`.

    FASTTOWER_DATA=... python -m benchmarks.quality --seeds 5 --output benchmarks/results/quality.json

The protocols:

    ml-1m          RePlay's published one: ratings of at least 3, test part the last 20% of the time line
    ml-100k        the published notebook's: users with at least 20 ratings, test ratings of at least 4
    amazon-beauty  a published fixed split without timestamps (LightGCN++, RecSys 2024), cutoff 20
    synthetic-1m   generated, in MovieLens-1M's shape

Each seed searches for its own settings on the validation part; its test part is read once. Reported are the
means and deviations of RePlay's metrics, and the CPU time of the whole run, with one thread unless --threads
asks for more. The search's choices are kept for every seed.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import statistics
import time
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import fasttower
from fasttower.config import Config, Search
from fasttower.versions import versions

PROTOCOLS: dict[str, dict[str, Any]] = {
    "ml-1m": {"data": "ml-1m", "min_rating": 3},
    "ml-100k": {"data": "ml-100k", "min_user_interactions": 20, "test_min_rating": 4},
    "amazon-beauty": {"data": "train.csv", "valid_data": "valid.csv", "test_data": "test.csv", "k": 20},
    "synthetic-1m": {"data": "synthetic-1m"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--search", default="quick")
    parser.add_argument("--prefer", default="balanced")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    search = asked.search if asked.search in get_args(Search) else float(asked.search)
    settings = {"threads": asked.threads, "search": search, "prefer": asked.prefer}
    fasttower.fit("synthetic-100k", Config(threads=asked.threads, epochs=1))  # compiles
    result: dict[str, Any] = {"settings": settings, "versions": versions(), "data": {}}
    with TemporaryDirectory() as folder:
        for name in asked.data:
            fields = dict(PROTOCOLS[name])
            if name == "amazon-beauty":
                with zipfile.ZipFile(Path(os.environ["FASTTOWER_DATA"]) / f"{name}.zip") as archive:
                    archive.extractall(folder)
                for field in ("data", "valid_data", "test_data"):
                    fields[field] = str(Path(folder) / fields[field])
            runs = [one_run(Config(**fields, **settings, seed=seed)) for seed in range(asked.seeds)]
            result["data"][name] = runs
            print(f"\n{name}, {asked.seeds} seeds, {asked.threads} threads")
            show(runs)
            if asked.output:
                asked.output.write_text(json.dumps(result, indent=1) + "\n")


def one_run(config: Config) -> dict[str, Any]:
    began = time.process_time()
    metrics = fasttower.fit(config=config).metrics
    kept = ("test", "popularity", "settings", "best_epoch", "search")
    return {"cpu_s": time.process_time() - began} | {name: metrics[name] for name in kept}  # type: ignore[literal-required]


def show(runs: list[dict[str, Any]]) -> None:
    for name, popular in runs[0]["popularity"].items():
        values = [run["test"][name] for run in runs]
        deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
        print(f"  {name:12s} {statistics.fmean(values):.4f} +- {deviation:.4f}   popularity {popular:.4f}")
    print(f"  CPU time     {statistics.fmean(run['cpu_s'] for run in runs):.1f} s a run")
    for choice, count in collections.Counter(run["settings"] for run in runs).most_common():
        print(f"  {count} x {choice}")


if __name__ == "__main__":
    main()
