"""The default with one choice removed at a time: `python -m benchmarks.ablation`.

    FASTTOWER_DATA=... python -m benchmarks.ablation --data ml-1m --seeds 3
    FASTTOWER_DATA=... python -m benchmarks.ablation --data amazon-beauty --seeds 1

Each row is a whole run, which searches anew for what it leaves open; the test part is read once for each.
What no setting switches off is left out: log q of shared negatives, the number of validation cuts.
Differences are paired by seed. Everything runs on one thread; kept in results/ablation.json.
"""

from __future__ import annotations

import argparse
import collections
import math
import statistics
import time
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

import fasttower
from benchmarks.kept import keep, read
from benchmarks.protocols import PROTOCOLS, configuration
from fasttower.config import Config

RESULTS = Path(__file__).parent / "results" / "ablation.json"

CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "no item bias": {"item_bias": False},
    "known positives may be negatives": {"exclude_known_positives": False},
    "no refit on the validation rows": {"refit": False},
    "no search": {"search": "none"},
    "prefer accuracy": {"prefer": "accuracy"},
    "prefer coverage": {"prefer": "coverage"},
    "bce only": {"loss": "bce"},
    "softmax with cosine only": {"loss": "softmax", "similarity": "cosine"},
}
COLUMNS = ("NDCG", "Recall", "Coverage")


def measured(config: Config) -> dict[str, Any]:
    """The test metrics, the choice and the CPU time of a run."""
    began = time.process_time()
    run = fasttower.fit(config=config)
    return {
        "cpu_s": time.process_time() - began,
        "test": run.metrics["test"],
        "settings": run.metrics["settings"],
    }


def show(protocol: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    """A table in Markdown, and the settings that were chosen."""
    k = PROTOCOLS[protocol].get("k", Config().k)
    print(f"\n| {protocol}, @{k} | seeds | " + " | ".join(COLUMNS) + " | NDCG beside the default's | CPU s |")
    print("|---" * (len(COLUMNS) + 4) + "|")
    for change, runs in rows.items():
        means = [statistics.fmean(run["test"][f"{name}@{k}"] for run in runs) for name in COLUMNS]
        pairs = zip(runs, rows["default"], strict=False)  # as many as both have
        gains = [run["test"][f"NDCG@{k}"] - default["test"][f"NDCG@{k}"] for run, default in pairs]
        error = f" ± {statistics.stdev(gains) / math.sqrt(len(gains)):.4f}" if len(gains) > 1 else ""
        beside = "" if change == "default" else f"{statistics.fmean(gains):+.4f}{error}"
        seconds = statistics.fmean(run["cpu_s"] for run in runs)
        cells = [change, str(len(runs)), *(f"{mean:.4f}" for mean in means), beside, f"{seconds:.1f}"]
        print("| " + " | ".join(cells) + " |")
    print()
    for change, runs in rows.items():
        choices = collections.Counter(run["settings"] for run in runs)
        print(f"{change}: " + "; ".join(f"{count} x {choice}" for choice, count in choices.most_common()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=PROTOCOLS, default=["ml-1m"])
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print what was kept, and do no more")
    asked = parser.parse_args()
    kept = read(asked.output)
    with threadpool_limits(1):
        for protocol in () if asked.show else asked.data:
            fasttower.fit("synthetic-100k", Config(threads=1, epochs=1))  # compiles
            for change in asked.changes:
                configs = [
                    configuration(protocol, seed=seed, threads=1, **CHANGES[change])
                    for seed in range(asked.seeds)
                ]
                kept = keep(asked.output, protocol, change, [measured(config) for config in configs])
                print(f"{protocol}, {change}: done", flush=True)
    for protocol, rows in kept["data"].items():
        show(protocol, rows)


if __name__ == "__main__":
    main()
