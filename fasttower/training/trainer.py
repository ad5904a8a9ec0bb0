"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor

from fasttower.config import TrainingConfig
from fasttower.device import deterministic_kernels
from fasttower.errors import TrainingError
from fasttower.model import TwoTower
from fasttower.training.validation import Validation
from fasttower_kernels.backends import choose_backend
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.sampled_bce import LossSettings
from fasttower_kernels.tables import Interactions
from fasttower_kernels.train_steps import StepSettings, TrainState, run_steps, steps_per_epoch

# Positives between two looks at the progress callback and at the stop signal, on a CPU.
_TICK_POSITIVES = 1 << 18

# Products of two larger ones may not be summed in float32.
_LARGEST_PARAMETER = 1e15


@dataclass(frozen=True)
class EpochRecord:
    """One line of a run's history.

    Attributes:
        phase: "choose", "refit", "train" or "update".
        l2: the weight of the L2 term.
        epoch: from 1.
        step: training steps done so far.
        train_loss: mean BCE of the epoch.
        valid_loss: mean BCE of the validation part after the epoch; None without one.
        valid: ranking metrics of the validation part after the epoch.
        epoch_s: seconds of training alone.
        positives_per_s: of training alone.
        elapsed_s: seconds since the phase began, validation included.
    """

    phase: str
    l2: float
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

    def on_progress(self, phase: str, epoch: int, epochs: int, done: int, total: int) -> None:
        """Called every so often with the epoch from 1 and the positives done, and to do, in the phase."""

    def on_epoch(self, record: EpochRecord) -> None:
        """Called after each epoch."""

    def should_stop(self) -> bool:
        """Asked every so often; True ends the training there."""
        return False


def train(
    model: TwoTower,
    interactions: Interactions,
    known_positives: KnownPositives,
    config: TrainingConfig,
    *,
    l2: float,
    epochs: int,
    phase: str = "train",
    validation: Validation | None = None,
    observer: Observer = Observer(),  # noqa: B008 - it has no state
    after_epoch: Callable[[EpochRecord], None] = lambda _: None,
) -> list[EpochRecord]:
    """Train a model in place.

    Args:
        model: on the device where training happens.
        interactions: the n positives, on the same device.
        known_positives: of the same part; left out of the negatives if the configuration says so.
        config: of the loss, the optimiser and the batches.
        l2: the weight of the L2 term, one of the configuration's.
        epochs: passes over the interactions.
        phase: the name that the records carry.
        validation: what to watch after each epoch.
        observer: progress and the stop signal.
        after_epoch: called after each epoch with its record, before the next one changes the model.

    Returns:
        The record of each epoch that ended.

    Raises:
        TrainingError: the loss or a parameter is not finite, or beyond all use.
    """
    num_rows = len(interactions)
    batch_size = config.resolved(num_rows).batch_size
    assert batch_size is not None  # it is resolved
    loss = LossSettings(config.num_negatives, l2, config.loss_scale)
    settings = StepSettings(
        loss, config.learning_rate, batch_size, config.seed, config.optimiser, config.table_dtype
    )
    excluded = known_positives if config.exclude_known_positives else None
    state = TrainState.start(model.tables)
    per_epoch = steps_per_epoch(num_rows, batch_size)
    device = interactions.user_index.device
    tick = per_epoch if device.type == "cuda" else max(1, _TICK_POSITIVES // batch_size)
    backend, _ = choose_backend(config.backend, device)

    records: list[EpochRecord] = []
    began = time.perf_counter()
    for epoch in range(epochs):
        epoch_began = time.perf_counter()
        bce: float | Tensor = 0.0
        for batch in range(0, per_epoch, tick):
            with deterministic_kernels(backend, device) if config.deterministic else nullcontext():
                bce += run_steps(
                    state,
                    interactions,
                    excluded,
                    settings,
                    first_step=epoch * per_epoch + batch,
                    num_steps=min(tick, per_epoch - batch),
                    backend=config.backend,
                )
            done = epoch * num_rows + min(num_rows, (batch + tick) * batch_size)
            observer.on_progress(phase, epoch + 1, epochs, done, epochs * num_rows)
            if observer.should_stop() and batch + tick < per_epoch:
                return records
        train_loss = float(bce) / (num_rows * loss.pairs)  # waits for the device
        epoch_s = time.perf_counter() - epoch_began
        # The loss was taken before the last updates, which may have been the ones that broke the tables.
        largest = max(float(table.abs().max()) for table in model.tables)
        if not (math.isfinite(train_loss) and largest < _LARGEST_PARAMETER):
            raise TrainingError(
                f"the training diverged in epoch {epoch + 1} (loss {train_loss:g}, largest parameter "
                f"{largest:g}); try a --learning-rate below {config.learning_rate:g}."
            )
        record = EpochRecord(
            phase=phase,
            l2=l2,
            epoch=epoch + 1,
            step=(epoch + 1) * per_epoch,
            train_loss=train_loss,
            valid_loss=validation.loss(model, loss, excluded, seed=config.seed, backend=config.backend)
            if validation
            else None,
            valid=validation.metrics(model) if validation else {},
            epoch_s=epoch_s,
            positives_per_s=num_rows / epoch_s,
            elapsed_s=time.perf_counter() - began,
        )
        records.append(record)
        after_epoch(record)
        observer.on_epoch(record)
        if observer.should_stop():
            break
    return records
