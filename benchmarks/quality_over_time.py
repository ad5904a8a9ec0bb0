"""Validation NDCG against CPU seconds of training, for fasttower and implicit: one thread.

    pip install -e '.[bench]'
    FASTTOWER_DATA=... python -m benchmarks.quality_over_time --data ml-1m --seeds 3
    python -m benchmarks.quality_over_time --data synthetic-20m --limit 900
    python -m benchmarks.quality_over_time --show             the tables that were kept, and the picture anew

All train on the rows before the last validation cut and are scored on its users, after each epoch at first
and four times per doubling later. Seconds are of training: CPU time without scoring, imports and compilation.

    default   fasttower as it comes: everything that its search tries counts, on every validation cut; its
              quality is the best so far
    chosen    fasttower with the settings that this search chose
    ALS, BPR  implicit, with settings searched for: `benchmarks.quality` keeps them for ml-1m; of
              synthetic-20m those of LARGE are tried, and the best curve is shown. The search does not count.

The levels of the table are the best quality that each way comes to, as the mean of its seeds; the seconds to
a level the median of the seeds that reach it. Curves are kept in results/quality_over_time.json.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from threadpoolctl import threadpool_limits

import fasttower
from benchmarks.kept import keep, read
from benchmarks.peers import PEERS, Peer, Ranker
from benchmarks.protocols import PROTOCOLS, configuration
from benchmarks.selection import Holdout, is_scored, validation_cuts
from fasttower.config import Config
from fasttower.data.preparation import prepare
from fasttower.data.synthetic import generate
from fasttower.training.observer import EpochRecord
from fasttower.training.search import Trial

FOLDER = Path(__file__).parent / "results"
RESULTS = FOLDER / "quality_over_time.json"
PICTURE = FOLDER / "quality_over_time.svg"

WAYS = ("default", "chosen", "implicit ALS", "implicit BPR")
MEASURED = ("default", "implicit ALS", "implicit BPR")
"""What can be asked for: the chosen settings come with the default's search."""

LARGE = {
    "implicit ALS": {"factors": (32, 64), "regularization": (100.0, 300.0), "alpha": (1.0,)},
}
"""What is tried where no search was kept, by the name of the way. With L2 10, or alpha 4, it is worse."""

LONGER = 3
"""Times the iterations of the peers' search, so that a curve shows where it ends."""


class Curve(NamedTuple):
    """What a training went through.

    Attributes:
        seconds: of training until each of the epochs that were scored.
        ndcg: the quality after it.
    """

    seconds: list[float]
    ndcg: list[float]

    def add(self, seconds: float, ndcg: float) -> None:
        """One more epoch."""
        self.seconds.append(round(seconds, 3))
        self.ndcg.append(round(ndcg, 5))

    def time_to(self, level: float) -> float | None:
        """Seconds until the first epoch at that level or above."""
        return next((s for s, ndcg in zip(*self, strict=True) if ndcg >= level), None)

    def best_so_far(self) -> Curve:
        """With the largest quality up to each epoch."""
        return Curve(self.seconds, list(itertools.accumulate(self.ndcg, max)))


class Stopwatch(fasttower.FitObserver):
    """Takes the curve of a fasttower run, without its scoring, and stops it where its search ends.

    Args:
        cuts: whether the training on all validation cuts counts, or only that on the last.
        limit: CPU seconds after which the run is stopped.

    Attributes:
        curve: as far as it has come.
        trials: what the search has tried.
        chosen: the settings that it has chosen, in words; None before.
    """

    def __init__(self, *, cuts: bool, limit: float) -> None:
        self.curve = Curve([], [])
        self.trials: dict[str, Trial] = {}
        self.chosen: str | None = None
        self._cuts, self._limit = cuts, limit
        self._spent = self._epoch = self._mark = 0.0

    def on_training(self, device: str, backend: str, why: str, threads: int) -> None:
        """See `fasttower.FitObserver`."""
        self._mark = time.process_time()

    def on_progress(self, phase: str, epoch: int, epochs: int, done: int, total: int) -> None:
        """See `fasttower.FitObserver`."""
        now = time.process_time()
        self._epoch += now - self._mark
        self._mark = now

    def on_epoch(self, record: EpochRecord) -> None:
        """See `fasttower.FitObserver`."""
        if self._cuts or record.cut == 0:
            self._spent += self._epoch
        self._epoch = 0.0
        if record.cut == 0 and record.valid:
            self.curve.add(self._spent, next(iter(record.valid.values())))
        self._mark = time.process_time()  # what was scored since the last progress does not count

    def on_trial(self, trial: Trial) -> None:
        """See `fasttower.FitObserver`."""
        self.trials[str(trial.candidate)] = trial
        best = f"{trial.best().mean:.4f} of {trial.epochs} epochs"
        print(f"  {self._spent:7.1f} s  {best}  {trial.candidate}", flush=True)

    def on_phase(self, phase: str, settings: str, epochs: int) -> None:
        """See `fasttower.FitObserver`."""
        if phase == "refit":
            self.chosen = settings

    def should_stop(self) -> bool:
        """See `fasttower.FitObserver`."""
        return self.chosen is not None or self._spent > self._limit

    @property
    def choice(self) -> dict[str, Any]:
        """The fields of the settings that were chosen, or that were best when the limit was reached."""
        best = max(self.trials.values(), key=lambda trial: trial.best().mean)
        return (best if self.chosen is None else self.trials[self.chosen]).candidate._asdict()


def of_fasttower(data: Any, config: Config, *, cuts: bool, limit: float) -> Stopwatch:
    """What was seen of a run."""
    watch = Stopwatch(cuts=cuts, limit=limit)
    fasttower.fit(data, config, observer=watch)
    return watch


def of_peer(
    peer: Peer, settings: dict[str, Any], cut: Holdout, seed: int, limit: float = float("inf")
) -> Curve:
    """The curve of one of implicit's models."""
    curve = Curve([], [])
    spent, mark = 0.0, time.process_time()

    def after(iteration: int, ranker: Ranker) -> bool:
        nonlocal spent, mark
        spent += time.process_time() - mark
        if is_scored(iteration):
            curve.add(spent, float(cut.metrics(ranker)[1].mean()))
        mark = time.process_time()
        return spent > limit

    settings = {**settings, "iterations": LONGER * peer.most_iterations}
    peer.fit(cut.matrix, **settings, seed=seed, after=after)
    return curve


def settings_of(way: str, protocol: str) -> list[dict[str, Any]]:
    """The settings of a peer to take curves of."""
    kept = read(FOLDER / "quality.json")["data"]
    if choice := kept.get(protocol, {}).get(way, {}).get("choice"):
        return [choice["settings"]]
    grid = LARGE.get(way, {})
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()) if grid]


def measured(
    protocol: str, ways: list[str], seeds: int, limit: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The curves of each way, with what they were trained with, after each seed of fasttower."""
    data, config = _source(protocol), configuration(protocol, threads=1)
    chosen: list[dict[str, Any]] = []
    curves = []
    for seed in range(seeds) if "default" in ways else ():
        watch = of_fasttower(data, configuration(protocol, threads=1, seed=seed), cuts=True, limit=limit)
        curves.append(watch.curve.best_so_far())
        chosen.append(watch.choice)
        yield "default", {"settings": chosen, "curves": curves}
    curves = []
    for seed, settings in enumerate(chosen):
        asked = configuration(protocol, threads=1, seed=seed, search="none", **settings)
        curves.append(of_fasttower(data, asked, cuts=False, limit=limit).curve)
        yield "chosen", {"settings": chosen, "curves": curves}

    cut = validation_cuts(prepare(data, config), config.k)[0]
    for way in ways:
        if way not in PEERS:
            continue
        rows = []
        for settings in settings_of(way, protocol):
            row = {"settings": settings, "curves": [of_peer(PEERS[way], settings, cut, 0, limit)]}
            print(f"  {way} {settings}: best {max(row['curves'][0].ndcg):.4f}", flush=True)
            rows.append(row)
        if rows:
            best = max(rows, key=lambda row: max(row["curves"][0].ndcg))
            best["curves"] += [
                of_peer(PEERS[way], best["settings"], cut, seed, limit) for seed in range(1, seeds)
            ]
            yield way, best | {"tried": [row["settings"] for row in rows]}


def _source(protocol: str) -> Any:
    """What to train on: rows that take a while to draw are drawn once."""
    name = PROTOCOLS[protocol]["data"]
    if not name.startswith("synthetic"):
        return configuration(protocol).data
    rows = generate(name, 0)
    return pl.DataFrame({name: getattr(rows, name) for name in ("user_id", "item_id", "rating", "timestamp")})


def table(protocol: str, ways: dict[str, dict[str, Any]]) -> str:
    """Markdown: the seconds to the best quality of each way."""
    curves = {way: [Curve(*curve) for curve in row["curves"]] for way, row in ways.items()}
    lines = [
        f"| CPU seconds to a validation NDCG on {protocol} | " + " | ".join(curves) + " |",
        "|---" * (len(curves) + 1) + "|",
    ]
    for leader, led in curves.items():
        level = statistics.fmean(max(curve.ndcg) for curve in led)
        cells = [f"best of {leader}, {level:.4f}"]
        for repeats in curves.values():
            times = [seconds for curve in repeats if (seconds := curve.time_to(level)) is not None]
            count = "" if len(times) == len(repeats) else f" ({len(times)} of {len(repeats)})"
            cells.append(f"{statistics.median(times):.2f}{count}" if times else "never")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(data: dict[str, dict[str, dict[str, Any]]]) -> None:
    """One panel per data set, a line per seed; in colours that can be seen on white and on black."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    grey, colours = "#808080", dict(zip(WAYS, ("#2a8fe8", "#17a673", "#e8703a", "#b066d6"), strict=True))
    plt.rcParams |= {"svg.hashsalt": "", "svg.fonttype": "none", "font.family": "sans-serif"}
    figure, axes = plt.subplots(
        1, len(data), figsize=(5 * len(data), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (protocol, ways) in zip(axes[0], data.items(), strict=True):
        for way, row in ways.items():
            for number, curve in enumerate(row["curves"]):
                seconds, ndcg = curve
                label = (f"fasttower, {way}" if way in ("default", "chosen") else way) if not number else None
                style = "steps-post" if way == "default" else "default"
                axis.plot(seconds, ndcg, color=colours[way], label=label, drawstyle=style, linewidth=1.6)
        axis.set_xscale("log")
        axis.set_title(protocol, color=grey)
        axis.set_xlabel("CPU seconds of training, one thread", color=grey)
        axis.set_ylabel("validation NDCG@10", color=grey)
        axis.tick_params(colors=grey, which="both")
        axis.grid(color=grey, alpha=0.25, linewidth=0.5)
        for spine in axis.spines.values():
            spine.set_color(grey)
        best = max(max(curve[1]) for row in ways.values() for curve in row["curves"])
        axis.set_ylim(0.7 * best, 1.02 * best)
    lines = {line.get_label(): line for axis in axes[0] for line in axis.lines if line.get_label()[0] != "_"}
    figure.legend(
        lines.values(), lines, labelcolor=grey, frameon=False, ncols=len(lines), loc="outside lower center"
    )
    figure.savefig(PICTURE, transparent=True, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=PROTOCOLS, default=["ml-1m"])
    parser.add_argument("--ways", nargs="+", choices=MEASURED, default=MEASURED)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--limit", type=float, default=float("inf"), help="CPU seconds of a curve")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print and draw what was kept, and do no more")
    asked = parser.parse_args()
    kept = read(asked.output)
    torch.set_num_threads(1)
    if not asked.show:
        for loss in ("bce", "softmax"):  # compiles
            fasttower.fit("synthetic-100k", Config(threads=1, epochs=1, loss=loss))
        with threadpool_limits(1):
            for protocol in asked.data:
                for way, row in measured(protocol, asked.ways, asked.seeds, asked.limit):
                    kept = keep(asked.output, protocol, way, row)
    for protocol, ways in kept["data"].items():
        ordered = {way: ways[way] for way in WAYS if way in ways}
        print(f"\n{table(protocol, ordered)}")
        for way, row in ordered.items():
            print(f"{way}: {row['settings']}")
    draw(kept["data"])


if __name__ == "__main__":
    main()
