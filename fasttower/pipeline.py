"""`fasttower.fit`: the whole way of the data, from interactions to an evaluated run."""

from __future__ import annotations

import dataclasses
import statistics
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import polars as pl
import torch

from fasttower.config import Config, ResolvedConfig
from fasttower.data.catalog import Progress
from fasttower.data.preparation import PreparedData, prepare
from fasttower.device import check_repeatable, choose_device, cpu_threads, fallback_note, memory_of
from fasttower.errors import FastTowerError
from fasttower.evaluation.popularity import most_popular
from fasttower.evaluation.replay_report import replay_metrics
from fasttower.retrieval import IdMap, recommend_to_all, recommendation_frame
from fasttower.run import Run
from fasttower.run.record import Outcome, TrialRow
from fasttower.training.data import Cut, TrainingData
from fasttower.training.observer import Observer
from fasttower.training.plan import Plan
from fasttower.training.search import Candidate, Trial
from fasttower.training.trainer import TrainedModel, Trainer
from fasttower.versions import versions
from fasttower_kernels.backends import choose_backend
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.settings import check_on_gpu
from fasttower_kernels.step.device_memory import check_device_memory, resident_bytes
from fasttower_kernels.tables import Interactions, padded

if TYPE_CHECKING:
    from typing import TypeAlias

    import pandas as pd
    import pyarrow as pa

    Source: TypeAlias = str | Path | pl.DataFrame | pl.LazyFrame | pd.DataFrame | pa.Table

LEAST_USERS = 10
"""Validation users below which nothing is searched for."""

LESS_MEMORY = "a smaller --batch-size or --embedding-dim"
"""What to choose where a GPU's memory runs out."""


class FitObserver(Observer):
    """What `fit` tells besides the trainer's progress; every method may be overridden.

    As it is, it is silent, but for a Python warning where a device or a backend stands in for a better one.
    """

    def download_progress(self) -> Progress | None:
        """What a download reports to; None for nothing."""
        return None

    def on_warning(self, line: str) -> None:
        """Called with a line that the user should see."""
        warnings.warn(line, stacklevel=4)  # where fit was called

    def on_prepared(self, prepared: PreparedData, config: Config) -> None:
        """Called when the data are ready."""

    def on_training(self, device: str, backend: str, why: str, threads: int) -> None:
        """Called before training with what it will use."""
        if line := fallback_note(device, backend, why):
            warnings.warn(line, stacklevel=3)  # where fit was called


def fit(
    data: Source | None = None, config: Config | None = None, *, observer: FitObserver | None = None
) -> Run:
    """Prepare interactions, train, recommend to every user trained on, and evaluate on the test part.

    By default the last 20% of the time line are the test part, which is not trained on. To serve
    recommendations, train on all rows: with ``Config(test_fraction=0)`` there is no test part, and the run's
    metrics have ``test`` and ``popularity`` empty.

    Args:
        data: the name of a data set, a path, or a Polars, pandas or Arrow frame with one row per interaction;
            None takes ``config.data``.
        config: every setting; the default preset if not given.
        observer: progress and the stop signal; if not given, silent but for warnings.

    Returns:
        The run. `Run.save` writes it to a directory.

    Raises:
        FastTowerError: bad data or settings, or a device or backend that is not there.
        TrainingError: the loss is not finite.
    """
    config = named(data, config or Config())
    if not isinstance(observer, FitObserver | None):
        raise FastTowerError(f"observer is a {type(observer).__name__}; expected a fasttower.FitObserver.")
    observer = observer or FitObserver()
    clock = _Clock()

    device, backend, why = choose_where(config, observer)
    with cpu_threads(config.threads) as threads, memory_of(device, LESS_MEMORY):
        prepared = prepare(source_of(data, config), config, config.seed, observer.download_progress())
        training_data = _enough_to_choose_by(to_training_data(prepared), config, observer)
        check_memory(training_data, config, device, backend)
        training_data = training_data.to(device)
        clock.lap("prepare")
        observer.on_prepared(prepared, config)
        observer.on_training(str(device), backend, why, threads)

        trainer = Trainer(training_data, config, observer=observer)
        test, known = prepared.test, training_data.known_positives
        first: tuple[TrainedModel, pl.DataFrame] | None = None
        reports = []
        interrupted = False
        for _ in range(config.seeds):
            trained = trainer.train()
            clock.lap("train")
            interrupted = trained.interrupted
            if interrupted and first is not None:
                break  # a model that was not trained to its end is no sample of a seed
            recommendations = recommend_to_all(trained.model, known, prepared.users, prepared.items, config)
            clock.lap("recommend")
            if test is not None:
                reports.append(_report(recommendations, test, prepared, config.k))
            clock.lap("metrics")
            first = first or (trained, recommendations)
            if interrupted or observer.should_stop():
                interrupted = True
                break
        popularity = {} if test is None else _popularity(known, test, prepared, config)
        clock.lap("metrics")

    assert first is not None  # there is at least one seed
    trained, recommendations = first
    assert isinstance(trained.settings, ResolvedConfig)  # as a Config resolves
    speeds = [one.positives_per_s for one in trained.history if one.phase == trained.history[-1].phase]
    metrics: Outcome = {
        "test": {name: statistics.fmean(report[name] for report in reports) for name in popularity},
        "popularity": popularity,
        "settings": str(Candidate.of(trained.settings)),
        "best_epoch": trained.best_epoch,
        "interrupted": interrupted,
        "test_users": 0 if test is None else test["user_index"].n_unique(),
        "test_pairs_in_fit": prepared.test_pairs_in_fit,
        "timing_s": clock.times(),
        "positives_per_s": statistics.median(speeds) if speeds else None,
        "device": str(device),
        "backend": backend,
        "threads": threads,
        "versions": versions(),
    }
    if trained.trials:
        metrics["search"] = [trial_row(trial) for trial in trained.trials]
    if config.seeds > 1:
        metrics["test_std"] = {
            name: statistics.stdev(report[name] for report in reports) if len(reports) > 1 else None
            for name in reports[0]
        }
        metrics["test_seeds"] = reports
    return Run(
        model=trained.model,
        users=prepared.users,
        items=prepared.items,
        config=trained.settings,
        device=str(device),
        backend=backend,
        history=trained.history,
        recommendations=recommendations,
        metrics=metrics,
        known_positives=known,
    )


def named(data: Source | None, config: Config) -> Config:
    """The configuration with the name of what is trained on.

    Raises:
        FastTowerError: it is no configuration.
    """
    if not isinstance(config, Config):
        raise FastTowerError(f"config is a {type(config).__name__}; expected a fasttower.Config.")
    if data is None:
        return config
    return dataclasses.replace(
        config, data=str(data) if isinstance(data, str | Path) else type(data).__name__
    )


def source_of(data: Source | None, config: Config) -> Source:
    """What to read: the data, or what the configuration names."""
    return config.data if data is None or isinstance(data, str | Path) else data


def choose_where(config: Config, observer: FitObserver) -> tuple[torch.device, str, str]:
    """The device, the backend, and why it is that one.

    Raises:
        FastTowerError: what was asked for is not there, or cannot do what the configuration asks for.
    """
    device, warning = choose_device(config.device, strict=config.strict_device)
    if warning:
        observer.on_warning(warning)
    backend, why = choose_backend(config.backend, device)
    if config.deterministic:
        check_repeatable(backend, device)
    if backend == "triton":
        standard = config.resolved(0, 0)  # the search tries nothing that is refused where this is not
        check_on_gpu(
            standard.loss_settings,
            standard.negative_settings,
            config.optimiser,
            deterministic=config.deterministic,
        )
    return device, backend, why


def trial_row(trial: Trial) -> TrialRow:
    """A trial as ``metrics.json`` has it."""
    row: TrialRow = {
        "settings": str(trial.candidate),
        "epochs": trial.epochs,
        "best_epoch": None,
        "score": None,
        "coverage": None,
        "seconds": trial.seconds,
    }
    if not trial.diverged:
        best = trial.best()
        row |= {"best_epoch": best.epoch, "score": best.mean, "coverage": best.coverage}
    return row


def to_training_data(prepared: PreparedData) -> TrainingData:
    """The prepared parts as tensors on the CPU, with the known positives of fit."""
    fit = _interactions(prepared.fit)
    cuts = tuple(Cut(_interactions(train), _interactions(valid)) for train, valid in prepared.cuts)
    known = KnownPositives.from_pairs(
        fit.user_index, fit.item_index, prepared.users.height, prepared.items.height
    )
    return TrainingData(fit, known, cuts)


def users_to_choose_by(data: TrainingData) -> int:
    """Validation users, of all cuts."""
    return len(torch.cat([cut.valid.user_index for cut in data.cuts]).unique()) if data.cuts else 0


def _enough_to_choose_by(data: TrainingData, config: Config, observer: FitObserver) -> TrainingData:
    """The parts, without validation cuts that have too few users to tell settings apart."""
    search = Plan.of(config, data.known_positives.num_items, cuts=1).search
    users = users_to_choose_by(data)
    if search is None or users >= LEAST_USERS or not (data.cuts or len(search.start) > 1):
        return data
    found = f"the validation part has {users} users, too few" if data.cuts else "there is no validation part"
    observer.on_warning(f"{found} to choose settings by: the standard ones are trained.")
    return dataclasses.replace(data, cuts=())


def _interactions(frame: pl.DataFrame) -> Interactions:
    # torch.tensor copies, so that the tensors are writable and own their memory.
    return Interactions(*(torch.tensor(frame[name].to_numpy()) for name in ("user_index", "item_index")))


def check_memory(data: TrainingData, config: Config, device: torch.device, backend: str) -> None:
    """Refuse what a GPU cannot hold before anything is copied to it.

    Counted is what training surely holds there; what comes on top of it is met where it is asked for.

    Raises:
        FastTowerError: it cannot hold that.
    """
    if backend != "triton":
        return
    known = data.known_positives
    check_device_memory(
        resident_bytes(
            num_users=known.num_users,
            num_items=known.num_items,
            width=padded(config.resolved(len(data.fit), known.num_items).embedding_dim),
            num_rows=len(data.fit) + sum(len(cut.train) + len(cut.valid) for cut in data.cuts),
            num_known=len(known.items),
            table_dtype=config.table_dtype,
        ),
        device,
    )


def _popularity(
    known: KnownPositives, test: pl.DataFrame, prepared: PreparedData, config: Config
) -> dict[str, float]:
    index = test["user_index"].unique().sort().to_numpy()
    users = torch.tensor(index, device=known.items.device)
    topk = most_popular(known, users, k=min(config.k, known.num_items), filter_seen=config.filter_seen)
    ids = IdMap(prepared.users).ids[index]
    frame = recommendation_frame(ids, topk, IdMap(prepared.items))
    return _report(frame, test, prepared, config.k, by="score")


def _report(
    recommendations: pl.DataFrame,
    test: pl.DataFrame,
    prepared: PreparedData,
    k: int,
    by: Literal["rank", "score"] = "rank",
) -> dict[str, float]:
    """RePlay's metrics of the test users, in original ids."""
    # Of fit, RePlay reads only the items.
    return replay_metrics(recommendations, prepared.original_ids(test), prepared.items, k, by)


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """Count the time since the last lap to a stage."""
        now = time.perf_counter()
        self._laps[stage] = self._laps.get(stage, 0.0) + now - self._last
        self._last = now

    def times(self) -> dict[str, float]:
        """The stages' times, and the total."""
        return {**self._laps, "total": time.perf_counter() - self._began}
