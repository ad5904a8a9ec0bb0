"""Lazy Adam against dense Adam in float64: rows used rarely, never, or after long gaps."""

import dataclasses
import importlib.util

import pytest
import torch

from fasttower.config import TrainingConfig
from fasttower.training.data import TrainingData
from fasttower.training.trainer import Trainer
from fasttower_kernels.adam import BETA_1, BETA_2, EPSILON, catch_up, lazy_adam_step
from fasttower_kernels.adam.lazy_reference import MOST_REPLAYED
from fasttower_kernels.adam.reference import adam_step
from fasttower_kernels.adam.replay_nodes import NODES, replay_nodes
from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.settings import LossSettings, NegativeSettings, StepSettings
from fasttower_kernels.step import Step, TrainState
from fasttower_kernels.tables import Interactions, Tables

NUM_USERS, NUM_ITEMS, WIDTH = 203, 301, 8
NUM_ROWS, BATCH = 3997, 4  # 1,000 steps an epoch, the last one short
L2 = LossSettings(user_l2=0.01, item_l2=0.01)
SETTINGS = StepSettings(
    0.01, BATCH, seed=9, loss=L2, negatives=NegativeSettings(count=2), optimiser="lazy_adam"
)

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
BACKENDS = ["torch", pytest.param("numba", marks=needs_numba)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_tables(*, bias=True):
    generator = torch.Generator().manual_seed(0)
    users, items = (torch.randn(n, WIDTH, generator=generator) * 0.1 for n in (NUM_USERS, NUM_ITEMS))
    return Tables(users, items, torch.randn(NUM_ITEMS, generator=generator) * 0.1 if bias else None)


def make_interactions(num_rows=NUM_ROWS):
    """Few users have most of the rows; the others wait for hundreds of steps."""
    generator = torch.Generator().manual_seed(1)
    users = (torch.rand(num_rows, generator=generator) ** 4 * 200).int()
    return Interactions(users, torch.randint(299, (num_rows,), generator=generator, dtype=torch.int32))


def make_known(num_users=NUM_USERS):
    """Nobody draws the unused items, and user 199 has touched everything."""
    rows = [(u, i) for u in range(num_users) for i in (range(NUM_ITEMS) if u == 199 else (299, 300))]
    index = torch.tensor(rows, dtype=torch.int32)
    return KnownPositives.from_pairs(index[:, 0], index[:, 1], num_users, NUM_ITEMS)


def doubled(tables):
    return Tables(*(table.double() for table in tables))


def copied(tables):
    return Tables(*(table.clone() for table in tables))


def run(backend, settings=SETTINGS, *, calls=(1000,), tables=None, state=None, first_step=0):
    state = state or TrainState.start(copied(tables or make_tables()))
    steps, total = make_step(state, settings, backend), 0.0
    for count in calls:
        total += float(steps.run(first_step, count))
        first_step += count
    assert all(not gradient.any() for gradient in state.gradients)
    return total, state


def make_step(state, settings, backend, *, exclude=True):
    interactions, known = make_interactions(), make_known() if exclude else None
    negatives = Negatives.of(settings.negatives, interactions, NUM_USERS, NUM_ITEMS, known)
    return Step(state, interactions, negatives, settings, backend=backend)


def displacement_error(ours, right, start):
    moved = [(r - s.double()).flatten() for r, s in zip(right, start, strict=True)]
    off = [(o.double() - r).flatten() for o, r in zip(ours, right, strict=True)]
    return float(torch.cat(off).norm() / torch.cat(moved).norm())


@pytest.fixture(scope="module")
def oracle():
    torch.set_num_threads(1)
    return run("torch", dataclasses.replace(SETTINGS, optimiser="adam"), tables=doubled(make_tables()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_dense_adam_in_float64(backend, oracle):
    expected, right = oracle
    total, state = run(backend)
    error = displacement_error(state.parameters, right.parameters, make_tables())
    assert error < 1e-5
    assert total == pytest.approx(expected, rel=1e-6)
    for ours, theirs in ((state.moments_1, right.moments_1), (state.moments_2, right.moments_2)):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=float(other.abs().max()) * 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_never_used_stay_as_they_are(backend):
    _, state = run(backend, calls=(300,))
    unused = (slice(200, 203), slice(299, 301), slice(299, 301))
    tables = (make_tables(), state.parameters, state.moments_1, state.moments_2)
    for before, after, first, second, rows in zip(*tables, unused, strict=True):
        assert after[rows].equal(before[rows])
        assert not first[rows].any()
        assert not second[rows].any()
        assert not after[0].equal(before[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_may_end_anywhere(backend, oracle):
    """The tables are up to date after each call, so a run goes on from tables, moments and a step number."""
    _, state = run(backend, calls=(1, 2, 397))
    dense = dataclasses.replace(SETTINGS, optimiser="adam")
    _, right = run("torch", dense, calls=(400,), tables=doubled(make_tables()))
    assert displacement_error(state.parameters, right.parameters, make_tables()) < 1e-5
    kept = (state.parameters, state.gradients, state.moments_1, state.moments_2)
    restarted = TrainState(*(copied(tables) for tables in kept))
    _, state = run(backend, state=restarted, first_step=400, calls=(600,))
    assert displacement_error(state.parameters, oracle[1].parameters, make_tables()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_optimisers_may_alternate(backend, oracle):
    _, state = run(backend, calls=(150, 50))
    dense = dataclasses.replace(SETTINGS, optimiser="adam")
    _, state = run(backend, dense, state=state, first_step=200, calls=(100,))
    _, state = run(backend, state=state, first_step=300, calls=(700,))
    assert displacement_error(state.parameters, oracle[1].parameters, make_tables()) < 1e-5


@needs_numba
@pytest.mark.parametrize("threads", [1, 2])
def test_repeats_bit_for_bit(threads):
    torch.set_num_threads(threads)
    # With more positives than a tile, both threads have some; more negatives than a chunk.
    settings = dataclasses.replace(SETTINGS, batch_size=150, negatives=NegativeSettings(count=40))
    total, state = run("numba", settings, calls=(20, 7))
    for _ in range(2):
        again, other = run("numba", settings, calls=(20, 7))
        assert again == total
        for mine, same in ((state.parameters, other.parameters), (state.moments_2, other.moments_2)):
            assert all(one.equal(another) for one, another in zip(mine, same, strict=True))
    dense = dataclasses.replace(settings, optimiser="adam")
    expected, right = run("torch", dense, calls=(27,), tables=doubled(make_tables()))
    assert total == pytest.approx(expected, rel=1e-5)
    assert displacement_error(state.parameters, right.parameters, make_tables()) < 1e-5


@needs_numba
@pytest.mark.parametrize(
    ("loss", "negatives", "exclude"),
    [
        pytest.param(LossSettings(), NegativeSettings(count=0), True, marks=pytest.mark.slow),
        pytest.param(LossSettings(), NegativeSettings(count=5), False, marks=pytest.mark.slow),
        (L2, NegativeSettings(count=2, pool=6), True),  # what is not kept is read too
        (LossSettings("softmax"), NegativeSettings("popularity", count=5), True),
        (LossSettings("softmax"), NegativeSettings("shared", count=5, block_size=3), True),
        pytest.param(
            LossSettings("bpr", user_l2=0.01),
            NegativeSettings("mixed", count=5, block_size=3),
            True,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["no negatives", "plain", "hard", "popularity", "shared", "mixed"],
)
def test_other_variants(loss, negatives, exclude):
    settings = dataclasses.replace(SETTINGS, loss=loss, negatives=negatives)
    tables = make_tables(bias=False)
    states = []
    for backend, optimiser, start in (("numba", "lazy_adam", tables), ("torch", "adam", doubled(tables))):
        state = TrainState.start(copied(start))
        chosen = dataclasses.replace(settings, optimiser=optimiser)
        make_step(state, chosen, backend, exclude=exclude).run(0, 300)
        states.append(state.parameters)
    assert displacement_error(*states, tables) < 1e-5


@pytest.mark.parametrize("negatives", [NegativeSettings(count=2, pool=6), NegativeSettings("mixed", count=5)])
def test_other_variants_in_plain_torch(negatives):
    settings = dataclasses.replace(SETTINGS, loss=LossSettings("softmax"), negatives=negatives)
    _, state = run("torch", settings, calls=(100,))
    dense = dataclasses.replace(settings, optimiser="adam")
    _, right = run("torch", dense, calls=(100,), tables=doubled(make_tables()))
    assert displacement_error(state.parameters, right.parameters, make_tables()) < 1e-5


def test_a_row_that_waits_for_long():
    """Far more than the updates that are replayed; the moments decay in closed form."""
    start = Tables(torch.full((2, 4), 0.5), torch.full((2, 4), -0.5))
    lazy = [copied(start), *(start.zeros_like() for _ in range(3))]
    dense = [doubled(tables) for tables in lazy]
    last = [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
    rows = [torch.tensor([1]), torch.tensor([0, 1])]
    for count in range(1, 1002):
        if count in (1, 1001):
            for tables in (lazy, dense):
                tables[1].users[1] += 1e-3 * count
                tables[1].items[:] -= 2e-7
            catch_up(lazy[0], lazy[2], lazy[3], last, rows, count=count - 1, learning_rate=0.1)
            lazy_adam_step(*lazy, last, rows, count=count, learning_rate=0.1)
        adam_step(*dense, count=count, learning_rate=0.1)
    assert [seen.tolist() for seen in last] == [[0, 1001], [1001, 1001]]
    assert lazy[0].users[0].equal(start.users[0])
    for ours, right in zip((lazy[0], *lazy[2:]), (dense[0], *dense[2:]), strict=True):
        for one, other in zip(ours, right, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=0)


def test_a_few_terms_are_the_updates_that_a_row_missed():
    """For all gaps, and gradients from none to large beside epsilon; in float32, as the kernels do it."""
    terms = torch.arange(1, MOST_REPLAYED + 1, dtype=torch.float64)
    roots = torch.cat([torch.zeros(1), 10.0 ** torch.arange(-12, 2)]).double()[:, None]
    for count in (MOST_REPLAYED, 1000, 10**6):
        correction = 1 - BETA_2**count

        def summed(growth, weights, correction=correction):
            return (weights / (roots / (correction + growth).sqrt() + EPSILON)).cumsum(1)

        growth = BETA_2**-terms - 1
        exact = summed(growth, BETA_1**terms / (1 - BETA_1 ** (count + terms)))
        nodes = replay_nodes().double()
        torch.testing.assert_close(nodes[:MOST_REPLAYED, 0], growth, rtol=1e-7, atol=0)
        torch.testing.assert_close(nodes[:MOST_REPLAYED, 1], BETA_1**terms, rtol=1e-7, atol=0)
        for gap in range(1, MOST_REPLAYED + 1):
            some = nodes[MOST_REPLAYED + NODES * (gap - 1) :][:NODES]
            torch.testing.assert_close(summed(*some.T)[:, -1], exact[:, gap - 1], rtol=6e-8, atol=0)


def test_on_a_gpu_each_table_goes_by_its_size():
    def lazy(users, items, batch_size, optimiser="auto", dim=64):
        return StepSettings(0.01, batch_size, 0, optimiser=optimiser).lazy_tables(users, items, dim)

    assert lazy(138_493, 26_744, 1024) == (True, True)
    assert lazy(138_493, 26_744, 8192) == lazy(138_493, 26_744, 65_536) == (True, False)
    assert lazy(138_493, 26_744, 262_144) == (False, False)
    assert lazy(1000, 10**6, 1024) == (False, True)
    assert lazy(6040, 3706, 1024) == (False, False)
    assert lazy(6040, 3706, 1024, "lazy_adam") == (True, True)
    assert lazy(138_493, 26_744, 1024, "adam") == (False, False)
    assert lazy(0, 0, 1) == (False, False)


def test_auto_goes_by_the_sizes():
    def is_lazy(users, items, batch_size, optimiser="auto"):
        return StepSettings(0.01, batch_size, 0, optimiser=optimiser).is_lazy(users, items)

    assert is_lazy(138_493, 26_744, 1024)
    assert not is_lazy(138_493, 26_744, 65_536)
    assert not is_lazy(6040, 3706, 1024)
    assert is_lazy(6040, 3706, 1024, "lazy_adam")
    assert not is_lazy(138_493, 26_744, 1024, "adam")


@pytest.mark.parametrize(
    ("negatives", "lazy"),
    [  # of 10,000 users and 50,000 items a batch of 1,000 may touch at most 20,000 rows for lazy Adam
        (NegativeSettings(count=18), True),
        (NegativeSettings(count=19), False),
        (NegativeSettings(count=10, pool=19), False),
        (NegativeSettings("in-batch", count=18), True),
        (NegativeSettings("shared", count=4500, block_size=256), True),  # 4 blocks
        (NegativeSettings("shared", count=4501, block_size=256), False),
        (NegativeSettings("mixed", count=4501, block_size=256), False),
    ],
)
def test_auto_goes_by_what_is_drawn(negatives, lazy):
    assert StepSettings(0.01, 1000, 0, negatives=negatives).is_lazy(10_000, 50_000) == lazy


@needs_numba
def test_auto_takes_the_choice(monkeypatch):
    wanted = run("numba", calls=(30,))[1].parameters
    auto = dataclasses.replace(SETTINGS, optimiser="auto")
    monkeypatch.setattr("fasttower_kernels.settings.LAZY_PAYS_FROM", 1)
    assert all(
        one.equal(other)
        for one, other in zip(run("numba", auto, calls=(30,))[1].parameters, wanted, strict=True)
    )
    monkeypatch.setattr("fasttower_kernels.settings.LAZY_PAYS_FROM", 10**6)
    dense = run("numba", auto, calls=(30,))[1].parameters
    assert not all(one.equal(other) for one, other in zip(dense, wanted, strict=True))


def test_bad_optimisers_are_one_line():
    with pytest.raises(FastTowerError, match="sgd"):
        dataclasses.replace(SETTINGS, optimiser="sgd")


def test_the_trainer_passes_it_on():
    models = []
    for optimiser in ("adam", "lazy_adam"):
        config = TrainingConfig(
            embedding_dim=8, batch_size=100, epochs=2, l2=0.01, optimiser=optimiser, backend="torch"
        )
        interactions = make_interactions()
        data = TrainingData(interactions, make_known())
        model = Trainer(data, config).train().model
        models.append(model.tables)
    equal = [one.equal(other) for one, other in zip(*models, strict=True)]
    assert not all(equal)  # the last bits tell that the other optimiser ran
    for one, other in zip(*models, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@needs_numba
def test_the_marks_of_a_step_are_taken_off():
    """With marks that stay, every step would update all rows that were ever touched: right, and slow."""
    import numba
    import numpy as np

    from fasttower_kernels.step.lazy_pieces_numba_cpu import update_touched_piece

    @numba.njit
    def update(p, g, m, v, last, touched, scales):
        first, threads, now = numba.uint64(0), numba.uint64(1), numba.uint64(0)
        update_touched_piece(p, g, m, v, last, touched, first, threads, now, scales, 4, True)

    def arrays(*shape):
        return tuple(np.ones((*shape, n), dtype=np.float32) for n in (12, 20, 5))  # 3 users, 5 items

    last = tuple(np.zeros(n, dtype=np.uint32) for n in (3, 5, 5))
    touched = np.array([0, 1, 0, 0, 0, 0, 0, 0], np.uint8), np.array([1, 0, 0, 0, 1, 0, 0, 0], np.uint8)
    update(arrays(), arrays(1), arrays(), arrays(), last, touched, np.ones((1, 2), dtype=np.float32))
    assert [seen.tolist() for seen in last] == [[0, 1, 0], [1, 0, 0, 0, 1], [1, 0, 0, 0, 1]]
    assert not any(marks.any() for marks in touched)
