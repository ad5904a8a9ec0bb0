"""The schedule of a training: which phase comes next, given how those before it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fasttower.config import Preference, TrainingConfig
from fasttower.training.search import Candidate, Scores, Search, Trial, chosen, merged

PhaseName = Literal["search", "refit", "train", "update"]


@dataclass(frozen=True)
class Phase:
    """A model trained for some epochs.

    Attributes:
        name: what it is for.
        seed: of every draw.
        epochs: passes over the part that it trains on, those of earlier phases that it goes on from included.
        cut: the validation cut whose earlier rows it trains on, from 0; None for all rows of fit.
        candidate: the settings; None for those of the configuration.
        begins_after: epochs that an earlier phase of the same candidate has trained it for; 0 to begin from
            the initial vectors.
    """

    name: PhaseName
    seed: int
    epochs: int
    cut: int | None = None
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
        scores: of its epochs that were scored.
        seconds: that it took.
        diverged: whether it ended because the loss or a parameter ceased to be finite.
    """

    phase: Phase
    scores: tuple[Scores, ...] = ()
    seconds: float = 0.0
    diverged: bool = False


@dataclass(frozen=True)
class Plan:
    """The phases of a training, seed by seed.

    With a search there are "search" phases on train, until it is over; then "refit" trains the settings that
    were chosen from scratch, for as many epochs as were best. Otherwise there is one phase.

    Attributes:
        seeds: one model per seed.
        epochs: of the one phase where nothing is searched for.
        search: among which settings; None where there is nothing to choose, or no validation part to do it.
        prefer: how to choose.
        cuts: validation cuts that each candidate is trained and scored on.
        refit: whether the model is trained on all rows of fit in the end; else on those before the first cut.
        name: of the one phase where nothing is searched for.
    """

    seeds: Sequence[int]
    epochs: int = 1
    search: Search | None = None
    prefer: Preference = "balanced"
    cuts: int = 1
    refit: bool = True
    name: PhaseName = "train"

    @staticmethod
    def of(config: TrainingConfig, num_items: int, cuts: int) -> Plan:
        """The plan of a configuration, for data with some validation cuts, or 0."""
        seeds = range(config.seed, config.seed + config.seeds)
        if not cuts or (config.search == "none" and config.epochs is not None):
            epochs = config.resolved(0, num_items).epochs
            return Plan(seeds, epochs, cuts=cuts, refit=config.refit or not cuts)
        search = Search.of(config, num_items)
        return Plan(seeds, search=search, prefer=config.prefer, cuts=cuts, refit=config.refit)

    def next_phase(self, outcomes: Sequence[Outcome]) -> Phase | None:
        """The phase to go through now; None when all are done.

        Args:
            outcomes: of all phases so far, in the plan's order.
        """
        for seed in self.seeds:
            done = [outcome for outcome in outcomes if outcome.phase.seed == seed]
            if self.search is None and not done:
                return Phase(self.name, seed, self.epochs, self._last_cut)
            if self.search is not None and not (done and done[-1].phase.name == "refit"):
                return self._next_search(self.search, seed, done)
        return None

    @property
    def cuts_read(self) -> int:
        """The number of validation cuts whose rows are read."""
        return self.cuts if self.search is not None else 0 if self.refit else 1

    @property
    def _last_cut(self) -> int | None:
        """The part that the model is trained on in the end."""
        return None if self.refit else 0

    def _next_search(self, search: Search, seed: int, done: Sequence[Outcome]) -> Phase:
        """The next phase of a seed with a search, the refit if that is over."""
        trials = trials_of(done, self.cuts)
        found = search.next(trials)
        if found is None:
            candidate, scores = chosen(trials, self.prefer)
            return Phase("refit", seed, scores.epoch, self._last_cut, candidate)
        candidate, rung = found
        epochs = search.epochs(candidate, rung)
        cut = sum(one.phase.candidate == candidate and one.phase.epochs == epochs for one in done)
        begins_after = search.epochs(candidate, rung - 1) if rung else 0
        return Phase("search", seed, epochs, cut, candidate, begins_after)


def trials_of(outcomes: Sequence[Outcome], cuts: int) -> list[Trial]:
    """The trials of one seed's search, in the order in which they were begun, as far as all cuts are done."""
    by_candidate: dict[Candidate, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.phase.candidate is not None and outcome.phase.searches:
            by_candidate.setdefault(outcome.phase.candidate, []).append(outcome)
    trials = []
    for candidate, of in by_candidate.items():
        rungs, diverged = [], of[-1].diverged
        sound = of[:-1] if diverged else of
        for first in range(0, len(sound) - cuts + 1, cuts):
            at_epochs = zip(*(outcome.scores for outcome in sound[first : first + cuts]), strict=True)
            rungs.append([merged(at_epoch) for at_epoch in at_epochs])
        if rungs or diverged:
            trials.append(Trial(candidate, rungs, sum(one.seconds for one in of), diverged))
    return trials
