"""The schedule of a training: which phase comes next, given how those before it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fasttower.config import TrainingConfig

PhaseName = Literal["choose", "refit", "train", "update"]


@dataclass(frozen=True)
class Phase:
    """A model trained from its initial vectors for some epochs.

    Attributes:
        name: what it is for.
        seed: of every draw.
        l2: the weight of the L2 term.
        epochs: passes over the part that it trains on.
    """

    name: PhaseName
    seed: int
    l2: float
    epochs: int

    @property
    def chooses(self) -> bool:
        """Whether its epochs are scored on the validation part and the best one counts, not the last."""
        return self.name == "choose"

    @property
    def part(self) -> Literal["train", "fit"]:
        """The part of the data that it trains on."""
        return "train" if self.chooses else "fit"


@dataclass(frozen=True)
class Outcome:
    """How a phase ended.

    Attributes:
        phase: the phase.
        epoch: the epoch that counts, from 1.
        score: the validation metric after that epoch, the larger the better; only where the phase chooses.
    """

    phase: Phase
    epoch: int
    score: float = 0.0


@dataclass(frozen=True)
class Plan:
    """The phases of a training, seed by seed.

    With a validation part to choose on, a "choose" phase per L2 on train gives the L2 and the epoch with the
    best score (the first of equals), then "refit" trains from scratch on fit with that L2 for that many
    epochs. Otherwise there is one phase on fit with the first L2.

    Attributes:
        seeds: one model per seed.
        l2: the candidates.
        epochs: of each phase but "refit".
        choose: whether there is a validation part to choose on.
        refit: whether "refit" follows "choose"; without it the best epoch's model counts.
        name: of the one phase where there is nothing to choose on.
    """

    seeds: Sequence[int]
    l2: tuple[float, ...]
    epochs: int
    choose: bool = False
    refit: bool = False
    name: PhaseName = "train"

    @staticmethod
    def of(config: TrainingConfig, *, validated: bool) -> Plan:
        """The plan of a configuration, for data with or without a validation part."""
        seeds = range(config.seed, config.seed + config.seeds)
        return Plan(seeds, config.l2, config.epochs, choose=validated, refit=validated and config.refit)

    def next_phase(self, outcomes: Sequence[Outcome]) -> Phase | None:
        """The phase to go through now; None when all are done.

        Args:
            outcomes: of all phases so far, in the plan's order.
        """
        for seed in self.seeds:
            done = [outcome for outcome in outcomes if outcome.phase.seed == seed]
            if not self.choose and not done:
                return Phase(self.name, seed, self.l2[0], self.epochs)
            if self.choose and len(done) < len(self.l2):
                return Phase("choose", seed, self.l2[len(done)], self.epochs)
            if self.refit and len(done) == len(self.l2):
                best = max(done, key=lambda outcome: outcome.score)
                return Phase("refit", seed, best.phase.l2, best.epoch)
        return None
