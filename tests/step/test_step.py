"""The steps of the plain torch backend: every row once an epoch, the short last batch, restarts."""

import pytest
import torch

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.philox import seed_key
from fasttower_kernels.sampled_bce import LossSettings
from fasttower_kernels.sampled_bce.reference import train_step
from fasttower_kernels.shuffle import epoch_key
from fasttower_kernels.shuffle.reference import shuffled_rows
from fasttower_kernels.tables import Interactions, Tables
from fasttower_kernels.train_steps import StepSettings, TrainState, run_steps, steps_per_epoch

NUM_ROWS = 53
SETTINGS = StepSettings(LossSettings(3, l2=0.01), learning_rate=0.05, batch_size=10, seed=9)


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


def run(state, interactions, known, first, count, settings=SETTINGS):
    return float(
        run_steps(state, interactions, known, settings, first_step=first, num_steps=count, backend="torch")
    )


def test_steps_per_epoch():
    assert [steps_per_epoch(n, 10) for n in (1, 10, 11, 53)] == [1, 1, 2, 6]


def test_every_positive_once_an_epoch(interactions):
    # Without negatives and with a rate so small that nothing moves, an epoch's BCE is that of all the rows.
    settings = StepSettings(LossSettings(0), learning_rate=1e-30, batch_size=10, seed=3)
    state = make_state()
    users, items, _ = state.parameters
    logits = (users[interactions.user_index.long()] * items[interactions.item_index.long()]).sum(-1)
    for epoch in range(2):
        bce = run(state, interactions, None, 6 * epoch, 6, settings)
        assert bce == pytest.approx(float(torch.nn.functional.softplus(-logits).sum()), rel=1e-5)


def test_one_call_or_many(interactions, known):
    whole, parts = make_state(), make_state()
    total = run(whole, interactions, known, 0, 6) + run(whole, interactions, known, 6, 6)
    pieces = sum(
        run(parts, interactions, known, first, count) for first, count in ((0, 1), (1, 5), (6, 2), (8, 4))
    )
    assert pieces == pytest.approx(total, rel=1e-6)
    for left, right in zip(whole.parameters, parts.parameters, strict=True):
        assert left.equal(right)


def test_steps_are_torchs_adam_on_the_batches_gradients(interactions, known):
    ours, state = make_state(), make_state()
    theirs = [table.clone().requires_grad_() for table in state.parameters]
    optimiser = torch.optim.Adam(theirs, lr=SETTINGS.learning_rate)
    order = shuffled_rows(torch.arange(NUM_ROWS), NUM_ROWS, epoch_key(SETTINGS.seed, 0))
    for step, rows in enumerate(order.split(SETTINGS.batch_size)[:4]):
        batch = Interactions(interactions.user_index[rows], interactions.item_index[rows])
        tables = Tables(*(table.detach() for table in theirs))
        gradients = tables.zeros_like()
        train_step(tables, gradients, batch, known, SETTINGS.loss, key=seed_key(SETTINGS.seed), step=step)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
    run(ours, interactions, known, 0, 4)
    for left, right in zip(ours.parameters, theirs, strict=True):
        torch.testing.assert_close(left, right.detach(), rtol=1e-5, atol=1e-6)


def test_the_loss_falls(interactions, known):
    state = make_state()
    losses = [run(state, interactions, known, 6 * epoch, 6) for epoch in range(30)]
    assert losses[-1] < 0.7 * losses[0]


def test_steps_may_not_cross_an_epoch(interactions, known):
    with pytest.raises(FastTowerError, match="6 steps"):
        run(make_state(), interactions, known, 4, 3)


def test_interactions_are_checked():
    with pytest.raises(FastTowerError, match="int32"):
        Interactions(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int32))
    with pytest.raises(FastTowerError, match="3 user indices and 2"):
        Interactions(torch.zeros(3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_indices_beyond_the_tables_are_refused(interactions, known, backend):
    wrong = Interactions(interactions.user_index + 8, interactions.item_index)
    for positives, pairs, said in (
        (wrong, None, "user indices reach"),
        (interactions, known, "known positives"),
    ):
        state = TrainState.start(Tables(torch.zeros(8, 4), torch.zeros(13, 4), torch.zeros(13)))
        with pytest.raises(FastTowerError, match=said):
            run_steps(state, positives, pairs, SETTINGS, first_step=0, num_steps=1, backend=backend)
