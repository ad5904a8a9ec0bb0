"""The Triton backend on a GPU: against the reference, and what no interpreter shows, races and graphs."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import reference as negatives_reference
from fasttower_kernels.philox import seed_key
from fasttower_kernels.sampled_bce import LossSettings
from fasttower_kernels.sampled_bce import reference as bce_reference
from fasttower_kernels.shuffle import epoch_key
from fasttower_kernels.shuffle import reference as shuffle_reference
from fasttower_kernels.tables import Interactions, Tables, padded
from fasttower_kernels.train_steps import StepSettings, TrainState, run_steps, steps_per_epoch
from fasttower_kernels.train_steps import reference as steps_reference

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)
if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from fasttower_kernels.adam import triton_gpu as adam_triton
from fasttower_kernels.negatives import triton_gpu as negatives_triton
from fasttower_kernels.sampled_bce import triton_gpu as bce_triton
from fasttower_kernels.shuffle import triton_gpu as shuffle_triton
from fasttower_kernels.train_steps import lazy_triton_gpu
from fasttower_kernels.train_steps import triton_gpu as steps_triton
from fasttower_kernels.train_steps.state import LazyTables

DEVICE = torch.device("cuda")
KEY = seed_key(0xFEDCBA9876543210 >> 1)
NUM_USERS, NUM_ITEMS = 300, 500


@pytest.fixture(autouse=True)
def _modes():
    yield
    torch.use_deterministic_algorithms(False)


def make_known(search=False, num_users=NUM_USERS, num_items=NUM_ITEMS):
    """User 0 has touched everything, user 1 all but one item, user 2 nothing."""
    generator = torch.Generator().manual_seed(2)
    share = torch.rand(num_users, generator=generator)
    share[0] = 2
    touched = torch.rand(num_users, num_items, generator=generator) < share[:, None]
    touched[1] = True
    touched[1, 17] = False
    touched[2] = False
    users, items = touched.nonzero(as_tuple=True)
    known = KnownPositives.from_pairs(users.int(), items.int(), num_users, num_items).to(DEVICE)
    if search:
        negatives_triton._exclusions[id(known)] = negatives_triton.Exclusion(known.indptr, known.items, None)
    return known


def make_tables(dim, num_users=NUM_USERS, num_items=NUM_ITEMS, bias=True):
    generator = torch.Generator().manual_seed(dim)
    users, items = (torch.zeros(n, padded(dim)) for n in (num_users, num_items))
    for table in (users, items):
        table[:, :dim] = torch.randn(len(table), dim, generator=generator) / dim**0.5
    item_bias = torch.randn(num_items, generator=generator).to(DEVICE) if bias else None
    return Tables(users.to(DEVICE), items.to(DEVICE), item_bias)


def make_batch(size, num_users=NUM_USERS, num_items=NUM_ITEMS):
    generator = torch.Generator().manual_seed(size)
    return Interactions(
        torch.randint(num_users, (size,), generator=generator, dtype=torch.int32).to(DEVICE),
        torch.randint(num_items, (size,), generator=generator, dtype=torch.int32).to(DEVICE),
    )


def copied(state):
    return TrainState(
        *(
            Tables(*(array.clone() for array in tables))
            for tables in (state.parameters, state.gradients, state.moments_1, state.moments_2)
        )
    )


def doubled(tables):
    return Tables(*(table.double() for table in tables))


def error(result, oracle):
    return float((result.double() - oracle).norm() / oracle.norm().clamp_min(1e-300))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 1000, 1_000_209])
def test_shuffle(num_rows):
    positions, key = torch.arange(num_rows, device=DEVICE), epoch_key(5, 2)
    rows = shuffle_triton.shuffled_rows(positions, num_rows, key)
    assert rows.equal(shuffle_reference.shuffled_rows(positions, num_rows, key))


@pytest.mark.parametrize("mode", ["plain", "bitmap", "search"])
@pytest.mark.parametrize("num_negatives", [1, 10, 1003])
def test_negatives(mode, num_negatives):
    known = None if mode == "plain" else make_known(mode == "search")
    users = torch.arange(2 * NUM_USERS, device=DEVICE).int() % NUM_USERS
    draw = {"key": KEY, "step": 2**32 - 1, "known_positives": known, "first_position": 7}
    negatives = negatives_triton.sample_negatives(users, num_negatives, NUM_ITEMS, **draw)
    expected = negatives_reference.sample_negatives(users, num_negatives, NUM_ITEMS, **draw)
    counts = (
        torch.ones_like(users, dtype=torch.bool) if known is None else known.degrees[users.long()] < NUM_ITEMS
    )
    assert negatives[counts].equal(expected[counts])


@pytest.mark.parametrize("dim", [1, 3, 16, 64, 100, 128, 256, 512])
@pytest.mark.parametrize("mode", ["plain", "bitmap", "search"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients(dim, mode, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    known = None if mode == "plain" else make_known(mode == "search")
    settings, tables, batch = LossSettings(10, 0.1), make_tables(dim), make_batch(1009)
    oracle, gradients = doubled(tables).zeros_like(), tables.zeros_like()
    torch.use_deterministic_algorithms(False)
    bce = bce_reference.train_step(doubled(tables), oracle, batch, known, settings, key=KEY, step=3)
    torch.use_deterministic_algorithms(deterministic)
    result = bce_triton.train_step(tables, gradients, batch, known, settings, key=KEY, step=3)
    assert float(result) == pytest.approx(float(bce), rel=1e-6)
    for gradient, right in zip(gradients, oracle, strict=True):
        assert error(gradient, right) < 2e-6


@pytest.mark.parametrize("dim", [16, 64])
def test_races(dim):
    # Every positive is of one of 2 users and 3 items, so that adds that are not atomic lose most of the sum.
    # The order of 40,000 adds to an item alone makes a difference of about 1e-5.
    tables, batch = make_tables(dim, 2, 3), make_batch(20_000, 2, 3)
    settings, oracle = LossSettings(5, 0.1), doubled(tables).zeros_like()
    bce_reference.train_step(doubled(tables), oracle, batch, None, settings, key=KEY, step=3)
    for _ in range(20):
        gradients = tables.zeros_like()
        bce_triton.train_step(tables, gradients, batch, None, settings, key=KEY, step=3)
        for gradient, right in zip(gradients, oracle, strict=True):
            assert error(gradient, right) < 1e-4


def test_adam():
    tables = make_tables(12)
    state, oracle = TrainState.start(tables), TrainState.start(doubled(tables))
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 5):
        for gradient, right in zip(state.gradients, oracle.gradients, strict=True):
            gradient.copy_(torch.randn(gradient.shape, generator=generator))
            right.copy_(gradient)
        for one, adam_step in ((state, adam_triton.adam_step), (oracle, _reference_adam())):
            adam_step(
                one.parameters, one.gradients, one.moments_1, one.moments_2, count=count, learning_rate=0.1
            )
    for result, right in zip(state.parameters, oracle.parameters, strict=True):
        assert error(result, right) < 1e-6
    assert not any(bool(gradient.any()) for gradient in state.gradients)


def _reference_adam():
    from fasttower_kernels.adam.reference import adam_step

    return adam_step


@pytest.mark.parametrize("optimiser", ["adam", "lazy_adam"])
@pytest.mark.parametrize(
    ("graphs", "deterministic"),
    [(True, False), (False, False), (True, True)],
    ids=["graphs", "plain", "sorted"],
)
def test_two_epochs(graphs, deterministic, optimiser):
    # 100 steps an epoch and a short last batch: more than one graph of many steps, and single ones.
    interactions, known = make_batch(99 * 64 + 17), make_known()
    settings = StepSettings(LossSettings(5, 0.01), 0.01, batch_size=64, seed=2**40 + 1, optimiser=optimiser)
    state = TrainState.start(make_tables(16))
    oracle = copied(state)
    steps = steps_per_epoch(len(interactions), 64)
    assert steps == 100
    for first, count in ((0, 1), (1, 99), (100, 100)):
        torch.use_deterministic_algorithms(deterministic)
        bce = steps_triton.run_steps(
            state, interactions, known, settings, first_step=first, num_steps=count, graphs=graphs
        )
        torch.use_deterministic_algorithms(False)
        right = steps_reference.run_steps(
            oracle,
            interactions,
            known,
            replace(settings, optimiser="adam"),
            first_step=first,
            num_steps=count,
        )
        assert bce.device.type == "cuda"
        assert float(bce) == pytest.approx(float(right), rel=1e-3)
    for result, expected in zip(state.parameters, oracle.parameters, strict=True):
        # Adam makes a whole step of a gradient near 0, whose sign is rounding's.
        assert error(result, expected.double()) < 1e-2


@pytest.mark.parametrize("optimiser", ["adam", "lazy_adam"])
@pytest.mark.parametrize("dim", [6, 16, 128, 256])
@pytest.mark.parametrize("deterministic", [False, True])
def test_bfloat16_tables(optimiser, dim, deterministic):
    # Single steps from equal states, so that both round the same numbers; then many in one call, with graphs.
    interactions, known = make_batch(99 * 64 + 17), make_known()
    settings = StepSettings(LossSettings(5, 0.01), 0.01, 64, 2**40 + 1, optimiser, "bfloat16")
    state = TrainState.start(make_tables(dim))
    for step in (0, 1):
        oracle = TrainState(
            *(doubled(t) for t in (state.parameters, state.gradients, state.moments_1, state.moments_2))
        )
        torch.use_deterministic_algorithms(deterministic)
        bce = steps_triton.run_steps(state, interactions, known, settings, first_step=step, num_steps=1)
        torch.use_deterministic_algorithms(False)
        dense = replace(settings, optimiser="adam")
        right = steps_reference.run_steps(oracle, interactions, known, dense, first_step=step, num_steps=1)
        assert float(bce) == pytest.approx(float(right), rel=1e-6)
        for result, expected in zip(state.moments_1, oracle.moments_1, strict=True):
            assert error(result, expected) < 5e-6
    torch.use_deterministic_algorithms(deterministic)
    steps_triton.run_steps(state, interactions, known, settings, first_step=2, num_steps=98)
    plan = state.prepared[steps_triton.__name__]
    for table, copy in ((state.parameters.users, plan.read.users), (state.parameters.items, plan.read.items)):
        assert table.isfinite().all()
        assert copy.equal(table.bfloat16())


@triton.jit
def claims_kernel(stamps_ptr, rows_ptr, owners_ptr, count, now):
    index = tl.program_id(0) * 128 + tl.arange(0, 8)[:, None] * 16 + tl.arange(0, 16)[None, :]
    there = index < count
    rows = tl.load(rows_ptr + index, mask=there, other=0)
    behind = now - lazy_triton_gpu._claim(stamps_ptr, rows, there, now)
    tl.atomic_add(owners_ptr + rows, 1, mask=behind > 0)


def test_a_row_has_one_owner():
    # Half a million pairs, most of which want a few popular rows.
    rows = (torch.rand(500_009, device=DEVICE) ** 6 * 1000).int()
    stamps, owners = (torch.zeros(1001, dtype=torch.int32, device=DEVICE) for _ in range(2))
    for now in range(1, 6):
        claims_kernel[(triton.cdiv(len(rows), 128),)](stamps, rows, owners, len(rows), now)
    wanted = torch.bincount(rows.long(), minlength=1001) > 0
    assert owners.equal(5 * wanted.int())
    assert stamps.equal(5 * wanted.int())


@pytest.mark.parametrize("lazy", [(True, True), (True, False), (False, True)], ids=["both", "users", "items"])
def test_lazy_adam_is_dense_adam_where_rows_wait(monkeypatch, lazy):
    monkeypatch.setattr(StepSettings, "lazy_tables", lambda *_: LazyTables(*lazy))
    # 1,250 steps, and more rows than batches can touch; few positives have most of the rows.
    generator = torch.Generator().manual_seed(0)
    users, items = ((torch.rand(5000, generator=generator) ** 4 * n).int().to(DEVICE) for n in (3000, 900))
    interactions, tables = Interactions(users, items), make_tables(16, 3000, 900)
    settings = StepSettings(LossSettings(1, 0.01), 0.01, batch_size=4, seed=1, optimiser="lazy_adam")
    state = TrainState.start(Tables(*(table.clone() for table in tables)))
    oracle = TrainState.start(doubled(tables))
    steps = {"first_step": 0, "num_steps": 1250}
    steps_triton.run_steps(state, interactions, None, settings, **steps)
    steps_reference.run_steps(oracle, interactions, None, replace(settings, optimiser="adam"), **steps)
    for result, right, before in zip(state.parameters, oracle.parameters, tables, strict=True):
        assert error(result.double() - before, right - before) < 1e-5


@pytest.mark.parametrize("optimiser", ["adam", "lazy_adam"])
def test_deterministic_runs_repeat_bit_for_bit(optimiser):
    torch.use_deterministic_algorithms(True)
    interactions, known = make_batch(20_000), make_known()
    settings = StepSettings(LossSettings(10, 0.01), 0.01, batch_size=4096, seed=3, optimiser=optimiser)
    runs = []
    for _ in range(3):
        state = TrainState.start(make_tables(32))
        bce = run_steps(state, interactions, known, settings, first_step=0, num_steps=5, backend="triton")
        runs.append((float(bce), state.parameters))
    for bce, parameters in runs[1:]:
        assert bce == runs[0][0]
        assert all(a.equal(b) for a, b in zip(parameters, runs[0][1], strict=True))


@pytest.mark.parametrize("optimiser", ["adam", "lazy_adam"])
def test_no_word_from_the_host_inside_an_epoch(optimiser):
    interactions, known = make_batch(10_000), make_known()
    settings = StepSettings(LossSettings(4), 0.01, batch_size=128, seed=3, optimiser=optimiser)
    state = TrainState.start(make_tables(16))
    call = (state, interactions, known, settings)
    steps_triton.run_steps(*call, first_step=0, num_steps=79)
    torch.cuda.set_sync_debug_mode("error")
    try:
        bce = [steps_triton.run_steps(*call, first_step=79 * epoch, num_steps=79) for epoch in (1, 2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(bce[1]) < float(bce[0])


def test_rows_past_2_31_elements():
    num_users, width = 2**29 + 8, 4
    free, _ = torch.cuda.mem_get_info()
    if free < 20 << 30:
        pytest.skip("less than 20 GiB of free device memory")
    users, gradients = (torch.zeros(num_users, width, device=DEVICE) for _ in range(2))
    users[-1] = 0.25
    items, item_gradients = torch.ones(3, width, device=DEVICE), torch.zeros(3, width, device=DEVICE)
    batch = Interactions(*(torch.tensor([i], dtype=torch.int32, device=DEVICE) for i in (num_users - 1, 1)))
    bce_triton.train_step(
        Tables(users, items), Tables(gradients, item_gradients), batch, None, LossSettings(0), key=KEY, step=0
    )
    slope = float(torch.sigmoid(torch.tensor(1.0, dtype=torch.float64))) - 1
    assert float(gradients[-1, 0]) == pytest.approx(slope, rel=1e-6)
    assert float(gradients.abs().sum()) == pytest.approx(-4 * slope, rel=1e-6)
