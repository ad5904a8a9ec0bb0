"""The default's quality beside its peers': `python -m benchmarks.quality`.

    FASTTOWER_DATA=... python -m benchmarks.quality                       everything, which takes hours
    FASTTOWER_DATA=... python -m benchmarks.quality --models fasttower    only its rows anew
    python -m benchmarks.quality --show                                   the tables that were kept

Each seed of fasttower searches for its own settings on the validation part. A peer's settings are searched
for once, with seed 0, on the same validation parts (`benchmarks.selection`); each seed then trains it on all
rows before the test cut. EASE and ItemKNN have no seed: they are trained once, but where the data differ by
the seed. The test part is read once for each model that is trained; seen items are left out. The planted row
ranks by what the synthetic choices were drawn from: no model can expect more.

CPU time is that of a whole fasttower run, from the file to its report; of a peer, that of a training on all
rows with the test users' ranking, and of its search. Everything runs on one thread. Tables are printed in
Markdown, and kept with each seed's choices in results/quality.json; what is measured anew replaces its rows.
"""

from __future__ import annotations

import argparse
import collections
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from threadpoolctl import threadpool_limits

import fasttower
from benchmarks.kept import keep, read
from benchmarks.peers import PEERS, Scores
from benchmarks.protocols import PROTOCOLS, configuration
from benchmarks.selection import choose, fit_and_test, test_holdout, validation_cuts
from fasttower.config import Config, Search
from fasttower.data.preparation import PreparedData, prepare
from fasttower.data.synthetic import generate

RESULTS = Path(__file__).parent / "results" / "quality.json"

PUBLISHED = {
    "ml-1m": {
        "source": "sb-ai-lab/RePlay, experiments/02_models_comparison.ipynb at commit 01dc19c",
        "models": {
            "SLIM": {"NDCG": 0.2713, "HitRate": 0.6936, "Coverage": 0.0639},
            "LightFM (WARP)": {"NDCG": 0.2695, "HitRate": 0.6962, "Coverage": 0.1547},
            "ItemKNN": {"NDCG": 0.2575, "HitRate": 0.6488, "Coverage": 0.0535},
            "implicit ALS": {"NDCG": 0.2534, "HitRate": 0.6813, "Coverage": 0.1311},
        },
    }
}
"""Rows of others on the same protocol, as they stand at the source."""

COLUMNS = ("NDCG", "HitRate", "Recall", "Coverage")
OTHERS = ("popularity", "planted")
Row = dict[str, Any]


def fasttower_row(protocol: str, seeds: int, **settings: Any) -> tuple[Row, Row]:
    """The default, one run per seed, and popularity's metrics of the same reports."""
    row: Row = {"settings": settings, "runs": []}
    popularity: Row = {"runs": []}
    for seed in range(seeds):
        began = time.process_time()
        metrics: Any = fasttower.fit(config=configuration(protocol, seed=seed, threads=1, **settings)).metrics
        cpu_s = time.process_time() - began
        kept = {name: metrics[name] for name in ("test", "settings", "best_epoch", "search")}
        row["runs"].append({"cpu_s": cpu_s, **kept})
        popularity["runs"].append({"test": metrics["popularity"]})
    return row, popularity


def peer_row(name: str, prepared: list[PreparedData], k: int) -> Row:
    """A peer: a search on the first of the data, and a training for each seed that makes a difference."""
    peer = PEERS[name]
    choice = choose(peer, validation_cuts(prepared[0], k))
    print(f"{name}: {choice}", flush=True)
    same = prepared[-1] is prepared[0]
    seeds = range(1 if same and peer.most_iterations is None else len(prepared))
    runs = [fit_and_test(peer, choice.settings, test_holdout(prepared[seed], k), seed) for seed in seeds]
    return {"choice": asdict(choice), "runs": runs}


def planted_row(protocol: str, prepared: list[PreparedData], k: int) -> Row:
    """What the factors that the choices were drawn from score."""
    runs = []
    for seed, data in enumerate(prepared):
        drawn = generate(PROTOCOLS[protocol]["data"], seed)
        user_ids, columns = data.users["user_id"].to_numpy(), data.items["item_id"].to_numpy() - 1
        scores = Scores(partial(_planted, drawn, user_ids, columns))
        runs.append({"test": test_holdout(data, k).metrics(scores)[0]})
    return {"runs": runs}


def _planted(drawn: Any, user_ids: np.ndarray, columns: np.ndarray, users: np.ndarray) -> np.ndarray:
    return drawn.planted_scores(user_ids[users])[:, columns]


def measured(protocol: str, models: list[str], seeds: int, **settings: Any) -> Iterator[tuple[str, Row]]:
    """The rows of a protocol, by the names of the models."""
    if "fasttower" in models:
        row, popularity = fasttower_row(protocol, seeds, **settings)
        yield "fasttower", row
        yield "popularity", popularity
    if models == ["fasttower"]:
        return
    config = configuration(protocol)
    synthetic = config.data.startswith("synthetic")
    # Other data are the same for every seed.
    different = [prepare(config.data, config, seed) for seed in range(seeds if synthetic else 1)]
    prepared = different if synthetic else different * seeds
    if synthetic:
        yield "planted", planted_row(protocol, prepared, config.k)
    for name in models:
        if name in PEERS:
            yield name, peer_row(name, prepared, config.k)


def table(protocol: str, rows: dict[str, Row]) -> str:
    """Markdown: means and standard deviations over the seeds, the best NDCG first."""
    k = PROTOCOLS[protocol].get("k", Config().k)
    lines = [
        f"| {protocol}, @{k} | " + " | ".join(COLUMNS) + " | CPU s | of the search before |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]

    def mean(row: Row, metric: str) -> float:
        return statistics.fmean(run["test"][f"{metric}@{k}"] for run in row["runs"])

    for name in sorted(rows, key=lambda name: -mean(rows[name], "NDCG")):
        row, runs = rows[name], rows[name]["runs"]
        cells = [name]
        for metric in COLUMNS:
            values = [run["test"][f"{metric}@{k}"] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.4f}" + (f" ± {spread:.4f}" if spread > 1e-6 else ""))
        cells.append(f"{statistics.fmean(run['cpu_s'] for run in runs):.1f}" if "cpu_s" in runs[0] else "")
        searched = f"{row['choice']['cpu_s']:.0f}" if "choice" in row else ""
        lines.append("| " + " | ".join([*cells, searched]) + " |")
    for name, metrics in PUBLISHED.get(protocol, {}).get("models", {}).items():
        cells = [f"{metrics[metric]:.4f}" if metric in metrics else "" for metric in COLUMNS]
        lines.append(f"| {name}, published | " + " | ".join(cells) + " | | |")
    return "\n".join(lines)


def show(protocol: str, rows: dict[str, Row]) -> None:
    print(f"\n{table(protocol, rows)}\n")
    for name, row in rows.items():
        if "choice" in row:
            print(f"{name}: {row['choice']['settings']}, {row['choice']['tried']} settings tried")
        elif name not in OTHERS:
            choices = collections.Counter(run["settings"] for run in row["runs"])
            print(f"{name}: " + "; ".join(f"{count} x {choice}" for choice, count in choices.most_common()))


def main() -> None:
    models = ["fasttower", *PEERS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    standard = [name for name in PROTOCOLS if name != "synthetic-20m"]
    parser.add_argument("--data", nargs="+", choices=PROTOCOLS, default=standard)
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--search", default="quick")
    parser.add_argument("--prefer", default="balanced")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the tables that were kept, and do no more")
    asked = parser.parse_args()
    search = asked.search if asked.search in get_args(Search) else float(asked.search)
    kept = read(asked.output)
    torch.set_num_threads(1)
    if not asked.show:
        fasttower.fit("synthetic-100k", Config(threads=1, epochs=1))  # compiles
    with threadpool_limits(1):
        for protocol in asked.data:
            if not asked.show:
                for name, row in measured(
                    protocol, asked.models, asked.seeds, search=search, prefer=asked.prefer
                ):
                    kept = keep(asked.output, protocol, name, row)
            if rows := kept["data"].get(protocol):
                show(protocol, rows)


if __name__ == "__main__":
    main()
