"""The cases of every loss of `test_triton_interpreter`: run there, with TRITON_INTERPRET=1.

The gradients of own negatives against float64 autograd of the contract, and whole steps of either dataflow
against those of plain torch in float64.
"""

import os
from dataclasses import replace

import pytest
import torch
from step.oracle import (
    KEY,
    NUM_ITEMS,
    NUM_USERS,
    STEP,
    make_batch,
    make_known,
    make_negatives,
    make_tables,
    oracle,
)

from fasttower_kernels import triton_tiles
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.settings import LossSettings, NegativeSettings, StepSettings
from fasttower_kernels.step import TrainState, reference, triton_gpu
from fasttower_kernels.step.gradients import reference as plain_gradients
from fasttower_kernels.step.gradients import triton_gpu as gradients
from fasttower_kernels.step.own_negatives import triton_gpu as own
from fasttower_kernels.step.shared_negatives import triton_gpu as shared
from fasttower_kernels.tables import Tables

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is not 1: run test_triton_interpreter.py", allow_module_level=True)

L2 = {"user_l2": 0.3, "item_l2": 0.2, "bias_l2": 0.1}
LOSSES = {
    "bce": LossSettings(**L2),
    "bce, cosine": LossSettings(similarity="cosine", temperature=1.5),
    "gbce": LossSettings("gbce", 0.8, item_l2=0.2),
    "gbce, cosine": LossSettings("gbce", 0.6, similarity="cosine", temperature=0.5, user_l2=0.1),
    "bpr": LossSettings("bpr"),
    "bpr, cosine": LossSettings("bpr", similarity="cosine", temperature=0.5, bias_l2=0.3),
    "softmax": LossSettings("softmax", user_l2=0.1),
    "softmax, cosine": LossSettings("softmax", similarity="cosine", temperature=0.4, **L2),
}
SHAPES = [(3, 21, 5, True, True), (6, 9, 2, False, False)]  # dim, size, negatives, exclude, bias
CASES = [
    pytest.param(
        loss,
        *shape,
        marks=() if shape == SHAPES[loss.is_cosine] else pytest.mark.slow,
        id=f"{name}-{shape[0]}",
    )
    for name, loss in LOSSES.items()
    for shape in SHAPES
]


@pytest.fixture(autouse=True)
def _large_programs(monkeypatch):
    """The interpreter's time goes by operations, not by elements."""
    for block in triton_tiles.TILES:
        monkeypatch.setitem(triton_tiles.TILES, block, triton_tiles.Tile(32, 1))
    for tiles in shared.TILES, shared.SPLIT_TILES:
        for block in tiles:
            monkeypatch.setitem(tiles, block, shared.ProductTile(32, 32, 4))


def error(result, right):
    """|result - right| / |right|."""
    return float((result.double() - right).norm() / right.norm().clamp_min(1e-300))


@pytest.mark.parametrize(("loss", "dim", "size", "count", "exclude", "bias"), CASES)
def test_gradients(loss, dim, size, count, exclude, bias):
    tables, batch = make_tables(dim, scale=0.7, bias=bias), make_batch(size)
    negatives = make_negatives(NegativeSettings(count=count), exclude=exclude)
    sums = tables.zeros_like()
    value = gradients.add_gradients(tables, sums, batch, negatives, loss, key=KEY, step=STEP)
    right_value, _, right = oracle(tables, batch, negatives, loss)
    assert float(value) == pytest.approx(float(right_value), rel=1e-6)
    for result, expected in zip(sums, right, strict=True):
        assert error(result, expected) < 5e-7
        assert bool((result == 0)[expected == 0].all())
    again = gradients.loss_sum(tables, batch, negatives, loss, key=KEY, step=STEP)
    assert float(again) == pytest.approx(float(value), rel=1e-6)


@pytest.mark.parametrize("loss", ["gbce", "bpr", "softmax"])
def test_sums_in_a_fixed_order(loss):
    tables, batch = make_tables(3, scale=0.7), make_batch(9)
    negatives, sums = make_negatives(NegativeSettings(count=5)), tables.zeros_like()
    call = (tables, sums, batch, negatives, LOSSES[loss])
    own.run_batch(*call, key=KEY, step=STEP, deterministic=True)
    for result, expected in zip(sums, oracle(tables, *call[2:])[2], strict=True):
        assert error(result, expected) < 5e-7


@pytest.mark.parametrize("loss", ["gbce", "bpr", "softmax"])
def test_no_negatives(loss):
    tables, batch = make_tables(4), make_batch(5)
    negatives, sums = make_negatives(NegativeSettings(count=0)), tables.zeros_like()
    value = gradients.add_gradients(tables, sums, batch, negatives, LOSSES[loss], key=KEY, step=STEP)
    right_value, _, right = oracle(tables, batch, negatives, LOSSES[loss])
    assert float(value) == pytest.approx(float(right_value), rel=1e-6, abs=1e-6)
    for result, expected in zip(sums, right, strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_short_vectors_and_large_logits(similarity):
    # Logits of 10^4, in both directions; a vector of 0, and one below the least norm.
    loss = LossSettings("softmax", similarity=similarity)
    tables = make_tables(4, scale=100.0)
    tables.users[3] = tables.items[3] = 0
    tables.users[4] *= 1e-12
    tables.items[4] *= 1e-12
    call = (make_batch(30), make_negatives(NegativeSettings(count=5)), loss)
    sums, plain = tables.zeros_like(), tables.zeros_like()
    value = gradients.add_gradients(tables, sums, *call, key=KEY, step=STEP)
    plain_gradients.add_gradients(tables, plain, *call, key=KEY, step=STEP)
    right_value, _, right = oracle(tables, *call)
    assert float(value) == pytest.approx(float(right_value), rel=1e-6)
    for result, other, expected in zip(sums, plain, right, strict=True):
        # A slope has the absolute error of a logit, in plain torch too.
        assert error(result, expected) < 4 * error(other, expected)


SETTINGS = StepSettings(0.05, 10, 9, LossSettings("softmax", **L2), NegativeSettings(count=3))
STEPS = {
    "own": SETTINGS,
    "own, cosine, lazy": replace(SETTINGS, loss=LOSSES["softmax, cosine"], optimiser="lazy_adam"),
    "in-batch": replace(SETTINGS, negatives=NegativeSettings("in-batch", block_size=4)),
    "mixed": replace(SETTINGS, negatives=NegativeSettings("mixed", count=3, block_size=4)),
}


@pytest.mark.parametrize("settings", STEPS.values(), ids=STEPS)
def test_two_epochs(settings):
    """Of 3 steps, the last one short, in a call each."""
    interactions, tables = make_batch(26), make_tables(6, scale=0.7)
    negatives = Negatives.of(settings.negatives, interactions, NUM_USERS, NUM_ITEMS, make_known())
    state, right = (
        TrainState.start(Tables(*(table.clone().to(dtype) for table in tables)))
        for dtype in (torch.float32, torch.float64)
    )
    steps = triton_gpu.Steps(state, interactions, negatives, settings)
    dense = reference.Steps(right, interactions, negatives, replace(settings, optimiser="adam"))
    for first in (0, 3):
        assert float(steps.run(first, 3)) == pytest.approx(float(dense.run(first, 3)), rel=1e-6)
        for result, expected, before in zip(state.parameters, right.parameters, tables, strict=True):
            assert error(result.double() - before, expected - before) < 3e-6
        for result, expected in zip(
            (*state.moments_1, *state.moments_2), (*right.moments_1, *right.moments_2), strict=True
        ):
            assert error(result, expected) < 3e-6
        assert not any(bool(gradient.any()) for gradient in state.gradients)
