"""The cases of bfloat16 tables of `test_triton_interpreter`: run there, with TRITON_INTERPRET=1."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is not 1: run test_triton_interpreter.py", allow_module_level=True)

from triton_interpreter_cases import (
    SETTINGS,
    both_l2,
    doubled,
    error,
    known_positives,
    lazy_example,
    make_batch,
    make_tables,
    steps_of,
)

from fasttower_kernels import triton_tiles
from fasttower_kernels.settings import LazyTables, NegativeSettings, StepSettings
from fasttower_kernels.step import TrainState, device_memory
from fasttower_kernels.step import reference as steps_reference
from fasttower_kernels.step import triton_gpu as steps_triton
from fasttower_kernels.tables import Tables

BFLOAT16 = replace(SETTINGS, table_dtype="bfloat16")
EDGE = 64


@pytest.fixture(autouse=True)
def _conversions(monkeypatch):
    """The interpreter cuts off where a GPU rounds, and is wrong on subnormals: here torch converts."""
    original = interpreter._convert_float

    def convert(values, source, target, rounding_mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return np.asarray(values).view(np.uint16).astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = torch.tensor(np.asarray(values)).bfloat16().view(torch.int16)
            return bits.numpy().view(np.uint16)
        return original(values, source, target, rounding_mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture(autouse=True)
def _guarded_copies(monkeypatch):
    """Rounded tables between NaN, which must be there afterwards, and start as NaN."""
    wholes = []

    def guarded(parameters):
        arrays = []
        for table in (parameters.users, parameters.items):
            whole = torch.full((table.numel() + 2 * EDGE,), float("nan"), dtype=torch.bfloat16)
            wholes.append(whole)
            arrays.append(whole[EDGE:-EDGE].view(table.shape))
        return Tables(*arrays, parameters.item_bias)

    monkeypatch.setattr(steps_triton, "_rounded", guarded)
    yield
    assert all(bool(edge.isnan().all()) for whole in wholes for edge in (whole[:EDGE], whole[-EDGE:]))


@pytest.fixture
def large_programs(monkeypatch):
    for block in triton_tiles.TILES:
        monkeypatch.setitem(triton_tiles.TILES, block, triton_tiles.Tile(32, 1))


def in_float64(state):
    """A copy of the state; float32 numbers stay what they are, and round to the same bfloat16."""
    return TrainState(
        *(doubled(t) for t in (state.parameters, state.gradients, state.moments_1, state.moments_2))
    )


def check_copies(steps, state):
    """The tables that the loss reads are the masters, rounded."""
    assert steps.read.users.equal(state.parameters.users.bfloat16())
    assert steps.read.items.equal(state.parameters.items.bfloat16())
    assert steps.read.item_bias is state.parameters.item_bias


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize(
    ("dim", "bias", "optimiser", "deterministic"),
    [
        (6, True, "adam", False),
        (16, False, "adam", True),
        (37, True, "lazy_adam", False),
        (6, False, "lazy_adam", True),
    ],
)
def test_single_steps(dim, bias, optimiser, deterministic):
    """Each against the reference from the same state, so that both round the same numbers."""
    settings = replace(BFLOAT16, optimiser=optimiser, deterministic=deterministic)
    dense, data = replace(settings, optimiser="adam"), (make_batch(26), known_positives())
    state = TrainState.start(make_tables(dim, bias=bias))
    steps = steps_of(steps_triton, state, *data, settings)
    for step in (4, 5):
        # Somebody else may have changed the tables between calls.
        state.parameters.items[:, 0] += 0.37
        oracle, unrounded = in_float64(state), in_float64(state)
        value = steps.run(step, 1)
        expected = steps_of(steps_reference, oracle, *data, dense).run(step, 1)
        steps_of(steps_reference, unrounded, *data, replace(dense, table_dtype="float32")).run(step, 1)
        assert float(value) == pytest.approx(float(expected), rel=1e-6)
        for result, right in zip(
            (*state.parameters, *state.moments_1), (*oracle.parameters, *oracle.moments_1), strict=True
        ):
            assert error(result, right) < 2e-6
        assert error(state.moments_1.users, unrounded.moments_1.users) > 1e-4
        assert not any(bool(gradient.any()) for gradient in state.gradients)
        check_copies(steps, state)


@pytest.mark.parametrize(
    ("lazy", "deterministic"),
    [
        (LazyTables(False, False), False),
        (LazyTables(False, False), True),
        (LazyTables(True, True), False),
        pytest.param(LazyTables(True, False), False, marks=pytest.mark.slow),
        (LazyTables(False, True), False),
    ],
)
def test_steps_of_one_call(monkeypatch, lazy, deterministic):
    """The loss of a step reads what the step before has written; lazy rows are caught up when it does."""
    monkeypatch.setattr(StepSettings, "lazy_tables", lambda *_: lazy)
    # Two positives a program, so that rows are wanted by several programs.
    monkeypatch.setitem(triton_tiles.TILES, 8, triton_tiles.Tile(2, 1))
    data = lazy_example(5, 4)
    settings = StepSettings(
        0.05,
        4,
        7,
        both_l2(0.01),
        NegativeSettings(count=2),
        table_dtype="bfloat16",
        deterministic=deterministic,
    )
    tables = make_tables(5, num_users=10, num_items=47)
    state = TrainState.start(Tables(*(table.clone() for table in tables)))
    oracle = in_float64(state)
    steps = steps_of(steps_triton, state, *data, settings)
    value = steps.run(5, 5)
    right = steps_of(steps_reference, oracle, *data, replace(settings, optimiser="adam")).run(5, 5)
    assert float(value) == pytest.approx(float(right), rel=1e-5)
    for result, expected, before in zip(state.parameters, oracle.parameters, tables, strict=True):
        assert error(result.double() - before, expected - before) < 1e-4
    check_copies(steps, state)


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize("optimiser", ["adam", "lazy_adam"])
def test_updates_too_small_for_bfloat16_add_up(optimiser):
    settings = replace(BFLOAT16, optimiser=optimiser, learning_rate=1e-5)
    tables = make_tables(4)
    tables.users.fill_(1.0)  # its neighbours in bfloat16 are 2^-8 and 2^-7 away
    state = TrainState.start(Tables(*(table.clone() for table in tables)))
    oracle = in_float64(state)
    data = make_batch(26), known_positives()
    steps = steps_of(steps_triton, state, *data, settings)
    steps.run(0, 3)
    steps_of(steps_reference, oracle, *data, settings).run(0, 3)
    moved = (state.parameters.users - 1).abs()
    assert bool((moved[:, 0] > 0).any())
    assert float(moved.max()) < 4e-5
    torch.testing.assert_close(state.parameters.users.double(), oracle.parameters.users, rtol=0, atol=5e-7)
    check_copies(steps, state)
    assert bool((steps.read.users == 1).all())


@pytest.mark.usefixtures("large_programs")
def test_float32_has_no_copies():
    state = TrainState.start(make_tables(4))
    steps = steps_of(steps_triton, state, make_batch(5), None, SETTINGS)
    assert steps.rounded is None
    assert steps.batch.step.arguments["users_ptr"] is state.parameters.users
    assert steps.batch.step.arguments["items_ptr"] is state.parameters.items
    assert steps.update.arguments["rounded_users_ptr"] is steps.update.arguments["rounded_items_ptr"] is None


def test_room():
    numbers = {"num_users": 100, "num_items": 30, "width": 8, "num_rows": 50, "num_known": 40}
    plain = device_memory.resident_bytes(**numbers)
    rounded = device_memory.resident_bytes(**numbers, table_dtype="bfloat16")
    assert sum(rounded.values()) - sum(plain.values()) == 2 * 130 * 8
    assert rounded["rounded tables"] == 2 * 130 * 8
