"""Many training steps on a GPU: graphs, lazy Adam, shared negatives, bfloat16 tables, deterministic mode."""

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
    make_negatives,
    make_tables,
    start_state,
)

from fasttower_kernels.settings import LazyTables, LossSettings, NegativeSettings, StepSettings
from fasttower_kernels.step import Step, steps_per_epoch
from fasttower_kernels.step import reference as steps_reference
from fasttower_kernels.tables import Interactions

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)
if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

from fasttower_kernels.step import triton_gpu as steps_triton

OPTIMISERS = ["adam", "lazy_adam"]
TABLE_DTYPES = ["float32", "bfloat16"]
LOSS = LossSettings(user_l2=0.01, item_l2=0.01)


@pytest.fixture(autouse=True)
def _device():
    yield
    leave_a_lost_device()


def triton_steps(state, interactions, known, settings, **options):
    negatives = make_negatives(settings.negatives, interactions, state.parameters, known)
    return steps_triton.Steps(state, interactions, negatives, settings, **options)


def reference_steps(oracle, interactions, known, settings):
    """The same steps with dense Adam in plain torch."""
    negatives = make_negatives(settings.negatives, interactions, oracle.parameters, known)
    dense = replace(settings, optimiser="adam")
    return steps_reference.Steps(oracle, interactions, negatives, dense)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize(
    ("graphs", "deterministic"),
    [(True, False), (False, False), (True, True)],
    ids=["graphs", "plain", "sorted"],
)
def test_two_epochs(graphs, deterministic, optimiser):
    # 100 steps an epoch and a short last batch: more than one graph of many steps, and single ones.
    interactions, known = make_batch(99 * 64 + 17), make_known()
    settings = StepSettings(
        0.01, 64, 2**40 + 1, LOSS, NegativeSettings(count=5), optimiser, deterministic=deterministic
    )
    check_two_epochs(interactions, known, settings, graphs=graphs)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("proposal", ["shared", "in-batch", "mixed"])
def test_two_epochs_of_shared_negatives(graphs, proposal):
    negatives = NegativeSettings(proposal, count=20, block_size=24)
    settings = StepSettings(0.01, 64, 2**40 + 1, replace(LOSS, name="softmax"), negatives)
    check_two_epochs(make_batch(99 * 64 + 17), make_known(), settings, graphs=graphs)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("deterministic", [False, True], ids=["graphs", "sorted"])
def test_two_epochs_of_negatives_by_popularity(deterministic, optimiser):
    negatives, loss = NegativeSettings("popularity", count=5), replace(LOSS, name="softmax")
    settings = StepSettings(0.01, 64, 2**40 + 1, loss, negatives, optimiser, deterministic=deterministic)
    check_two_epochs(make_batch(99 * 64 + 17), make_known(), settings, graphs=not deterministic)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("deterministic", [False, True], ids=["graphs", "sorted"])
def test_hard_negatives(deterministic, optimiser):
    # Few steps: where tables differ by more than rounding, some choice differs in the end.
    interactions, known = make_batch(8 * 64 + 17), make_known()
    negatives = NegativeSettings("popularity", count=5, pool=12)
    settings = StepSettings(0.01, 64, 3, LOSS, negatives, optimiser, deterministic=deterministic)
    state = start_state(make_tables(16))
    start, oracle = doubled(state.parameters), doubled_state(state)
    value = triton_steps(state, interactions, known, settings).run(0, 9)
    right = reference_steps(oracle, interactions, known, settings).run(0, 9)
    assert float(value) == pytest.approx(float(right), rel=1e-5)
    for result, expected, before in zip(state.parameters, oracle.parameters, start, strict=True):
        assert error(result - before, expected - before) < 2e-5


def check_two_epochs(interactions, known, settings, *, graphs):
    """Against dense Adam in float64; 100 steps an epoch."""
    state = start_state(make_tables(16))
    start, oracle = doubled(state.parameters), doubled_state(state)
    assert steps_per_epoch(len(interactions), settings.batch_size) == 100
    steps = triton_steps(state, interactions, known, settings, graphs=graphs)
    expected_steps = reference_steps(oracle, interactions, known, settings)
    for first, count in ((0, 1), (1, 99), (100, 100)):
        value = steps.run(first, count)
        assert value.device == state.parameters.users.device
        assert float(value) == pytest.approx(float(expected_steps.run(first, count)), rel=1e-5)
    for result, expected, before in zip(state.parameters, oracle.parameters, start, strict=True):
        assert error(result - before, expected - before) < 2e-5


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("table_dtype", TABLE_DTYPES)
def test_graphs_do_what_launches_do_bit_for_bit(optimiser, table_dtype):
    # No row is in two positives, and there are no negatives: no sum depends on the order of its terms.
    size = 40 * 256 - 17  # more than one graph of many steps, single ones, and a short last batch
    rows = torch.arange(size, dtype=torch.int32, device=DEVICE)
    interactions, tables = Interactions(rows, rows.flip(0)), make_tables(16, size, size)
    loss, negatives = LossSettings(user_l2=0.1, item_l2=0.1), NegativeSettings(count=0)
    settings = StepSettings(0.01, 256, 5, loss, negatives, optimiser, table_dtype)
    states = [start_state(tables) for _ in range(2)]
    replayed, launched = (
        triton_steps(state, interactions, None, settings, graphs=graphs)
        for state, graphs in zip(states, (True, False), strict=True)
    )
    for first in (0, 40):
        assert float(replayed.run(first, 40)) == float(launched.run(first, 40))
    for name in ("parameters", "moments_1", "moments_2"):
        for one, other in zip(*(getattr(state, name) for state in states), strict=True):
            assert one.equal(other)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("dim", [6, 16, 128, 256])
@pytest.mark.parametrize("deterministic", [False, True])
def test_bfloat16_tables(optimiser, dim, deterministic):
    # Single steps from equal states, so that both round the same numbers.
    interactions, known = make_batch(99 * 64 + 17), make_known()
    settings = StepSettings(
        0.01, 64, 2**40 + 1, LOSS, NegativeSettings(count=5), optimiser, "bfloat16", deterministic
    )
    state = start_state(make_tables(dim))
    steps = triton_steps(state, interactions, known, settings)
    for step in (0, 1):
        oracle = doubled_state(state)
        right = reference_steps(oracle, interactions, known, settings).run(step, 1)
        assert float(steps.run(step, 1)) == pytest.approx(float(right), rel=1e-6)
        for result, expected in zip(state.moments_1, oracle.moments_1, strict=True):
            assert error(result, expected) < 5e-6


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_rounded_tables_follow_within_a_call(optimiser):
    # The copy that the loss reads is made anew only at the beginning of a call.
    interactions, known = make_batch(99 * 64 + 17), make_known()
    settings = StepSettings(0.01, 64, 2**40 + 1, LOSS, NegativeSettings(count=5), optimiser, "bfloat16")
    state = start_state(make_tables(16))
    start, oracle = doubled(state.parameters), doubled_state(state)
    value = triton_steps(state, interactions, known, settings).run(0, 98)
    right = reference_steps(oracle, interactions, known, settings).run(0, 98)
    assert float(value) == pytest.approx(float(right), rel=1e-4)
    for result, expected, before in zip(state.parameters, oracle.parameters, start, strict=True):
        # Float32 is off by 3e-5; with a loss that reads tables as they are, not rounded, it is 1e-3.
        assert error(result - before, expected - before) < 2e-4


@pytest.mark.parametrize("table_dtype", TABLE_DTYPES)
def test_calls_of_one_step_are_a_call_of_many(table_dtype):
    interactions, known, tables = make_batch(39 * 64 + 17), make_known(), make_tables(20)
    settings = StepSettings(0.01, 64, 3, LOSS, NegativeSettings(count=5), "adam", table_dtype, True)
    states = [start_state(tables) for _ in range(2)]
    many, single = (triton_steps(state, interactions, known, settings) for state in states)
    many.run(0, 40)
    for step in range(40):
        single.run(step, 1)
    for one, other in zip(*(state.parameters for state in states), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("lazy", [(True, True), (True, False), (False, True)], ids=["both", "users", "items"])
def test_lazy_adam_is_dense_adam_where_rows_wait(monkeypatch, lazy):
    monkeypatch.setattr(StepSettings, "lazy_tables", lambda *_: LazyTables(*lazy))
    # 1,250 steps, and more rows than batches can touch; few positives have most of the rows.
    generator = torch.Generator().manual_seed(0)
    users, items = ((torch.rand(5000, generator=generator) ** 4 * n).int().to(DEVICE) for n in (3000, 900))
    settings = StepSettings(0.01, 4, 1, LOSS, NegativeSettings(count=1), "lazy_adam")
    check_lazy(Interactions(users, items), 3000, 900, settings)


def test_users_may_wait_where_all_items_are_touched():
    generator = torch.Generator().manual_seed(0)
    users, items = ((torch.rand(5000, generator=generator) ** 4 * n).int().to(DEVICE) for n in (3000, 13))
    settings = StepSettings(0.01, 16, 1, LOSS, NegativeSettings(count=5), "auto")
    check_lazy(Interactions(users, items), 3000, 13, settings)


def check_lazy(interactions, num_users, num_items, settings):
    """Against dense Adam in float64, over an epoch in one call."""
    tables = make_tables(16, num_users, num_items)
    state = start_state(tables)
    oracle = doubled_state(state)
    steps = steps_per_epoch(len(interactions), settings.batch_size)
    triton_steps(state, interactions, None, settings).run(0, steps)
    reference_steps(oracle, interactions, None, settings).run(0, steps)
    for result, right, before in zip(state.parameters, oracle.parameters, tables, strict=True):
        assert error(result.double() - before, right - before) < 1e-5


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("table_dtype", TABLE_DTYPES)
def test_deterministic_runs_repeat_bit_for_bit(optimiser, table_dtype):
    interactions, known = make_batch(20_000), make_known()
    settings = StepSettings(0.01, 4096, 3, LOSS, NegativeSettings(count=10), optimiser, table_dtype, True)
    runs = []
    for _ in range(3):
        state = start_state(make_tables(32))
        negatives = make_negatives(settings.negatives, interactions, state.parameters, known)
        value = Step(state, interactions, negatives, settings, backend="triton").run(0, 5)
        runs.append((float(value), state.parameters))
    for value, parameters in runs[1:]:
        assert value == runs[0][0]
        assert all(a.equal(b) for a, b in zip(parameters, runs[0][1], strict=True))


@pytest.mark.parametrize(
    ("optimiser", "proposal", "pool"),
    [
        ("adam", "uniform", 0),
        ("lazy_adam", "uniform", 0),
        ("lazy_adam", "popularity", 9),
        ("adam", "mixed", 0),
    ],
)
def test_no_word_from_the_host_inside_an_epoch(optimiser, proposal, pool):
    negatives = NegativeSettings(proposal, count=4, pool=pool, block_size=32)
    settings = StepSettings(0.01, 128, 3, negatives=negatives, optimiser=optimiser)
    steps = triton_steps(start_state(make_tables(16)), make_batch(10_000), make_known(), settings)
    steps.run(0, 79)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [steps.run(79 * epoch, 79) for epoch in (1, 2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(losses[1]) < float(losses[0])
