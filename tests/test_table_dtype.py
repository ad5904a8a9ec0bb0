"""bfloat16 tables: what the option computes in plain torch, its way through a run, where it is refused."""

import dataclasses
import importlib.util
import json

import pytest
import torch
from conftest import CONFIG

import fasttower
from fasttower.config import Config, TrainingConfig
from fasttower.errors import FastTowerError
from fasttower.training.data import TrainingData
from fasttower.training.trainer import Trainer
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.philox import seed_key
from fasttower_kernels.settings import LossSettings, NegativeSettings, StepSettings
from fasttower_kernels.shuffle import epoch_key
from fasttower_kernels.shuffle.reference import shuffled_rows
from fasttower_kernels.step import Step, TrainState, add_gradients
from fasttower_kernels.tables import Interactions, Tables

NUM_USERS, NUM_ITEMS = 17, 23
SETTINGS = StepSettings(
    0.05,
    50,
    seed=9,
    loss=LossSettings(user_l2=0.02, item_l2=0.02),
    negatives=NegativeSettings(count=3),
    table_dtype="bfloat16",
)
needs_numba = pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="numba is not installed")


def make_tables(*, bias=True):
    generator = torch.Generator().manual_seed(0)
    users, items = (torch.randn(n, 8, generator=generator) for n in (NUM_USERS, NUM_ITEMS))
    return Tables(users, items, torch.randn(NUM_ITEMS, generator=generator) if bias else None)


@pytest.fixture
def interactions():
    generator = torch.Generator().manual_seed(1)
    users, items = (
        torch.randint(n, (50,), generator=generator, dtype=torch.int32) for n in (NUM_USERS, NUM_ITEMS)
    )
    return Interactions(users, items)


@pytest.fixture
def known(interactions):
    return KnownPositives.from_pairs(interactions.user_index, interactions.item_index, NUM_USERS, NUM_ITEMS)


def run(state, interactions, known, settings, *, steps=1, backend="torch"):
    negatives = Negatives.of(settings.negatives, interactions, NUM_USERS, NUM_ITEMS, known)
    step = Step(state, interactions, negatives, settings, backend=backend)
    return sum(step.run(t, 1) for t in range(steps))


def error(result, right):
    return float((result.double() - right).norm() / right.norm())


@pytest.mark.parametrize(
    ("bias", "loss", "negatives"),
    [
        (True, SETTINGS.loss, SETTINGS.negatives),
        (False, SETTINGS.loss, SETTINGS.negatives),
        (True, LossSettings("softmax"), NegativeSettings("in-batch", block_size=25)),
    ],
    ids=["bias", "no bias", "in-batch softmax"],
)
def test_gradients_are_those_of_the_rounded_tables(interactions, known, bias, loss, negatives):
    """Against float64; the whole epoch is one batch, and the first moment a tenth of its gradient."""
    tables = make_tables(bias=bias)
    users, items = (table.bfloat16().double() for table in (tables.users, tables.items))
    rounded = Tables(users, items, tables.item_bias.double() if bias else None)
    oracle = rounded.zeros_like()
    order = shuffled_rows(torch.arange(50), 50, epoch_key(SETTINGS.seed, 0))
    batch = Interactions(interactions.user_index[order], interactions.item_index[order])
    settings = dataclasses.replace(SETTINGS, loss=loss, negatives=negatives)
    step = batch, Negatives.of(negatives, interactions, NUM_USERS, NUM_ITEMS, known), loss
    call = {"key": seed_key(SETTINGS.seed), "step": 0, "backend": "torch"}
    expected = add_gradients(rounded, oracle, *step, **call)
    plain = Tables(*(table.double() for table in tables))
    unrounded = plain.zeros_like()
    add_gradients(plain, unrounded, *step, **call)
    state = TrainState.start(tables)
    value = run(state, interactions, known, settings)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for moment, right, other in zip(state.moments_1, oracle, unrounded, strict=True):
        assert error(10 * moment, right) < 1e-6
        assert 1e-4 < error(10 * moment, other) < 1e-2


def test_updates_too_small_for_bfloat16_add_up(interactions, known):
    state = TrainState.start(Tables(torch.ones(NUM_USERS, 8), torch.ones(NUM_ITEMS, 8)))
    before = Tables(*(table.clone() for table in state.parameters))
    settings = dataclasses.replace(SETTINGS, learning_rate=1e-5)
    run(state, interactions, known, settings, steps=20)
    for table, start in zip(state.parameters, before, strict=True):
        moved = (table - start).abs()
        assert 1e-4 < float(moved.max()) < 2.1e-4
        assert table.bfloat16().equal(start.bfloat16())


def test_lazy_adam_reads_rounded_rows_too(interactions, known):
    states = []
    for optimiser in ("adam", "lazy_adam"):
        states.append(TrainState.start(make_tables()))
        settings = dataclasses.replace(SETTINGS, optimiser=optimiser, batch_size=10)
        run(states[-1], interactions, known, settings, steps=5)
    for one, other in zip(states[0].parameters, states[1].parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_bad_dtypes_are_one_line():
    with pytest.raises(FastTowerError, match=r"table_dtype is 'float16'; expected one of float32, bfloat16"):
        dataclasses.replace(SETTINGS, table_dtype="float16")
    with pytest.raises(FastTowerError, match="--table-dtype"):
        Config(table_dtype="float16")


@needs_numba
@pytest.mark.parametrize("backend", ["numba", "auto"])
def test_numba_has_float32_alone(interactions, known, backend):
    state = TrainState.start(make_tables())
    with pytest.raises(FastTowerError, match=r"table_dtype is bfloat16.*numba.*choose.*CUDA.*backend torch"):
        run(state, interactions, known, SETTINGS, backend=backend)
    assert state.parameters.users.equal(make_tables().users)


@needs_numba
def test_a_device_that_fell_back_to_the_cpu(ratings):
    """The warning says that there is no GPU, and the error what to do without one."""
    warnings = []

    class Listener(fasttower.FitObserver):
        def on_warning(self, line):
            warnings.append(line)

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config = dataclasses.replace(CONFIG, device="cuda", backend="auto", table_dtype="bfloat16")
    with pytest.raises(FastTowerError, match="table_dtype is bfloat16, but on the CPU backend numba"):
        fasttower.fit(ratings, config, observer=Listener())
    assert any("going on on the CPU" in line for line in warnings)


def test_the_trainer_passes_it_on(interactions, known):
    tables = []
    for dtype in ("float32", "bfloat16"):
        config = TrainingConfig(
            embedding_dim=8, batch_size=10, epochs=2, l2=0.01, backend="torch", table_dtype=dtype
        )
        data = TrainingData(interactions, known)
        model = Trainer(data, config).train().model
        tables.append(model.tables)
    assert not tables[0].users.equal(tables[1].users)
    assert all(table.dtype == torch.float32 for table in tables[1])
    assert error(tables[1].users, tables[0].users.double()) < 0.05


def test_a_run_keeps_it(ratings, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1, table_dtype="bfloat16")
    fasttower.fit(ratings, config).save(tmp_path / "run")
    loaded = fasttower.load_run(tmp_path / "run")
    assert loaded.config.table_dtype == "bfloat16"
    updated = loaded.update(ratings.head(50).with_columns(user="new " + ratings["user"].head(50)))
    assert updated.config == loaded.config
    assert updated.recommend_new(ratings.head(9)).height > 0
    # A configuration from before there was the field.
    path = tmp_path / "run" / "config.json"
    values = json.loads(path.read_text())
    del values["table_dtype"]
    path.write_text(json.dumps(values))
    assert fasttower.load_run(tmp_path / "run", trust_files=True).config.table_dtype == "float32"
