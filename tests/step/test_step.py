"""The steps of the plain torch backend: every row once an epoch, the short last batch, restarts."""

import pytest
import torch

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.philox import seed_key
from fasttower_kernels.settings import LossSettings, NegativeSettings, StepSettings
from fasttower_kernels.shuffle import epoch_key
from fasttower_kernels.shuffle.reference import shuffled_rows
from fasttower_kernels.step import Step, TrainState, add_gradients, steps_per_epoch
from fasttower_kernels.tables import Interactions, Tables

NUM_ROWS = 53
OWN = NegativeSettings(count=3)
SHARED = NegativeSettings("mixed", count=3, block_size=4)
L2 = {"user_l2": 0.01, "item_l2": 0.01}
SETTINGS = {
    "own": StepSettings(0.05, 10, seed=9, loss=LossSettings(**L2), negatives=OWN),
    "shared": StepSettings(0.05, 10, seed=9, loss=LossSettings("softmax", **L2), negatives=SHARED),
}
DATAFLOWS = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def make_state():
    generator = torch.Generator().manual_seed(0)
    return TrainState.start(
        Tables(
            torch.randn(8, 4, generator=generator), torch.randn(12, 4, generator=generator), torch.zeros(12)
        )
    )


@pytest.fixture
def interactions():
    generator = torch.Generator().manual_seed(1)
    return Interactions(
        torch.randint(8, (NUM_ROWS,), generator=generator, dtype=torch.int32),
        torch.randint(12, (NUM_ROWS,), generator=generator, dtype=torch.int32),
    )


@pytest.fixture
def known(interactions):
    return KnownPositives.from_pairs(interactions.user_index, interactions.item_index, 8, 12)


def make_step(state, interactions, known, settings, backend="torch"):
    negatives = Negatives.of(settings.negatives, interactions, 8, 12, known)
    return Step(state, interactions, negatives, settings, backend=backend)


def run(state, interactions, known, settings, first, count):
    return float(make_step(state, interactions, known, settings).run(first, count))


def test_steps_per_epoch():
    assert [steps_per_epoch(n, 10) for n in (1, 10, 11, 53)] == [1, 1, 2, 6]


def test_every_positive_once_an_epoch(interactions):
    # Without negatives and with a rate so small that nothing moves, an epoch's BCE is that of all the rows.
    settings = StepSettings(1e-30, 10, seed=3, negatives=NegativeSettings(count=0))
    state = make_state()
    users, items, _ = state.parameters
    logits = (users[interactions.user_index.long()] * items[interactions.item_index.long()]).sum(-1)
    for epoch in range(2):
        bce = run(state, interactions, None, settings, 6 * epoch, 6)
        assert bce == pytest.approx(float(torch.nn.functional.softplus(-logits).sum()), rel=1e-5)


@DATAFLOWS
def test_one_call_or_many(interactions, known, settings):
    whole, parts = make_state(), make_state()
    total = run(whole, interactions, known, settings, 0, 6) + run(whole, interactions, known, settings, 6, 6)
    steps = make_step(parts, interactions, known, settings)
    pieces = sum(float(steps.run(first, count)) for first, count in ((0, 1), (1, 5), (6, 2), (8, 4)))
    assert pieces == pytest.approx(total, rel=1e-6)
    for left, right in zip(whole.parameters, parts.parameters, strict=True):
        assert left.equal(right)


@DATAFLOWS
def test_steps_are_torchs_adam_on_the_batches_gradients(interactions, known, settings):
    negatives = Negatives.of(settings.negatives, interactions, 8, 12, known)
    ours, state = make_state(), make_state()
    theirs = [table.clone().requires_grad_() for table in state.parameters]
    optimiser = torch.optim.Adam(theirs, lr=settings.learning_rate)
    order = shuffled_rows(torch.arange(NUM_ROWS), NUM_ROWS, epoch_key(settings.seed, 0))
    for step, rows in enumerate(order.split(settings.batch_size)[:4]):
        batch = Interactions(interactions.user_index[rows], interactions.item_index[rows])
        tables = Tables(*(table.detach() for table in theirs))
        gradients = tables.zeros_like()
        call = {"key": seed_key(settings.seed), "step": step, "backend": "torch"}
        add_gradients(tables, gradients, batch, negatives, settings.loss, **call)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
    run(ours, interactions, known, settings, 0, 4)
    for left, right in zip(ours.parameters, theirs, strict=True):
        torch.testing.assert_close(left, right.detach(), rtol=1e-5, atol=1e-6)


@DATAFLOWS
def test_the_loss_falls(interactions, known, settings):
    steps = make_step(make_state(), interactions, known, settings)
    losses = [float(steps.run(6 * epoch, 6)) for epoch in range(30)]
    assert losses[-1] < 0.7 * losses[0]


def test_steps_may_not_cross_an_epoch(interactions, known):
    with pytest.raises(FastTowerError, match="6 steps"):
        run(make_state(), interactions, known, SETTINGS["own"], 4, 3)


def test_settings_of_other_negatives_are_refused(interactions):
    negatives = Negatives(SHARED, 8, 12)
    with pytest.raises(FastTowerError, match="different settings"):
        Step(make_state(), interactions, negatives, SETTINGS["own"], backend="torch")


def test_interactions_are_checked():
    with pytest.raises(FastTowerError, match="int32"):
        Interactions(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int32))
    with pytest.raises(FastTowerError, match="3 user indices and 2"):
        Interactions(torch.zeros(3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
