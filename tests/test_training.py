"""The training loop and the choice of the epoch."""

import dataclasses
import importlib.util
import math

import pytest
import torch

from fasttower.config import TrainingConfig
from fasttower.errors import TrainingError
from fasttower.model import TwoTower
from fasttower.training import trainer as trainer_module
from fasttower.training.data import Cut, TrainingData
from fasttower.training.observer import Observer
from fasttower.training.plan import Plan
from fasttower.training.spectral import spectral_vectors
from fasttower.training.trainer import Trainer
from fasttower.training.validation import Validation
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.settings import LossSettings, NegativeSettings
from fasttower_kernels.step import loss_sum
from fasttower_kernels.tables import Interactions

NUM_USERS, NUM_ITEMS = 30, 40
BACKENDS = [
    "torch",
    pytest.param(
        "numba",
        marks=pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="numba is not installed"),
    ),
]
CONFIG = TrainingConfig(
    embedding_dim=4,
    batch_size=64,
    epochs=4,
    learning_rate=0.05,
    l2=0.03,
    k=5,
    backend="torch",
    prefer="accuracy",
)


def config_with(**fields):
    return dataclasses.replace(CONFIG, **fields)


def train(data, config, **options):
    return Trainer(data, config, **options).train()


@pytest.fixture
def data():
    """Users like items of their own parity: something to learn."""
    generator = torch.Generator().manual_seed(0)
    users = torch.randint(NUM_USERS, (600,), generator=generator, dtype=torch.int32)
    items = torch.randint(NUM_ITEMS // 2, (600,), generator=generator, dtype=torch.int32) * 2 + users % 2
    known = KnownPositives.from_pairs(users, items, NUM_USERS, NUM_ITEMS)
    train_rows, valid_rows = slice(0, 500), slice(500, 600)
    parts = [Interactions(users[rows].clone(), items[rows].clone()) for rows in (train_rows, valid_rows)]
    return TrainingData(Interactions(users, items), known, (Cut(*parts),))


class Recorder(Observer):
    """Records what it is told; stops when its number of looks is used up."""

    def __init__(self, looks=math.inf):
        self.looks, self.epochs, self.progress = looks, [], []

    def on_progress(self, *arguments):
        self.looks -= 1
        self.progress.append(arguments)

    def on_epoch(self, record):
        self.epochs.append(record)

    def should_stop(self):
        return self.looks <= 0


def test_history_tells_every_epoch(data):
    observer = Recorder()
    trained = train(data, CONFIG, observer=observer)
    assert trained.history == observer.epochs
    chosen = [record for record in trained.history if record.phase == "search"]
    refitted = [record for record in trained.history if record.phase == "refit"]
    assert [record.epoch for record in chosen] == [1, 2, 3, 4]
    assert [record.step for record in chosen] == [8, 16, 24, 32]
    assert len(refitted) == trained.best_epoch
    assert chosen[-1].train_loss < chosen[0].train_loss
    assert all(record.valid_loss > 0 and record.epoch_s > 0 for record in chosen)
    best = max(chosen, key=lambda record: record.valid["NDCG@5"])
    assert trained.best_epoch == best.epoch
    assert observer.progress[-1][-2:] == (len(data.fit) * trained.best_epoch,) * 2


def test_refit_is_training_on_fit_for_the_chosen_epochs(data):
    trained = train(data, CONFIG)
    alone = TrainingData(data.fit, data.known_positives)
    config = config_with(epochs=trained.best_epoch)
    again = train(alone, config)
    assert {record.phase for record in again.history} == {"train"}
    for left, right in zip(trained.model.tables, again.model.tables, strict=True):
        assert left.equal(right)


def searched(data, **fields):
    """The L2 of the default loss is searched for, at this learning rate."""
    fields = {"loss": "bce", "l2": None, "epochs": 4, **fields}
    return train(data, config_with(**fields))


def test_the_validation_part_chooses_the_settings(data):
    trained = searched(data)
    tried = [trial.candidate.l2 for trial in trained.trials]
    assert tried[:3] == [0.03, 0.06, 0.12]
    best = max(trained.trials, key=lambda trial: trial.best().mean)
    assert (trained.settings.l2, trained.best_epoch) == (best.candidate.l2, best.best().epoch)
    assert trained.settings.epochs == trained.best_epoch
    assert {record.settings for record in trained.history if record.phase == "refit"} == {str(best.candidate)}


def test_the_chosen_settings_train_the_same_model_again(data):
    trained = searched(data)
    again = train(data, trained.settings)
    assert not again.trials
    for left, right in zip(trained.model.tables, again.model.tables, strict=True):
        assert left.equal(right)


def test_a_setting_that_diverges_is_left_out(data, monkeypatch):
    monkeypatch.setattr("fasttower.training.search.QUICK", {"temperature": (1e-39, 0.2)})
    trained = train(data, config_with(loss="softmax", l2=None))
    assert [trial.diverged for trial in trained.trials][:2] == [True, False]
    assert trained.settings.temperature > 0.01
    assert all(table.isfinite().all() for table in trained.model.tables)


def test_training_begins_at_the_directions_of_the_part_that_it_reads(data):
    config = config_with(search="none", loss="bce", epochs=1, learning_rate=1e-9, init_scale=1e-3)
    model = train(data, config).model
    directions = spectral_vectors(data.known_positives, 4, config.seed)
    for tower, rows in zip((model.user_tower, model.item_tower), directions, strict=True):
        assert torch.nn.functional.cosine_similarity(tower.vectors, rows).min() > 0.5
    normal = train(data, dataclasses.replace(config, initial_vectors="normal")).model
    assert torch.nn.functional.cosine_similarity(normal.item_tower.vectors, directions[1]).mean() < 0.5


def test_each_seed_begins_at_directions_of_its_own(data):
    config = config_with(seeds=2, refit=False, loss="bce")
    both = Trainer(data, config)
    both.train()
    second = train(data, dataclasses.replace(config, seed=1, seeds=1)).model
    for left, right in zip(both.train().model.tables, second.tables, strict=True):
        assert left.equal(right)


def test_a_table_that_the_last_step_broke_is_seen(data, monkeypatch):
    trainer = Trainer(data, config_with(search="none", loss="bce", epochs=1))
    whole = trainer_module._PhaseStep.run

    def broken(step, first, count):
        loss = whole(step, first, count)
        step.state.parameters.items[3, 1] = math.nan
        return loss

    monkeypatch.setattr(trainer_module._PhaseStep, "run", broken)
    with pytest.raises(TrainingError, match="largest parameter nan"):
        trainer.train()


def test_stopped_when_all_so_far_has_diverged(data, monkeypatch):
    monkeypatch.setattr("fasttower.training.search.QUICK", {"temperature": (1e-39, 0.2)})

    class Stop(Recorder):
        def on_trial(self, trial):
            self.looks = 0

    with pytest.raises(TrainingError, match="before any settings"):
        train(data, config_with(loss="softmax", l2=None), observer=Stop())


def test_a_state_is_loaded_over_whatever_the_trainer_was_at(data):
    config = config_with(search="none", loss="bce")
    trainer = Trainer(data, config)
    state = trainer.state()
    trainer.advance()
    first = [table.clone() for table in trainer.model.tables]
    trainer.load(state)
    trainer.advance()
    assert all(left.equal(right) for left, right in zip(trainer.model.tables, first, strict=True))
    given = Trainer(data, config, model=TwoTower(NUM_USERS, NUM_ITEMS, 4).initialise(0, 0.1))
    given.load(given.state())
    given.advance()


def test_candidates_that_wait_are_kept_until_the_search_is_over(data):
    waiting = []

    class Watch(Observer):
        def on_phase(self, phase, settings, epochs):
            waiting.append((phase, len(trainer.state().paused)))

    trainer = Trainer(data, config_with(loss="bce", l2=None, epochs=8), observer=Watch())
    trainer.train()
    assert waiting[2] == ("search", 2)
    assert waiting[-1] == ("refit", 0)


def test_each_candidate_starts_anew(data):
    several = searched(data)
    alone = train(data, config_with(l2=several.trials[1].candidate.l2))
    name = str(several.trials[1].candidate)
    losses = [
        [
            record.train_loss
            for record in trained.history
            if (record.phase, record.settings) == ("search", name)
        ]
        for trained in (several, alone)
    ]
    assert losses[0] == losses[1][: len(losses[0])]


def test_a_candidate_that_goes_on_is_as_if_it_had_not_stopped(data):
    trained = train(data, config_with(epochs=8, learning_rate=0.01))
    rungs = [record for record in trained.history if record.phase == "search"]
    assert [record.epoch for record in rungs] == list(range(1, 9))  # it gains, so that there are two rungs
    pairs = data.cuts[0].train
    known = KnownPositives.from_pairs(pairs.user_index, pairs.item_index, NUM_USERS, NUM_ITEMS)
    fixed = TrainingData(pairs, known)
    whole = train(fixed, config_with(epochs=8, learning_rate=0.01), plan=Plan((0,), epochs=8))
    losses = [record.train_loss for record in whole.history]
    assert losses == [record.train_loss for record in rungs]


def test_without_a_validation_part_the_standard_settings_count(data):
    trained = train(TrainingData(data.fit, data.known_positives), config_with(l2=None))
    assert (trained.settings.loss, trained.settings.l2) == ("bce", 0.06)
    assert trained.best_epoch == len(trained.history) == 4
    assert trained.trials == []


def test_without_refit_the_chosen_settings_are_trained_before_the_cut(data):
    trained = train(data, config_with(learning_rate=0.5, epochs=8, refit=False))
    cut = data.cuts[0]
    seen = KnownPositives.from_pairs(cut.train.user_index, cut.train.item_index, NUM_USERS, NUM_ITEMS)
    metrics, per_user = Validation.of(cut.valid, seen, 5).metrics(trained.model)
    assert metrics == trained.history[trained.best_epoch - 1].valid
    assert float(per_user.mean()) == pytest.approx(metrics["NDCG@5"])


def test_the_choosing_phase_does_not_see_validation_rows(data):
    """Validation rows may be drawn as negatives and are not trained on, so changing them changes no table."""
    train_part, valid = data.cuts[0]
    other = Interactions(valid.user_index, (valid.item_index + 2) % NUM_ITEMS)
    changed = dataclasses.replace(data, cuts=(Cut(train_part, other),))
    first, second = (train(parts, config_with(refit=False)) for parts in (data, changed))
    losses = [[record.train_loss for record in trained.history[:4]] for trained in (first, second)]
    assert losses[0] == losses[1]


def test_stopped_in_the_search(data):
    trained = train(data, CONFIG, observer=Recorder(looks=2))
    assert trained.interrupted
    assert [record.phase for record in trained.history] == ["search", "search"]
    assert trained.best_epoch in (1, 2)


def test_stopped_in_the_refit_keeps_the_best_epochs_model(data):
    whole = train(data, config_with(refit=False))
    trained = train(data, config_with(), observer=Recorder(looks=5))
    assert trained.interrupted
    assert trained.best_epoch > 1  # else the refit was not stopped
    assert [record.phase for record in trained.history] == ["search"] * 4 + ["refit"]
    for left, right in zip(trained.model.tables, whole.model.tables, strict=True):
        assert left.equal(right)


def test_parameters_beyond_all_use_stop_the_training_in_a_single_step(data):
    config = config_with(learning_rate=1e30, batch_size=1000)
    model = TwoTower(NUM_USERS, NUM_ITEMS, 4).initialise(0, 0.1)
    with pytest.raises(TrainingError, match="learning-rate"):
        train(data, config, plan=Plan((0,), epochs=1), model=model)


def test_stopped_in_the_first_epoch(data, monkeypatch):
    monkeypatch.setattr("fasttower.training.trainer._TICK_POSITIVES", 64)
    trained = train(data, CONFIG, observer=Recorder(looks=1))
    assert trained.interrupted
    assert trained.history == []
    assert trained.model.infer_users().isfinite().all()


def test_same_seed_same_model(data):
    models = [train(data, CONFIG).model for _ in range(2)]
    for left, right in zip(models[0].tables, models[1].tables, strict=True):
        assert left.equal(right)


def without_times(history):
    return [dataclasses.replace(record, epoch_s=0, positives_per_s=0, elapsed_s=0) for record in history]


def assert_same(trained, wanted):
    assert without_times(trained.history) == without_times(wanted.history)
    assert (trained.settings, trained.best_epoch) == (wanted.settings, wanted.best_epoch)
    for left, right in zip(trained.model.tables, wanted.model.tables, strict=True):
        assert left.equal(right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copied_state_goes_on_bit_for_bit(data, backend, monkeypatch):
    monkeypatch.setattr("fasttower.training.trainer._TICK_POSITIVES", 3 * 128)  # calls of 3 steps and 1 or 2
    config = config_with(
        backend=backend, batch_size=128, num_negatives=3, epochs=6, l2=None, loss="bce", optimiser="lazy_adam"
    )
    wanted = Trainer(data, config).train()
    assert wanted.history[-1].phase == "refit"

    disturbed, states = Trainer(data, config), []
    while disturbed.phase is not None:
        disturbed.advance()
        states.append(disturbed.state())
    names = [(state.progress.step > 0, len(state.progress.outcomes), len(state.paused)) for state in states]
    assert (True, 1, 1) in names  # in the second candidate, with the first one paused
    assert any(in_phase and done > paused for in_phase, done, paused in names)  # one that went on
    for state in states[:: max(1, len(states) // 12)] + states[-2:]:
        resumed = Trainer(data, config)
        resumed.load(state)
        assert_same(resumed.train(), wanted)


def test_a_copied_state_has_the_best_epochs_tables(data):
    config = config_with(learning_rate=0.5, epochs=8)
    observer = Recorder(looks=5)
    wanted = train(data, config, observer=observer)
    assert wanted.interrupted
    assert wanted.best_epoch < 5  # else the test shows nothing
    disturbed, resumed = Trainer(data, config), Trainer(data, config, observer=Recorder(looks=1))
    for _ in range(4):
        disturbed.advance()
    resumed.load(disturbed.state())
    assert_same(resumed.train(), wanted)


def test_a_copied_state_knows_which_seeds_are_done(data):
    config = config_with(epochs=1, seeds=2, batch_size=500)
    trainer = Trainer(data, config)
    first, between, second = trainer.train(), trainer.state(), trainer.train()
    resumed = Trainer(data, config)
    resumed.load(between)
    assert_same(resumed.train(), second)
    assert not first.model.tables.users.equal(second.model.tables.users)


def test_a_stopped_training_goes_on_with_the_next_call(data):
    observer = Recorder(looks=5)
    trainer = Trainer(data, CONFIG, observer=observer)
    stopped = trainer.train()
    assert stopped.interrupted
    assert stopped.history[-1].phase == "refit"
    observer.looks = math.inf
    assert_same(trainer.train(), train(data, CONFIG))


def test_a_loss_that_is_not_finite_stops_the_training(data):
    model = TwoTower(NUM_USERS, NUM_ITEMS, 4).initialise(0, math.inf)
    with pytest.raises(TrainingError, match="learning-rate"):
        train(data, CONFIG, plan=Plan((0,), epochs=1), model=model)


def uniform(count, known=None):
    return Negatives(NegativeSettings(count=count), NUM_USERS, NUM_ITEMS, known)


def test_validation_loss_is_the_mean_over_pairs_and_repeats(data):
    model = TwoTower(NUM_USERS, NUM_ITEMS, 4).initialise(0, 0.0)
    validation = Validation.of(data.cuts[0].valid, data.known_positives, 5)
    for scale, expected in (("pairs", math.log(2)), ("positives", 11 * math.log(2))):
        loss = validation.loss(model, LossSettings(scale=scale), uniform(10), seed=1, backend="torch")
        assert loss == pytest.approx(expected, rel=1e-5)
    noisy = TwoTower(NUM_USERS, NUM_ITEMS, 4).initialise(0, 1.0)
    first, second = (
        validation.loss(noisy, LossSettings(), uniform(10, data.known_positives), seed=1, backend="torch")
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (LossSettings("bpr"), 10 * math.log(2)),
        (LossSettings("gbce", calibration=1.0), (10 / NUM_ITEMS + 10) * math.log(2)),
        (LossSettings("softmax"), math.log(1 + NUM_ITEMS)),  # 10 negatives, each for I / 10
    ],
)
def test_validation_loss_is_that_of_the_training(data, loss, expected):
    model = TwoTower(NUM_USERS, NUM_ITEMS, 4).initialise(0, 0.0)
    validation = Validation.of(data.cuts[0].valid, data.known_positives, 5)
    value = validation.loss(model, loss, uniform(10), seed=1, backend="torch")
    assert value == pytest.approx(expected, rel=1e-5)


def test_validation_metrics_hide_training_items(data):
    model = TwoTower(NUM_USERS, NUM_ITEMS, 4).initialise(0, 1.0)
    pair = Interactions(data.fit.user_index[:1].clone(), data.fit.item_index[:1].clone())
    assert Validation.of(pair, data.known_positives, NUM_ITEMS).metrics(model)[0][f"Recall@{NUM_ITEMS}"] == 0


def test_validation_metrics_can_keep_training_items(data):
    model = TwoTower(NUM_USERS, NUM_ITEMS, 4).initialise(0, 1.0)
    pair = Interactions(data.fit.user_index[:1].clone(), data.fit.item_index[:1].clone())
    validation = Validation.of(pair, data.known_positives, NUM_ITEMS, filter_seen=False)
    assert validation.metrics(model)[0][f"Recall@{NUM_ITEMS}"] == 1


def test_validation_loss_is_one_call_and_its_indices_are_checked_once(data, monkeypatch):
    valid = data.cuts[0].valid
    many = Interactions(*(index.repeat(400) for index in (valid.user_index, valid.item_index)))
    model = TwoTower(NUM_USERS, NUM_ITEMS, 4).initialise(0, 1.0)
    validation = Validation.of(many, data.known_positives, 5)
    calls, checked, lowest = [], [], torch.Tensor.min
    monkeypatch.setattr(
        "fasttower.training.validation.loss_sum",
        lambda tables, pairs, *rest, **given: calls.append(pairs) or loss_sum(tables, pairs, *rest, **given),
    )
    monkeypatch.setattr(torch.Tensor, "min", lambda index: checked.append(index) or lowest(index))
    for _ in range(2):
        validation.loss(model, LossSettings(), uniform(1), seed=1, backend="torch")
    assert [pairs is many for pairs in calls] == [True, True]
    assert len(checked) == 2
    assert checked[0] is many.user_index
    assert checked[1] is many.item_index


def test_of_many_users_every_nth_is_ranked(data, monkeypatch):
    model = TwoTower(NUM_USERS, NUM_ITEMS, 4).initialise(0, 1.0)
    all_users = Validation.of(data.cuts[0].valid, data.known_positives, 5)
    assert 20 < len(all_users.users) <= 30
    monkeypatch.setattr("fasttower.training.validation.MOST_USERS", 10)
    some = Validation.of(data.cuts[0].valid, data.known_positives, 5)
    assert some.users.equal(all_users.users[::3])
    assert some.metrics(model)[1].equal(all_users.metrics(model)[1][::3])
