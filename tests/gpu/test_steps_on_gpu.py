"""Many training steps on a GPU: graphs, lazy Adam, bfloat16 tables and deterministic mode."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from gpu_cases import (
    DEVICE,
    doubled,
    doubled_state,
    error,
    leave_a_lost_device,
    make_batch,
    make_known,
    make_tables,
    start_state,
)

from fasttower_kernels.sampled_bce import LossSettings
from fasttower_kernels.tables import Interactions
from fasttower_kernels.train_steps import StepSettings, run_steps, steps_per_epoch
from fasttower_kernels.train_steps import reference as steps_reference
from fasttower_kernels.train_steps.state import LazyTables

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)
if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

from fasttower_kernels.train_steps import triton_gpu as steps_triton

OPTIMISERS = ["adam", "lazy_adam"]
TABLE_DTYPES = ["float32", "bfloat16"]


@pytest.fixture(autouse=True)
def _modes():
    yield
    torch.use_deterministic_algorithms(False)
    leave_a_lost_device()


def reference_steps(oracle, interactions, known, settings, **steps):
    """The same steps with dense Adam in plain torch."""
    dense = replace(settings, optimiser="adam")
    return steps_reference.run_steps(oracle, interactions, known, dense, **steps)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize(
    ("graphs", "deterministic"),
    [(True, False), (False, False), (True, True)],
    ids=["graphs", "plain", "sorted"],
)
def test_two_epochs(graphs, deterministic, optimiser):
    # 100 steps an epoch and a short last batch: more than one graph of many steps, and single ones.
    interactions, known = make_batch(99 * 64 + 17), make_known()
    settings = StepSettings(LossSettings(5, 0.01), 0.01, batch_size=64, seed=2**40 + 1, optimiser=optimiser)
    state = start_state(make_tables(16))
    start, oracle = doubled(state.parameters), doubled_state(state)
    assert steps_per_epoch(len(interactions), 64) == 100
    for first, count in ((0, 1), (1, 99), (100, 100)):
        steps = {"first_step": first, "num_steps": count}
        torch.use_deterministic_algorithms(deterministic)
        bce = steps_triton.run_steps(state, interactions, known, settings, **steps, graphs=graphs)
        torch.use_deterministic_algorithms(False)
        right = reference_steps(oracle, interactions, known, settings, **steps)
        assert bce.device.type == "cuda"
        assert float(bce) == pytest.approx(float(right), rel=1e-5)
    for result, expected, before in zip(state.parameters, oracle.parameters, start, strict=True):
        assert error(result - before, expected - before) < 2e-5


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("table_dtype", TABLE_DTYPES)
def test_graphs_do_what_launches_do_bit_for_bit(optimiser, table_dtype):
    # No row is in two positives, and there are no negatives: no sum depends on the order of its terms.
    size = 40 * 256 - 17  # more than one graph of many steps, single ones, and a short last batch
    rows = torch.arange(size, dtype=torch.int32, device=DEVICE)
    interactions, tables = Interactions(rows, rows.flip(0)), make_tables(16, size, size)
    settings = StepSettings(LossSettings(0, 0.1), 0.01, 256, 5, optimiser, table_dtype)
    states = [start_state(tables) for _ in range(2)]
    for first in (0, 40):
        losses = [
            float(
                steps_triton.run_steps(
                    state, interactions, None, settings, first_step=first, num_steps=40, graphs=graphs
                )
            )
            for state, graphs in zip(states, (True, False), strict=True)
        ]
        assert losses[0] == losses[1]
    for name in ("parameters", "moments_1", "moments_2"):
        for one, other in zip(*(getattr(state, name) for state in states), strict=True):
            assert one.equal(other)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("dim", [6, 16, 128, 256])
@pytest.mark.parametrize("deterministic", [False, True])
def test_bfloat16_tables(optimiser, dim, deterministic):
    # Single steps from equal states, so that both round the same numbers.
    interactions, known = make_batch(99 * 64 + 17), make_known()
    settings = StepSettings(LossSettings(5, 0.01), 0.01, 64, 2**40 + 1, optimiser, "bfloat16")
    state = start_state(make_tables(dim))
    for step in (0, 1):
        oracle = doubled_state(state)
        torch.use_deterministic_algorithms(deterministic)
        bce = steps_triton.run_steps(state, interactions, known, settings, first_step=step, num_steps=1)
        torch.use_deterministic_algorithms(False)
        right = reference_steps(oracle, interactions, known, settings, first_step=step, num_steps=1)
        assert float(bce) == pytest.approx(float(right), rel=1e-6)
        for result, expected in zip(state.moments_1, oracle.moments_1, strict=True):
            assert error(result, expected) < 5e-6


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_rounded_tables_follow_within_a_call(optimiser):
    # The copy that the loss reads is made anew only at the beginning of a call.
    interactions, known = make_batch(99 * 64 + 17), make_known()
    settings = StepSettings(LossSettings(5, 0.01), 0.01, 64, 2**40 + 1, optimiser, "bfloat16")
    state = start_state(make_tables(16))
    start, oracle = doubled(state.parameters), doubled_state(state)
    steps = {"first_step": 0, "num_steps": 98}
    bce = steps_triton.run_steps(state, interactions, known, settings, **steps)
    right = reference_steps(oracle, interactions, known, settings, **steps)
    assert float(bce) == pytest.approx(float(right), rel=1e-4)
    for result, expected, before in zip(state.parameters, oracle.parameters, start, strict=True):
        # Float32 is off by 3e-5; with a loss that reads tables as they are, not rounded, it is 1e-3.
        assert error(result - before, expected - before) < 2e-4


@pytest.mark.parametrize("table_dtype", TABLE_DTYPES)
def test_calls_of_one_step_are_a_call_of_many(table_dtype):
    torch.use_deterministic_algorithms(True)
    interactions, known, tables = make_batch(39 * 64 + 17), make_known(), make_tables(20)
    settings = StepSettings(LossSettings(5, 0.01), 0.01, 64, 3, "adam", table_dtype)
    states = [start_state(tables) for _ in range(2)]
    steps_triton.run_steps(states[0], interactions, known, settings, first_step=0, num_steps=40)
    for step in range(40):
        steps_triton.run_steps(states[1], interactions, known, settings, first_step=step, num_steps=1)
    for one, other in zip(*(state.parameters for state in states), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("lazy", [(True, True), (True, False), (False, True)], ids=["both", "users", "items"])
def test_lazy_adam_is_dense_adam_where_rows_wait(monkeypatch, lazy):
    monkeypatch.setattr(StepSettings, "lazy_tables", lambda *_: LazyTables(*lazy))
    # 1,250 steps, and more rows than batches can touch; few positives have most of the rows.
    generator = torch.Generator().manual_seed(0)
    users, items = ((torch.rand(5000, generator=generator) ** 4 * n).int().to(DEVICE) for n in (3000, 900))
    settings = StepSettings(LossSettings(1, 0.01), 0.01, 4, 1, "lazy_adam")
    check_lazy(Interactions(users, items), 3000, 900, settings)


def test_users_may_wait_where_all_items_are_touched():
    generator = torch.Generator().manual_seed(0)
    users, items = ((torch.rand(5000, generator=generator) ** 4 * n).int().to(DEVICE) for n in (3000, 13))
    check_lazy(Interactions(users, items), 3000, 13, StepSettings(LossSettings(5, 0.01), 0.01, 16, 1, "auto"))


def check_lazy(interactions, num_users, num_items, settings):
    """Against dense Adam in float64, over an epoch in one call."""
    tables = make_tables(16, num_users, num_items)
    state = start_state(tables)
    oracle = doubled_state(state)
    steps = {"first_step": 0, "num_steps": steps_per_epoch(len(interactions), settings.batch_size)}
    steps_triton.run_steps(state, interactions, None, settings, **steps)
    reference_steps(oracle, interactions, None, settings, **steps)
    for result, right, before in zip(state.parameters, oracle.parameters, tables, strict=True):
        assert error(result.double() - before, right - before) < 1e-5


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("table_dtype", TABLE_DTYPES)
def test_deterministic_runs_repeat_bit_for_bit(optimiser, table_dtype):
    torch.use_deterministic_algorithms(True)
    interactions, known = make_batch(20_000), make_known()
    settings = StepSettings(LossSettings(10, 0.01), 0.01, 4096, 3, optimiser, table_dtype)
    runs = []
    for _ in range(3):
        state = start_state(make_tables(32))
        bce = run_steps(state, interactions, known, settings, first_step=0, num_steps=5, backend="triton")
        runs.append((float(bce), state.parameters))
    for bce, parameters in runs[1:]:
        assert bce == runs[0][0]
        assert all(a.equal(b) for a, b in zip(parameters, runs[0][1], strict=True))


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_no_word_from_the_host_inside_an_epoch(optimiser):
    interactions, known = make_batch(10_000), make_known()
    settings = StepSettings(LossSettings(4), 0.01, batch_size=128, seed=3, optimiser=optimiser)
    state = start_state(make_tables(16))
    call = (state, interactions, known, settings)
    steps_triton.run_steps(*call, first_step=0, num_steps=79)
    torch.cuda.set_sync_debug_mode("error")
    try:
        bce = [steps_triton.run_steps(*call, first_step=79 * epoch, num_steps=79) for epoch in (1, 2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(bce[1]) < float(bce[0])
