"""The schedule of a training: which phase comes next, given how those before it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fasttower.config import Preference, TrainingConfig
from fasttower.training.search import Candidate, Scores, Search, Trial, chosen

PhaseName = Literal["search", "refit", "train", "update"]


@dataclass(frozen=True)
class Phase:
    """A model trained for some epochs.

    Attributes:
        name: what it is for.
        seed: of every draw.
        epochs: passes over the part that it trains on, those of earlier phases that it goes on from included.
        part: of the data that it trains on.
        candidate: the settings; None for those of the configuration.
        begins_after: epochs that an earlier phase of the same candidate has trained it for; 0 to begin from
            the initial vectors.
    """

    name: PhaseName
    seed: int
    epochs: int
    part: Literal["train", "fit"] = "fit"
    candidate: Candidate | None = None
    begins_after: int = 0

    @property
    def searches(self) -> bool:
        """Whether its epochs are scored on the validation part and the best one counts, not the last."""
        return self.name == "search"


@dataclass(frozen=True)
class Outcome:
    """How a phase ended.

    Attributes:
        phase: the phase.
        scores: after its best epoch; None where nothing was scored.
        seconds: that it took.
    """

    phase: Phase
    scores: Scores | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """The phases of a training, seed by seed.

    With a search there are "search" phases on train, until it is over; then "refit" trains the settings that
    were chosen from scratch, for as many epochs as were best. Otherwise there is one phase on fit.

    Attributes:
        seeds: one model per seed.
        epochs: of the one phase where nothing is searched for.
        search: among which settings; None where there is no validation part to choose on.
        prefer: how to choose.
        refit_on: the part that the chosen settings are trained on.
        name: of the one phase where nothing is searched for.
    """

    seeds: Sequence[int]
    epochs: int = 1
    search: Search | None = None
    prefer: Preference = "balanced"
    refit_on: Literal["train", "fit"] = "fit"
    name: PhaseName = "train"

    @staticmethod
    def of(config: TrainingConfig, num_items: int, *, validated: bool) -> Plan:
        """The plan of a configuration, for data with or without a validation part."""
        seeds = range(config.seed, config.seed + config.seeds)
        if not validated:
            return Plan(seeds, config.resolved(0, num_items).epochs)
        search = Search.of(config, num_items)
        return Plan(seeds, search=search, prefer=config.prefer, refit_on="fit" if config.refit else "train")

    def next_phase(self, outcomes: Sequence[Outcome]) -> Phase | None:
        """The phase to go through now; None when all are done.

        Args:
            outcomes: of all phases so far, in the plan's order.
        """
        for seed in self.seeds:
            done = [outcome for outcome in outcomes if outcome.phase.seed == seed]
            if self.search is None and not done:
                return Phase(self.name, seed, self.epochs)
            if self.search is not None and not (done and done[-1].phase.name == "refit"):
                return self._next_search(self.search, seed, done)
        return None

    def _next_search(self, search: Search, seed: int, done: Sequence[Outcome]) -> Phase:
        """The next phase of a seed with a search, the refit if that is over."""
        trials = trials_of(done)
        found = search.next(trials)
        if found is None:
            best = chosen(trials, self.prefer)
            return Phase("refit", seed, best.best().epoch, self.refit_on, best.candidate)
        candidate, rung = found
        begins_after = search.epochs(candidate, rung - 1) if rung else 0
        return Phase("search", seed, search.epochs(candidate, rung), "train", candidate, begins_after)


def trials_of(outcomes: Sequence[Outcome]) -> list[Trial]:
    """The trials of one seed's search, in the order in which they were begun."""
    by_candidate: dict[Candidate, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.phase.candidate is not None and outcome.phase.searches:
            by_candidate.setdefault(outcome.phase.candidate, []).append(outcome)
    return [
        Trial(
            candidate,
            [one.scores for one in of if one.scores],
            sum(one.seconds for one in of),
            of[-1].phase.epochs,
        )
        for candidate, of in by_candidate.items()
    ]
