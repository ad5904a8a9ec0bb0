"""Two phases: choose L2 and the epochs on the validation part, then refit on all before the test cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fasttower.config import TrainingConfig
from fasttower.model import TwoTower
from fasttower.training.trainer import EpochRecord, Observer, train
from fasttower.training.validation import Validation
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.tables import Interactions


@dataclass(frozen=True)
class TrainingData:
    """The parts that training sees, as dense indices on one device.

    Attributes:
        fit: everything before the test cut.
        train: fit's rows before the validation cut; not read without a validation part.
        valid: the validation pairs, or None.
        known_positives: of fit.
    """

    fit: Interactions
    train: Interactions
    valid: Interactions | None
    known_positives: KnownPositives

    def to(self, device: torch.device) -> TrainingData:
        """The same parts on another device."""
        valid = None if self.valid is None else self.valid.to(device)
        return TrainingData(
            self.fit.to(device), self.train.to(device), valid, self.known_positives.to(device)
        )


@dataclass(frozen=True)
class TrainedModel:
    """A model and how it came about.

    Attributes:
        model: the trained model.
        history: the record of every epoch, of both phases.
        l2: the weight of the L2 term that the validation part chose; the first one without a validation part.
        best_epoch: the epoch that it chose; the last one without a validation part.
        interrupted: whether the stop signal ended training early.
    """

    model: TwoTower
    history: list[EpochRecord]
    l2: float
    best_epoch: int
    interrupted: bool


def train_model(
    data: TrainingData,
    config: TrainingConfig,
    *,
    k: int,
    refit: bool,
    filter_seen: bool = True,
    observer: Observer = Observer(),  # noqa: B008 - it has no state
) -> TrainedModel:
    """Train a two-tower model, L2 and the epochs chosen on the validation part where there is one.

    Phase "choose" trains on ``train``, once for each L2 of the configuration, and takes the L2 and the epoch
    with the best validation NDCG@k (the first of equals); phase "refit" trains from scratch on ``fit`` with
    that L2 for that many epochs. Without ``refit`` the best epoch's model is kept. Without a validation part
    there is one phase, "train", on ``fit`` with the first L2, and its last epoch counts. A stop signal keeps
    the best epoch's model so far, also when it comes in the refit, or the model as it is where no epoch has
    ended.

    Raises:
        TrainingError: the loss is not finite.
    """
    config = config.resolved(len(data.fit))  # both phases share what depends on the size
    known = data.known_positives
    history: list[EpochRecord] = []
    if data.valid is None:
        model = _new_model(data, config)
        l2 = config.l2[0]
        history = train(model, data.fit, known, config, l2=l2, epochs=config.epochs, observer=observer)
        return TrainedModel(model, history, l2, len(history), observer.should_stop())

    seen = KnownPositives.from_pairs(
        data.train.user_index, data.train.item_index, known.num_users, known.num_items
    )
    validation = Validation.of(data.valid, seen, k, filter_seen=filter_seen)
    best: EpochRecord | None = None
    best_tables: list[torch.Tensor] = []

    def keep_best(record: EpochRecord) -> None:
        nonlocal best, best_tables
        metric = f"NDCG@{k}"
        if best is None or record.valid[metric] > best.valid[metric]:
            best, best_tables = record, [table.clone() for table in model.tables]

    for l2 in config.l2:
        model = _new_model(data, config)
        history += train(
            model,
            data.train,
            seen,
            config,
            l2=l2,
            epochs=config.epochs,
            phase="choose",
            validation=validation,
            observer=observer,
            after_epoch=keep_best,
        )
        if observer.should_stop():
            break
    if best is None:
        return TrainedModel(model, history, l2, 0, interrupted=True)
    if refit and not observer.should_stop():
        refitted = _new_model(data, config)
        records = train(
            refitted, data.fit, known, config, l2=best.l2, epochs=best.epoch, phase="refit", observer=observer
        )
        history += records
        if len(records) == best.epoch:
            return TrainedModel(refitted, history, best.l2, best.epoch, observer.should_stop())
    for table, values in zip(model.tables, best_tables, strict=True):
        table.copy_(values)
    return TrainedModel(model, history, best.l2, best.epoch, observer.should_stop())


def _new_model(data: TrainingData, config: TrainingConfig) -> TwoTower:
    known = data.known_positives
    assert config.init_scale is not None  # it is resolved
    model = TwoTower(known.num_users, known.num_items, config.embedding_dim, item_bias=config.item_bias)
    return model.initialise(config.seed, config.init_scale).to(known.items.device)
