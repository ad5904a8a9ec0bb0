"""The trainer: goes through a plan's phases, a call of the training step at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from fasttower.config import ResolvedTrainingConfig, TrainingConfig
from fasttower.errors import TrainingError
from fasttower.model import TwoTower
from fasttower.training.data import Cut, TrainingData
from fasttower.training.observer import EpochRecord, Observer
from fasttower.training.plan import Outcome, Phase, Plan, trials_of
from fasttower.training.search import Candidate, Scores, Trial, is_scored
from fasttower.training.spectral import spectral_vectors
from fasttower.training.state import BestEpoch, Paused, Progress, TrainerState
from fasttower.training.validation import Validation
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.settings import StepSettings
from fasttower_kernels.step import Step, TrainState, steps_per_epoch
from fasttower_kernels.tables import Interactions

# Positives between two looks at the progress callback and at the stop signal, on a CPU.
_TICK_POSITIVES = 1 << 18

# Of an initial spectral vector, beside that of the random vector that is added to it.
_SPECTRAL_LENGTH = 3.0

# Products of two larger ones may not be summed in float32.
_LARGEST_PARAMETER = 1e15


@dataclass(frozen=True)
class TrainedModel:
    """A model and how it was trained.

    Attributes:
        model: the trained model.
        settings: that it was trained with: the configuration's and those that the validation part chose.
        history: the record of every epoch, of all phases.
        trials: what was searched, in the order in which it was begun; none without a validation part.
        best_epoch: the number of epochs that was chosen; the last one without a validation part.
        interrupted: whether the stop signal ended training early.
    """

    model: TwoTower
    settings: ResolvedTrainingConfig
    history: list[EpochRecord]
    trials: list[Trial]
    best_epoch: int
    interrupted: bool


class _PhaseStep:
    """The training step of a phase.

    Attributes:
        state: what it updates.
        interactions: the n positives.
        negatives: of the same part.
        settings: of the loss, the optimiser and the batches.
        per_epoch: S, steps per epoch.
        tick: steps per call, if the epoch has as many left. With lazy Adam the ends of calls show in the last
            bits, so the clock has no say in them.
    """

    def __init__(
        self,
        state: TrainState,
        interactions: Interactions,
        negatives: Negatives,
        settings: StepSettings,
        config: TrainingConfig,
    ) -> None:
        self.state = state
        self.interactions = interactions
        self.negatives = negatives
        self.settings = settings
        self.per_epoch = steps_per_epoch(len(interactions), settings.batch_size)
        on_gpu = interactions.user_index.device.type == "cuda"
        self.tick = self.per_epoch if on_gpu else max(1, _TICK_POSITIVES // settings.batch_size)
        self._step = Step(state, interactions, negatives, settings, backend=config.backend)

    def run(self, first: int, count: int) -> float:
        """Train for some steps of one epoch; returns the sum of their losses, without L2."""
        return float(self._step.run(first, count))  # waits for the device

    def mean(self, value: float) -> float:
        """The loss of an epoch, from the sum over its positives."""
        return value / self.settings.loss.divisor(len(self.interactions), self.settings.negatives.scored)


class _Cut(NamedTuple):
    """A validation cut as training reads it.

    Attributes:
        training: the rows before the cut, and their known positives.
        validation: those after it.
    """

    training: tuple[Interactions, KnownPositives]
    validation: Validation

    @staticmethod
    def of(cut: Cut, known: KnownPositives, config: TrainingConfig) -> _Cut:
        pairs = cut.train.user_index, cut.train.item_index
        seen = KnownPositives.from_pairs(*pairs, known.num_users, known.num_items)
        validation = Validation.of(cut.valid, seen, config.k, filter_seen=config.filter_seen)
        return _Cut((cut.train, seen), validation)


class Trainer:
    """Trains a plan's models, one per seed.

    Each phase is trained by calls of the step. Between two calls, `progress` and the tables are all that is
    needed to go on, and the observer may stop the training.

    Args:
        data: on the device where training happens.
        config: of the model, the loss, the optimiser and the batches; what it leaves open is searched for.
        plan: the phases; by default those of the configuration.
        model: what every phase trains, in place; by default each phase begins with a new one.
        observer: progress and the stop signal.

    Attributes:
        progress: how far it has come.
        model: of the current or the last phase; None before the first.
    """

    def __init__(
        self,
        data: TrainingData,
        config: TrainingConfig,
        *,
        plan: Plan | None = None,
        model: TwoTower | None = None,
        observer: Observer = Observer(),  # noqa: B008 - it has no state
    ) -> None:
        self.config = config
        known = data.known_positives
        self.plan = plan or Plan.of(config, known.num_items, len(data.cuts))
        self.observer = observer
        self.progress = Progress()
        self.model = model
        self._given_model = model
        self._step: _PhaseStep | None = None  # None between phases
        self._next: tuple[int, Phase | None] | None = None  # after so many outcomes
        # On the CPU: those of a long search would fill a GPU.
        self._paused: dict[Paused, list[Tensor]] = {}  # of the current seed's search
        # By cut and dimension, on the device; likewise.
        self._spectral: dict[tuple[int | None, int], tuple[Tensor, Tensor]] = {}
        self._fit = data.fit, known
        self._cuts = [_Cut.of(cut, known, config) for cut in data.cuts[: self.plan.cuts_read]]

    @property
    def phase(self) -> Phase | None:
        """The phase to go on with; None when all are done."""
        done = len(self.progress.outcomes)
        if self._next is None or self._next[0] != done:
            self._next = done, self.plan.next_phase(self.progress.outcomes)
        return self._next[1]

    def train(self) -> TrainedModel:
        """Train the model of the next seed, to the end of its phases or to the stop signal.

        After a stop signal it is the best epoch's model so far, also when the signal comes in the refit, or
        the model as it is where no epoch has been scored. Another call goes on from there.

        Raises:
            TrainingError: the loss or a parameter is not finite, or too large to go on with.
        """
        seed, stopped = self.plan.seeds[self.progress.seeds_done], False
        if len(self.plan.seeds) > 1:
            self.observer.on_seed(seed)
        while (phase := self.phase) is not None and phase.seed == seed and not stopped:
            self.advance()
            stopped = self.observer.should_stop()
        trained = self._trained(interrupted=stopped)
        if phase is None or phase.seed != seed:
            self.progress = Progress(self.progress.seeds_done + 1, self.progress.outcomes)
            self.model = None
            self._paused.clear()
        return trained

    def advance(self) -> None:
        """Train to the next tick: one call of the step, and what is due where an epoch or a phase ends."""
        phase, progress = self.phase, self.progress
        assert phase is not None  # else there is nothing left to train
        step = self._step = self._step or self._begin(phase)
        began = time.perf_counter()
        count = min(step.tick, step.per_epoch - progress.step % step.per_epoch)
        progress.loss += step.run(progress.step, count)
        progress.step += count
        epoch, rest = divmod(progress.step, step.per_epoch)
        num_rows, ended = len(step.interactions), rest == 0
        done = epoch * num_rows + rest * step.settings.batch_size
        number = epoch if ended else epoch + 1
        self.observer.on_progress(phase.name, number, phase.epochs, done, phase.epochs * num_rows)
        progress.epoch_s += time.perf_counter() - began
        progress.phase_s += time.perf_counter() - began
        if ended:
            diverged = not self._end_epoch(phase, step, epoch)
            if diverged or epoch == phase.epochs:
                self._end_phase(phase, diverged=diverged)

    def _begin(self, phase: Phase, tables: list[Tensor] | None = None) -> _PhaseStep:
        """The model and the training step of a phase, with the tables of a state to go on from."""
        config = self.settings(phase)
        if not phase.searches:
            self._paused.clear()
            self._spectral.clear()
        interactions, known = self._fit if phase.cut is None else self._cuts[phase.cut].training
        if phase.begins_after and tables is None:
            assert phase.candidate is not None  # only a search goes on
            tables = self._paused.pop((phase.candidate, phase.cut))
        if tables is None:
            self.model = self._given_model or self._new_model(config, phase, known)
            state = TrainState.start(self.model.tables)
        else:
            self.model = self._given_model or self._empty_model(config)
            state = TrainState.start(self.model.tables)
            _copy(tables, _parts(state))
        negatives = Negatives.of(
            config.negative_settings,
            interactions,
            known.num_users,
            known.num_items,
            known if config.exclude_known_positives else None,
        )
        settings = StepSettings(
            config.learning_rate,
            config.batch_size,
            phase.seed,
            config.loss_settings,
            negatives.settings,
            config.optimiser,
            config.table_dtype,
            config.deterministic,
        )
        step = _PhaseStep(state, interactions, negatives, settings, config)
        self.progress.step = max(self.progress.step, phase.begins_after * step.per_epoch)
        self.observer.on_phase(phase.name, str(Candidate.of(config)), phase.epochs)
        return step

    def settings(self, phase: Phase) -> ResolvedTrainingConfig:
        """The configuration with which a phase trains."""
        fit, known = self._fit
        chosen = {} if phase.candidate is None else phase.candidate._asdict()
        return self.config.resolved(len(fit), known.num_items, **chosen, epochs=phase.epochs)

    def _new_model(self, config: ResolvedTrainingConfig, phase: Phase, known: KnownPositives) -> TwoTower:
        """A model as a phase begins with it; what is known are the positives that it trains on."""
        model = self._empty_model(config)
        model.initialise(phase.seed, config.init_scale)
        if config.initial_vectors == "spectral":
            key = phase.cut, config.embedding_dim
            directions = self._spectral.get(key) or spectral_vectors(known, config.embedding_dim, phase.seed)
            if phase.searches:  # other candidates begin there too
                self._spectral[key] = directions
            length = _SPECTRAL_LENGTH * config.init_scale * math.sqrt(config.embedding_dim)
            model.add_directions(*directions, length)
        return model

    def _empty_model(self, config: ResolvedTrainingConfig) -> TwoTower:
        """A model of zeros, on the device of the data."""
        _, known = self._fit
        model = TwoTower(
            known.num_users,
            known.num_items,
            config.embedding_dim,
            item_bias=config.item_bias,
            temperature=config.loss_settings.norm_temperature,
        )
        return model.to(known.items.device)

    def _end_epoch(self, phase: Phase, step: _PhaseStep, epoch: int) -> bool:
        """Score the model where the phase chooses, and record the epoch; False if the training diverged.

        Raises:
            TrainingError: it diverged, and nothing else is to be tried.
        """
        progress, num_rows = self.progress, len(step.interactions)
        train_loss = step.mean(progress.loss)
        # The loss was taken before the last updates, which may have been the ones that broke the tables.
        largest = [float(table.abs().max()) for table in step.state.parameters]
        broken = [value for value in largest if not value < _LARGEST_PARAMETER]  # as NaN is not
        if broken or not math.isfinite(train_loss):
            if phase.searches and self.plan.search is not None and self.plan.search.opens:
                return False  # others may do better
            settings = Candidate.of(self.settings(phase))
            raise TrainingError(
                f"the training diverged in epoch {epoch} of {settings} (loss {train_loss:g}, largest "
                f"parameter {max(broken or largest):g}); try a --learning-rate below "
                f"{self.config.learning_rate:g}."
            )
        began = time.perf_counter()
        valid_loss, valid, scores = self._validate(phase, step, epoch)
        progress.phase_s += time.perf_counter() - began
        record = EpochRecord(
            phase=phase.name,
            settings=str(Candidate.of(self.settings(phase))),
            cut=phase.cut,
            epoch=epoch,
            step=progress.step,
            train_loss=train_loss,
            # It may overflow where the training loss does not.
            valid_loss=valid_loss if valid_loss is not None and math.isfinite(valid_loss) else None,
            valid=valid,
            epoch_s=progress.epoch_s,
            positives_per_s=num_rows / progress.epoch_s,
            elapsed_s=progress.phase_s,
        )
        if scores is not None:
            progress.scores.append(scores)
            first = phase.cut == 0  # scores on others are of other users
            if first and (progress.best is None or scores.mean > progress.best.score):
                tables = [table.clone() for table in step.state.parameters]
                progress.best = BestEpoch(phase, epoch, scores.mean, tables)
        progress.history.append(record)
        progress.loss = progress.epoch_s = 0.0
        self.observer.on_epoch(record)
        return True

    def _validate(
        self, phase: Phase, step: _PhaseStep, epoch: int
    ) -> tuple[float | None, dict[str, float], Scores | None]:
        """The validation loss, metrics and scores of the model; none where the epoch is not scored."""
        if not (phase.searches and is_scored(epoch, phase.epochs)):
            return None, {}, None
        assert phase.cut is not None
        assert self.model is not None  # it is there within a phase
        validation = self._cuts[phase.cut].validation
        loss = validation.loss(
            self.model, step.settings.loss, step.negatives, seed=phase.seed, backend=self.config.backend
        )
        metrics, ndcg = validation.metrics(self.model)
        coverage = metrics[f"Coverage@{self.config.k}"]
        return loss, metrics, Scores(epoch, validation.users.cpu(), ndcg, coverage)

    def _end_phase(self, phase: Phase, *, diverged: bool) -> None:
        """Record the outcome of a phase; the next step begins the next one."""
        progress, step = self.progress, self._step
        outcome = Outcome(phase, tuple(progress.scores), progress.phase_s, diverged)
        progress.outcomes.append(outcome)
        if phase.searches:
            assert step is not None
            assert phase.candidate is not None
            assert self.plan.search is not None
            if phase.epochs < self.plan.search.most_epochs and not diverged:
                self._paused[phase.candidate, phase.cut] = [part.cpu() for part in _parts(step.state)]
            for cut in range(self.plan.cuts if diverged else 0):
                self._paused.pop((phase.candidate, cut), None)  # it does not go on
        else:
            progress.best = None  # the model as it is counts
        progress.step, progress.phase_s, progress.scores, self._step = 0, 0.0, [], None
        progress.loss = progress.epoch_s = 0.0
        if phase.searches and (diverged or phase.cut == self.plan.cuts - 1):
            trials = trials_of(
                [one for one in progress.outcomes if one.phase.seed == phase.seed], self.plan.cuts
            )
            self.observer.on_trial(next(trial for trial in trials if trial.candidate == phase.candidate))

    def _trained(self, *, interrupted: bool) -> TrainedModel:
        """The current seed's model as it stands."""
        progress, model, best = self.progress, self.model, self.progress.best
        seed = self.plan.seeds[progress.seeds_done]
        history = list(progress.history)
        done = [outcome for outcome in progress.outcomes if outcome.phase.seed == seed]
        trials = trials_of(done, self.plan.cuts)
        assert model is not None  # a step has been run
        if best is None:
            if self._step is None and done[-1].diverged:
                raise TrainingError("the training diverged before any settings were scored.")
            phase = self.phase if self._step is not None else done[-1].phase
            assert phase is not None
            epoch = history[-1].epoch if history else 0
        else:
            phase, epoch = best.phase, best.epoch
            model = self._empty_model(self.settings(phase))
            _copy(best.tables, model.tables)
        # What trains the same model again: on the validation part, this is the best epoch of those up to it.
        settings = replace(self.settings(phase), epochs=max(epoch, 1), search="none")
        return TrainedModel(model, settings, history, trials, epoch, interrupted)

    def state(self) -> TrainerState:
        """A copy of all that is needed to go on."""
        tables = [table.clone() for table in self._tables()]
        return TrainerState(self.progress.copy(), tables, dict(self._paused))

    def load(self, state: TrainerState) -> None:
        """Go on from the state of a trainer of the same data, configuration and plan."""
        self.progress = state.progress.copy()
        self.model, self._step, self._next = self._given_model, None, None
        self._spectral.clear()
        phase = self.phase
        self._paused = dict(state.paused)
        if phase is not None and self.progress.step:
            self._step = self._begin(phase, state.tables)
        elif state.tables:
            if self.model is None:
                self.model = self._empty_model(self.settings(self.progress.outcomes[-1].phase))
            _copy(state.tables, self.model.tables)

    def _tables(self) -> list[Tensor]:
        """What a `TrainerState` holds of the current model, in its order."""
        if self._step is not None:
            return _parts(self._step.state)
        return [] if self.model is None else list(self.model.tables)


def _copy(values: Sequence[Tensor], tables: Iterable[Tensor]) -> None:
    for table, value in zip(tables, values, strict=True):
        table.copy_(value)


def _parts(state: TrainState) -> list[Tensor]:
    return [*state.parameters, *state.moments_1, *state.moments_2]
