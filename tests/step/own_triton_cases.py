"""The cases of every loss of `test_triton_interpreter`: run there, with TRITON_INTERPRET=1.

What `test_contract` leaves out: losses with cosine similarity, edges, sums in a fixed order, and whole steps
of either dataflow against those of plain torch in float64.
"""

import os
from dataclasses import replace

import pytest
import torch
from step.large_programs import large_programs  # noqa: F401 - a fixture of every test
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

from fasttower_kernels import membership
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.negatives import reference as plain_draws
from fasttower_kernels.negatives import triton_gpu as draws
from fasttower_kernels.settings import LossSettings, NegativeSettings, StepSettings
from fasttower_kernels.similarity import read_items, read_users
from fasttower_kernels.step import TrainState, reference, triton_gpu
from fasttower_kernels.step.gradients import reference as plain_gradients
from fasttower_kernels.step.gradients import triton_gpu as gradients
from fasttower_kernels.step.own_negatives import triton_gpu as own
from fasttower_kernels.tables import Tables
from fasttower_kernels.triton_launch import signed_word

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is not 1: run test_triton_interpreter.py", allow_module_level=True)

TWO = NegativeSettings(count=2)
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


def error(result, right):
    """|result - right| / |right|."""
    return float((result.double() - right).norm() / right.norm().clamp_min(1e-300))


@pytest.mark.parametrize("name", ["gbce, cosine", "bpr, cosine"])
def test_cosine(name):
    tables, batch, negatives = make_tables(6, scale=0.7), make_batch(9), make_negatives(TWO, exclude=False)
    sums = tables.zeros_like()
    value = gradients.add_gradients(tables, sums, batch, negatives, LOSSES[name], key=KEY, step=STEP)
    right_value, _, right = oracle(tables, batch, negatives, LOSSES[name])
    assert float(value) == pytest.approx(float(right_value), rel=1e-6)
    for result, expected in zip(sums, right, strict=True):
        assert error(result, expected) < 5e-7
        assert bool((result == 0)[expected == 0].all())


@pytest.mark.parametrize("known", [None, "bitmaps", "filters"])
def test_draws_by_popularity(monkeypatch, known):
    if known == "filters":
        monkeypatch.setattr(draws, "BITMAP_LIMIT_BYTES", 0)
        monkeypatch.setattr(membership, "BITMAP_WORDS_PER_FILTER_WORD", 0)
    users = torch.arange(21, dtype=torch.int32) % NUM_USERS
    negatives = make_negatives(NegativeSettings("popularity"), exclude=known is not None)
    known = negatives.known_positives
    call = {"known_positives": known, "popularity": negatives.popularity, "first_position": 11}
    result = draws.sample_negatives(users, 6, NUM_ITEMS, key=KEY, step=2**32 - 1, **call)
    right = plain_draws.draw(users, 6, NUM_ITEMS, key=KEY, step=2**32 - 1, **call)
    counts = users < NUM_USERS if known is None else known.degrees[users.long()] < NUM_ITEMS
    assert result[counts].equal(right.items[counts])
    assert bool(right.by_rank[counts].any()) == (known is not None)


@pytest.mark.parametrize("cosine", [False, True])
def test_the_hardest_of_a_pool_are_kept(cosine):
    """Of equal items, and of equal draws, the earlier."""
    loss = LossSettings(similarity="cosine" if cosine else "dot")
    tables = make_tables(4)
    batch = replace(make_batch(30), user_index=torch.arange(30, dtype=torch.int32) % NUM_USERS)
    tables.items[5] = tables.items[3]
    tables.item_bias[5] = tables.item_bias[3]
    settings = NegativeSettings("popularity", count=3, pool=9)
    negatives = make_negatives(settings)
    words = torch.tensor([*map(signed_word, KEY)] + [0] * 8, dtype=torch.int32)
    launches = own.own_launches(
        tables,
        None,
        batch,
        negatives,
        loss,
        words=words,
        counters=torch.tensor([STEP, 0]),
        losses=torch.zeros(1, dtype=torch.float64),
        output=own.Output.NOTHING,
        batch_size=len(batch),
        shuffle=False,
    )
    launches.choose()
    kept = launches.step.arguments["kept_ptr"]
    drawn = plain_draws.draw(
        batch.user_index,
        9,
        NUM_ITEMS,
        key=KEY,
        step=STEP,
        known_positives=negatives.known_positives,
        popularity=negatives.popularity,
    )
    rows = read_items(tables.items[drawn.items], loss.norm_temperature)
    users = read_users(tables.users[batch.user_index.long()], loss.norm_temperature)
    logits = (rows * users[:, None]).sum(2) + tables.item_bias[drawn.items]
    right = logits.sort(dim=1, descending=True, stable=True).indices[:, :3]
    drawn = torch.where(drawn.by_rank, -1 - drawn.items, drawn.items)
    counts = batch.user_index != 0  # user 0 has no negatives
    expected = drawn.gather(1, right)[counts].sort(dim=1).values
    assert kept[counts].long().sort(dim=1).values.equal(expected)
    assert bool((expected < 0).any())


@pytest.mark.parametrize(
    ("loss", "negatives"),
    [
        ("gbce", NegativeSettings(count=5)),
        ("bpr", NegativeSettings(count=2, pool=3)),
        ("softmax", NegativeSettings("popularity", count=5)),
    ],
    ids=["gbce", "bpr, hard", "softmax, popularity"],
)
def test_sums_in_a_fixed_order(loss, negatives):
    tables, batch = make_tables(3, scale=0.7), make_batch(9)
    negatives, sums = make_negatives(negatives), tables.zeros_like()
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
    "hard by popularity": replace(SETTINGS, negatives=NegativeSettings("popularity", count=2, pool=4)),
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
