"""`fasttower.tune`: trial after trial, each trained as far as it is worth it."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from fasttower.config import Config, DataConfig, ResolvedConfig
from fasttower.data.preparation import prepare
from fasttower.device import cpu_threads, memory_of
from fasttower.errors import FastTowerError, TrainingError
from fasttower.pipeline import (
    LEAST_USERS,
    LESS_MEMORY,
    FitObserver,
    check_memory,
    choose_where,
    named,
    source_of,
    to_training_data,
    users_to_choose_by,
)
from fasttower.training.data import TrainingData
from fasttower.training.observer import Observer
from fasttower.training.plan import Plan, trials_of
from fasttower.training.search import FIRST_RUNG, Candidate, Search, Trial
from fasttower.training.trainer import Trainer
from fasttower.tuning.space import VARIED, Space, described
from fasttower.tuning.study import Study, TuneRow, best_of, load_optuna

if TYPE_CHECKING:
    from fasttower.pipeline import Source

TRIALS = 50
"""Where neither their number nor the time is limited."""

_ELSEWHERE = {"data", "data_root", "valid_data", "test_data"} | {
    f"{kind}_column" for kind in ("user", "item", "rating", "timestamp")
}
"""Fields that say where the data are: what counts is what is read there."""

_OF_A_TRAINING = {"search", "prefer", "seeds", "refit", "device", "strict_device", "backend", "threads"}
"""Fields that change nothing about a trial."""


class TuneObserver(FitObserver):
    """What `tune` tells besides the preparation and the trainer's progress."""

    def on_study(self, rows: list[TuneRow], varied: list[str]) -> None:
        """Called before the first trial, with those that the storage has already and what will be varied."""

    def on_trial_end(self, row: TuneRow, best: TuneRow | None) -> None:
        """Called after each trial, with the best one so far, that one included."""


@dataclass(frozen=True)
class Tuned:
    """What came of tuning.

    Attributes:
        config: the chosen settings with their best number of epochs, for `fit`, which then searches nothing.
        score: their NDCG at the cutoff, the mean over the validation users of all cuts.
        trials: a row per trial, in their order: trial (from 1), state (complete, pruned or failed), score,
            coverage, best_epoch, epochs, seconds, settings.
        interrupted: whether a stop signal came before all was tried.
    """

    config: ResolvedConfig
    score: float
    trials: pl.DataFrame
    interrupted: bool


def tune(
    data: Source | None = None,
    config: Config | None = None,
    *,
    trials: int | None = None,
    minutes: float | None = None,
    storage: str | Path | None = None,
    keep: Collection[str] = (),
    observer: TuneObserver | None = None,
) -> Tuned:
    """Look for the settings that are best on the validation part, with optuna.

    Fields of the configuration that differ from their default stay as they are; others that
    `fasttower.tuning.space.VARIED` names are varied. The first trials are those that the search of `fit`
    begins with. A trial is trained as long as it gains, and given up where, after 2, 4, 8 ... epochs (half
    as many with negatives that a block shares), the better half of the trials before it had better scores.
    `config.prefer` says which of the trials is chosen, as it does of those of `fit`. The test part is never
    looked at, and `config.search` is not read.

    Args:
        data: as for `fit`.
        config: as for `fit`.
        trials: to have in the end, those in the storage included; without minutes, 50 if not given.
        minutes: of this call, after which it stops as at a stop signal.
        storage: an SQLite file; where it is there, the study in it goes on. Without one, nothing is kept.
        keep: names of fields that stay at their default.
        observer: progress and the stop signal; if not given, silent but for warnings.

    Raises:
        FastTowerError: bad data or settings, a device or backend that is not there, a storage with another
            study, optuna is not installed, or no trial was finished before the stop signal.
        TrainingError: no trial has come to an end without diverging.
    """
    load_optuna()
    config = named(data, config or Config())
    observer = observer or TuneObserver()
    if unknown := sorted(set(keep) - {field.name for field in dataclasses.fields(Config)}):
        raise FastTowerError(f"keep names {', '.join(unknown)}; expected fields of a configuration.")
    _check_limits(trials, minutes)
    device, backend, why = choose_where(config, observer)
    with cpu_threads(config.threads) as threads, memory_of(device, LESS_MEMORY):
        prepared = prepare(source_of(data, config), config, config.seed, observer.download_progress())
        parts = to_training_data(prepared)
        check_memory(parts, config, device, backend)
        _check_can_choose(parts)
        sizes = len(parts.fit), parts.known_positives.num_items
        space = Space(config, keep, *sizes)
        path = None if storage is None else Path(storage).expanduser()
        study = Study(path, _about(config, space, parts), config.seed)
        parts = parts.to(device)
        observer.on_prepared(prepared, config)
        observer.on_training(str(device), backend, why, threads)
        observer.on_study(study.rows, space.varied)

        most = trials if trials is not None else TRIALS if minutes is None else None
        ends = None if minutes is None else time.monotonic() + 60 * minutes
        first = space.standard()

        def stop() -> bool:
            return observer.should_stop() or (ends is not None and time.monotonic() >= ends)

        while (most is None or len(study.rows) < most) and not stop():
            row = _run(study, space, first, parts, stop, observer)
            if row is not None:
                observer.on_trial_end(row, best_of(study.rows))

    rows, interrupted = study.rows, observer.should_stop()
    choice = study.chosen(config.prefer)
    if choice is None:
        if failed := [row for row in rows if row["state"] == "failed"]:
            raise TrainingError(f"all {len(failed)} trials failed; the last: {failed[-1].get('reason')}")
        raise FastTowerError(
            "no trial was finished"
            + ("" if storage is None else f"; the same command goes on with {storage}")
            + "; give it more time."
        )
    fields = dict(choice["fields"])
    if fields["similarity"] == "dot":
        del fields["temperature"]  # it has none
    tuned = dataclasses.replace(config, **fields, epochs=choice["best_epoch"], search="none")
    table = pl.DataFrame(
        [{name: row[name] for name in _COLUMNS} for row in rows],  # type: ignore[literal-required]
        schema=_COLUMNS,
    )
    assert choice["score"] is not None  # it was chosen by it
    return Tuned(tuned.resolved(*sizes), choice["score"], table, interrupted)


_COLUMNS = {
    "trial": pl.Int64,
    "state": pl.String,
    "score": pl.Float64,
    "coverage": pl.Float64,
    "best_epoch": pl.Int64,
    "epochs": pl.Int64,
    "seconds": pl.Float64,
    "settings": pl.String,
}


def _check_limits(trials: int | None, minutes: float | None) -> None:
    if trials is not None and trials < 1:
        raise FastTowerError(f"--trials is {trials}; expected 1 or more.")
    if minutes is not None and not 0 < minutes < float("inf"):
        raise FastTowerError(f"--minutes is {minutes}; expected a finite number above 0.")


def _check_can_choose(parts: TrainingData) -> None:
    users = users_to_choose_by(parts)
    if users < LEAST_USERS:
        raise FastTowerError(
            f"the validation part has {users} users, too few to choose by; give more data, a larger "
            "--valid-fraction, or --valid-data."
        )


def _about(config: Config, space: Space, parts: TrainingData) -> dict[str, object]:
    """The data and the settings that all trials of a study share."""
    fields = dataclasses.asdict(config)
    of_data = {field.name for field in dataclasses.fields(DataConfig)}
    kept = {
        name: value
        for name, value in fields.items()
        if name not in _ELSEWHERE | _OF_A_TRAINING and (name not in VARIED or name in space.kept)
    }
    # What the data were made with explains better than their sizes why they differ.
    kept = dict(sorted(kept.items(), key=lambda item: item[0] not in of_data))
    return {
        **kept,
        "families": ["/".join(family) for family in space.families],
        "rows": len(parts.fit),
        "users": parts.known_positives.num_users,
        "items": parts.known_positives.num_items,
        "the data's SHA-256": _fingerprint(parts),
    }


def _fingerprint(parts: TrainingData) -> str:
    digest = hashlib.sha256()
    for part in (parts.fit, *(part for cut in parts.cuts for part in cut)):
        digest.update(f"{len(part)}:".encode())
        for column in (part.user_index, part.item_index):
            digest.update(column.numpy().tobytes())
    return digest.hexdigest()[:16]


class _OnlyProgress(Observer):
    """Passes progress on: a trial here is not one of a training's search."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def on_progress(self, phase: str, epoch: int, epochs: int, done: int, total: int) -> None:
        """See `Observer`."""
        self._observer.on_progress(phase, epoch, epochs, done, total)


def _run(
    study: Study,
    space: Space,
    first: list[dict[str, object]],
    parts: TrainingData,
    stop: Callable[[], bool],
    observer: Observer,
) -> TuneRow | None:
    """Train the next trial as far as it is worth it; None where it was stopped before."""
    number = len(study.rows) + 1
    trial = study.ask(first)
    config = space.settings(trial)
    row: TuneRow = {
        "trial": number,
        "state": "complete",
        "settings": described(config),
        "score": None,
        "coverage": None,
        "best_epoch": None,
        "epochs": None,
        "seconds": 0.0,
        "fields": {name: getattr(config, name) for name in VARIED},
    }
    per_user: list[float] = []
    began = time.perf_counter()
    try:
        with memory_of(parts.fit.user_index.device, LESS_MEMORY):
            trainer = _trainer(config, parts, observer)
            for rung, reached in enumerate(_rungs(trainer, stop)):
                best = reached.best()
                row["score"], row["coverage"], row["best_epoch"] = best.mean, best.coverage, best.epoch
                row["epochs"], per_user = reached.epochs, best.per_user.tolist()
                is_behind = study.is_behind(trial, FIRST_RUNG << rung, best.mean)
                # What a training would find has to be found here too.
                if is_behind and number > len(first) and _goes_on(trainer):
                    row["state"] = "pruned"
                    break
        if row["state"] == "complete" and _goes_on(trainer):
            study.end(trial, None)
            return None
    except FastTowerError as error:
        row |= {"state": "failed", "score": None, "coverage": None, "best_epoch": None, "epochs": None}
        row["reason"], per_user = str(error).split("\n", maxsplit=1)[0], []
    except BaseException:
        study.end(trial, None)
        raise
    row["seconds"] = time.perf_counter() - began
    study.end(trial, row, per_user)
    return row


def _trainer(config: ResolvedConfig, parts: TrainingData, observer: Observer) -> Trainer:
    """Of a search among one candidate: it is trained as long as it gains."""
    search = Search((Candidate.of(config),), (), config.epochs, opens=False)
    plan = Plan([config.seed], search=search, cuts=len(parts.cuts))
    return Trainer(parts, config, plan=plan, observer=_OnlyProgress(observer))


def _goes_on(trainer: Trainer) -> bool:
    """Whether there is a further rung to train for, or the rest of one."""
    return trainer.phase is not None and trainer.phase.searches


def _rungs(trainer: Trainer, stop: Callable[[], bool]) -> Iterator[Trial]:
    """Train a candidate; give how it has done after each rung on all cuts, until it is over or stopped."""
    outcomes, cuts = trainer.progress.outcomes, trainer.plan.cuts
    while _goes_on(trainer):
        before = len(outcomes)
        trainer.advance()
        if len(outcomes) > before and len(outcomes) % cuts == 0:
            yield trials_of(outcomes, cuts)[0]
        if _goes_on(trainer) and stop():
            return
