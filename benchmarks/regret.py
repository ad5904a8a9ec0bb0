"""What the search chooses, seed by seed, and what that costs: `python -m benchmarks.regret`.

    FASTTOWER_DATA=... python -m benchmarks.regret --data ml-1m --seeds 10

Each seed's search is run as it comes. Then every setting that it tried is trained on all rows before the test
cut, for the epochs at which the search found it best, as the refit trains the chosen one. Test parts are read
for this table only: nothing is chosen by it.

    in hindsight, seed by seed   the best test NDCG of the settings that a seed tried; part of what the choice
                                 lacks to it is luck, as this is the largest of several noisy numbers
    in hindsight, once for all   the one setting with the best mean over the seeds, of those that all tried
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import statistics
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

import fasttower
from benchmarks.protocols import PROTOCOLS, configuration
from fasttower.training.search import Trial
from fasttower.versions import versions

RESULTS = Path(__file__).parent / "results" / "regret.json"


class Trials(fasttower.FitObserver):
    """The trials of a search, each as it stands in the end."""

    def __init__(self) -> None:
        self.found: dict[str, Trial] = {}

    def on_trial(self, trial: Trial) -> None:
        """See `fasttower.FitObserver`."""
        self.found[str(trial.candidate)] = trial


def one_seed(protocol: str, seed: int) -> dict[str, Any]:
    """What a seed has chosen, and the test NDCG of each setting that it tried."""
    trials = Trials()
    run = fasttower.fit(config=configuration(protocol, seed=seed, threads=1), observer=trials)
    tried = {}
    for words, trial in trials.found.items():
        best = trial.best()
        # Without a validation part there is one training, on all rows before the test cut.
        fields = {**trial.candidate._asdict(), "epochs": best.epoch, "valid_fraction": 0.0}
        refit = configuration(protocol, seed=seed, threads=1, **fields)
        tried[words] = {
            "epochs": best.epoch,
            "valid": best.mean,
            "test": test_ndcg(fasttower.fit(config=refit)),
        }
    return {"chosen": run.metrics["settings"], "test": test_ndcg(run), "tried": tried}


def test_ndcg(run: fasttower.Run) -> float:
    return float(next(value for name, value in run.metrics["test"].items() if name.startswith("NDCG")))


def show(protocol: str, seeds: list[dict[str, Any]]) -> None:
    chosen = [one["test"] for one in seeds]
    hindsight = [max(setting["test"] for setting in one["tried"].values()) for one in seeds]
    print(f"\n{protocol}, {len(seeds)} seeds: test NDCG {with_error(chosen)}")
    lacks = [best - one for best, one in zip(hindsight, chosen, strict=True)]
    print(f"in hindsight, seed by seed: {with_error(hindsight)}; the choice lacks {with_error(lacks)}")
    common = [words for words in seeds[0]["tried"] if all(words in one["tried"] for one in seeds)]
    means = {words: [one["tried"][words]["test"] for one in seeds] for words in common}
    best = max(common, key=lambda words: statistics.fmean(means[words]))
    lacks = [best - one for best, one in zip(means[best], chosen, strict=True)]
    print(f"in hindsight, once for all: {with_error(means[best])}, {best}; lacks {with_error(lacks)}")
    counts = collections.Counter(one["chosen"] for one in seeds)
    print("\n| setting | chosen | tried | epochs | validation NDCG | test NDCG |\n|---|---|---|---|---|---|")
    every = {words for one in seeds for words in one["tried"]}
    rows = {words: [one["tried"][words] for one in seeds if words in one["tried"]] for words in every}
    for words in sorted(rows, key=lambda words: (-counts[words], -len(rows[words]), words)):
        tests, valid = ([row[part] for row in rows[words]] for part in ("test", "valid"))
        epochs = [row["epochs"] for row in rows[words]]
        print(
            f"| {words} | {counts[words]} | {len(tests)} | {min(epochs)} to {max(epochs)} "
            f"| {statistics.fmean(valid):.4f} | {with_error(tests)} |"
        )


def with_error(values: list[float]) -> str:
    """The mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):.4f} ± {error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    protocols = [name for name, fields in PROTOCOLS.items() if "valid_data" not in fields]
    parser.add_argument("--data", choices=protocols, default="ml-1m")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print what was kept, and do no more")
    asked = parser.parse_args()
    if asked.show:
        for protocol, seeds in json.loads(asked.output.read_text())["data"].items():
            show(protocol, seeds)
        return
    seeds = []
    with threadpool_limits(1):
        for seed in range(asked.seeds):
            seeds.append(one_seed(asked.data, seed))
            print(f"seed {seed}: {seeds[-1]['test']:.4f}  {seeds[-1]['chosen']}", flush=True)
            kept = {"versions": versions(), "data": {asked.data: seeds}}
            asked.output.write_text(json.dumps(kept, indent=1) + "\n")
    show(asked.data, seeds)


if __name__ == "__main__":
    main()
