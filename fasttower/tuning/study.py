"""A study: what has been tried, in memory or in a file that the next call goes on with.

All that is asked of it depends only on the trials that have finished, so that a study that was stopped goes
on as if it had not been.
"""

from __future__ import annotations

import functools
import importlib
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

import numpy as np
import torch

from fasttower.config import Preference
from fasttower.errors import FastTowerError
from fasttower.training.search import Candidate, Scores, Trial, chosen

if TYPE_CHECKING:
    import optuna

_ABOUT, _ROW, _PER_USER = "fasttower", "fasttower_trial", "fasttower_per_user"


class TuneRow(TypedDict):
    """A trial that has finished.

    A failed one, which diverged or ran out of memory, has neither scores nor epochs.
    """

    trial: int
    """From 1, in the order in which they were begun."""
    state: Literal["complete", "pruned", "failed"]
    """Trained until it gained no more, given up for being behind others, or failed."""
    settings: str
    """In words."""
    score: float | None
    """NDCG at the cutoff after the best epoch, the mean over the validation users of all cuts."""
    coverage: float | None
    """Then."""
    best_epoch: int | None
    epochs: int | None
    """That it was trained for."""
    seconds: float
    fields: dict[str, Any]
    """The settings that were varied or kept, as fields of a configuration."""
    reason: NotRequired[str]
    """Why it failed."""


class Study:
    """Trials of settings, with optuna's tree-structured Parzen estimator to propose the next ones.

    Source: Bergstra et al., "Algorithms for Hyper-Parameter Optimization" (NeurIPS 2011), section 4.

    Args:
        storage: an SQLite file, which is made if it is not there; None to keep the trials in memory.
        about: the data and the settings that all trials share.
        seed: of the proposals.

    Raises:
        FastTowerError: optuna is not installed, or the file cannot be read or written, or holds a study of
            other data or settings.
    """

    def __init__(self, storage: Path | None, about: Mapping[str, Any], seed: int) -> None:
        self._optuna = load_optuna()
        self._seed = seed
        self._study = self._opened(storage)
        there = self._study.user_attrs.get(_ABOUT)
        if there is None:
            self._study.set_user_attr(_ABOUT, dict(about))
        elif different := _difference(there, about):
            raise FastTowerError(
                f"{storage} holds a study in which {different}; give it the same data and settings, or "
                "choose another --storage."
            )

    def _opened(self, storage: Path | None) -> optuna.Study:
        from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415 - comes with optuna

        try:
            kept = storage and self._optuna.storages.RDBStorage(
                "sqlite:///study.db",
                # In a URL, a path with ? or % would be another one.
                engine_kwargs={"creator": functools.partial(sqlite3.connect, storage)},
            )
            return self._optuna.create_study(
                storage=kept,
                study_name="fasttower",
                direction="maximize",
                load_if_exists=True,
            )
        except (SQLAlchemyError, RuntimeError) as error:  # RuntimeError: of another version of optuna
            reason = str(error).strip().split("\n", maxsplit=1)[0]
            raise FastTowerError(
                f"{storage} cannot be used as a study's storage ({reason}); choose another --storage."
            ) from error

    @property
    def rows(self) -> list[TuneRow]:
        """The trials that have finished."""
        trials = self._study.get_trials(deepcopy=False)
        return [trial.user_attrs[_ROW] for trial in trials if _ROW in trial.user_attrs]

    def ask(self, first: Sequence[Mapping[str, Any]]) -> optuna.Trial:
        """Begin the next trial.

        Args:
            first: parameters of the first trials.
        """
        done = len(self.rows)
        waiting = self._study.get_trials(states=(self._optuna.trial.TrialState.WAITING,))
        if done < len(first) and not waiting:
            self._study.enqueue_trial(dict(first[done]))
        draws = np.random.SeedSequence([self._seed, done]).generate_state(1)
        # Other running trials are of processes that were killed: no reason to look elsewhere.
        self._study.sampler = self._optuna.samplers.TPESampler(seed=int(draws[0]), constant_liar=False)
        return self._study.ask()

    def is_behind(self, trial: optuna.Trial, rung: int, score: float) -> bool:
        """Record a trial's best score up to a rung; whether the better half of the others had better ones."""
        trial.report(score, rung)
        states = self._optuna.trial.TrialState
        finished = self._study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED))
        others = [other.intermediate_values[rung] for other in finished if rung in other.intermediate_values]
        return 2 * sum(other > score for other in others) >= len(others) + 1

    def chosen(self, prefer: Preference) -> TuneRow | None:
        """The trial that a training's own search would choose; None where none has scores."""
        trials = self._study.get_trials(deepcopy=False)
        scored = {one.number: one.user_attrs for one in trials if one.user_attrs.get(_PER_USER)}
        if not scored:
            return None
        known = {number: _as_searched(attrs[_ROW], attrs[_PER_USER]) for number, attrs in scored.items()}
        _, scores = chosen(list(known.values()), prefer)
        number = next(number for number, trial in known.items() if trial.best() is scores)
        row: TuneRow = scored[number][_ROW]
        return row

    def end(self, trial: optuna.Trial, row: TuneRow | None, per_user: Sequence[float] = ()) -> None:
        """Record how a trial ended.

        Args:
            trial: the trial.
            row: what came of it; None where it was not finished, and the next `ask` begins it again.
            per_user: the score of each validation user after the best epoch.
        """
        states = self._optuna.trial.TrialState
        if row is not None:
            trial.set_user_attr(_PER_USER, list(per_user))
            trial.set_user_attr(_ROW, row)
        if row is None or row["state"] == "failed":
            self._study.tell(trial, state=states.FAIL)
        elif row["state"] == "pruned":
            self._study.tell(trial, state=states.PRUNED)
        else:
            self._study.tell(trial, row["score"])


def load_optuna() -> ModuleType:
    """The library.

    Raises:
        FastTowerError: it is not installed.
    """
    try:
        optuna = importlib.import_module("optuna")
    except ImportError:
        raise FastTowerError(
            "tuning needs the library optuna, which is not installed; in the checkout,"
            " pip install -e '.[tune]'."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def best_of(rows: Sequence[TuneRow]) -> TuneRow | None:
    """The trial with the best score, the first of equals; None where none has scores."""
    scored = [row for row in rows if row["score"] is not None]
    return max(scored, key=lambda row: row["score"] or 0.0, default=None)


def _as_searched(row: TuneRow, per_user: Sequence[float]) -> Trial:
    """A trial as a training's own search has it, with the scores of its best epoch."""
    assert row["best_epoch"] is not None  # it has scores
    assert row["coverage"] is not None
    users = torch.arange(len(per_user))  # the same ones in all trials
    scores = Scores(row["best_epoch"], users, torch.tensor(per_user, dtype=torch.float64), row["coverage"])
    return Trial(Candidate(**{name: row["fields"][name] for name in Candidate._fields}), [[scores]])


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The first field in which two studies differ, in words."""
    for name in dict.fromkeys([*here, *there]):
        if there.get(name) != here.get(name):
            before, now = (about.get(name, "left open") for about in (there, here))
            return f"{name} is {before}, and {now} here"
    return None
