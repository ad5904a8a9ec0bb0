"""What a trainer holds between two calls of the step, and what is copied of it to go on elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from fasttower.training.observer import EpochRecord
from fasttower.training.plan import Outcome, Phase
from fasttower.training.search import Candidate, Scores

Paused = tuple[Candidate, int | None]
"""A candidate, and the cut that it was trained on."""


@dataclass(frozen=True)
class BestEpoch:
    """The epoch with the best validation score so far, and copies of the model's tables after it."""

    phase: Phase
    epoch: int
    score: float
    tables: list[Tensor]


@dataclass
class Progress:
    """How far a trainer has come.

    Attributes:
        seeds_done: models that `Trainer.train` has returned whole.
        outcomes: of the phases that have ended, of all seeds.
        history: the epochs of the current seed.
        scores: of the current phase.
        best: of the current seed's epochs; None once a phase has ended whose last epoch counts.
        step: steps done in the current phase.
        loss: summed over the positives of the current epoch so far, without L2.
        epoch_s: seconds since the current epoch began.
        phase_s: seconds since the current phase began.
    """

    seeds_done: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    history: list[EpochRecord] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)
    best: BestEpoch | None = None
    step: int = 0
    loss: float = 0.0
    epoch_s: float = 0.0
    phase_s: float = 0.0

    def copy(self) -> Progress:
        """A copy that going on leaves as it is."""
        return replace(
            self, outcomes=list(self.outcomes), history=list(self.history), scores=list(self.scores)
        )


@dataclass(frozen=True)
class TrainerState:
    """All that a trainer needs to go on between two calls of the step, as plain data and copied tensors.

    Attributes:
        progress: how far it has come.
        tables: the model's parameters and, within a phase, Adam's first and second moments of each.
        paused: the same of the candidates that the search may go on with.
    """

    progress: Progress
    tables: list[Tensor]
    paused: dict[Paused, list[Tensor]] = field(default_factory=dict)
