"""What a trainer tells while it runs, and the stop signal."""

from __future__ import annotations

from dataclasses import dataclass

from fasttower.training.search import Trial


@dataclass(frozen=True)
class EpochRecord:
    """One line of a run's history.

    Attributes:
        phase: "search", "refit", "train" or "update".
        settings: that the epoch was trained with, in words.
        cut: the validation cut whose earlier rows were trained on, from 0; None for all rows of fit.
        epoch: from 1.
        step: training steps done so far.
        train_loss: mean loss of the epoch.
        valid_loss: mean loss of the validation part after the epoch; None where it was not scored.
        valid: ranking metrics of the validation part after the epoch; none where it was not scored.
        epoch_s: seconds of training, without validation.
        positives_per_s: of training, without validation.
        elapsed_s: seconds since the phase began, validation included.
    """

    phase: str
    settings: str
    cut: int | None
    epoch: int
    step: int
    train_loss: float
    valid_loss: float | None
    valid: dict[str, float]
    epoch_s: float
    positives_per_s: float
    elapsed_s: float


class Observer:
    """What the trainer tells and asks while it runs; silent as it is, every method may be overridden."""

    def on_seed(self, seed: int) -> None:
        """Called before each seed's training where there are several."""

    def on_progress(self, phase: str, epoch: int, epochs: int, done: int, total: int) -> None:
        """Called every so often with the epoch from 1 and the positives done, and to do, in the phase."""

    def on_epoch(self, record: EpochRecord) -> None:
        """Called after each epoch."""

    def on_phase(self, phase: str, settings: str, epochs: int) -> None:
        """Called when a phase begins, with its settings in words and the epochs up to which it trains."""

    def on_trial(self, trial: Trial) -> None:
        """Called when a candidate of a search has been trained further, on all cuts."""

    def should_stop(self) -> bool:
        """Asked every so often; True ends the training there."""
        return False
