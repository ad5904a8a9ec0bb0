"""The cases of `test_triton_interpreter`: run there, with TRITON_INTERPRET=1.

The oracle is the plain torch reference in float64, which `test_contract` holds against the contract. Tiles
are of 32 rows and columns, so that lists and blocks take several, with a rest.
"""

import os
from itertools import cycle

import numpy as np
import pytest
import torch
import triton.language as tl
from step.oracle import KEY, NUM_ITEMS, NUM_USERS, STEP, make_batch, make_negatives, make_tables
from triton.runtime import interpreter

from fasttower_kernels import membership
from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.negatives import triton_gpu as negatives_triton
from fasttower_kernels.negatives.reference import draw_list, list_key
from fasttower_kernels.settings import LossSettings, NegativeSettings, StepSettings
from fasttower_kernels.shuffle import epoch_key
from fasttower_kernels.shuffle.reference import shuffled_rows
from fasttower_kernels.shuffle.triton_gpu import signed_round_keys
from fasttower_kernels.step import TrainState
from fasttower_kernels.step.gradients import reference
from fasttower_kernels.step.gradients import triton_gpu as gradients_triton
from fasttower_kernels.step.shared_negatives import reference as shared_reference
from fasttower_kernels.step.shared_negatives import triton_gpu
from fasttower_kernels.step.triton_gpu import Steps
from fasttower_kernels.tables import Interactions, Tables
from fasttower_kernels.triton_launch import signed_word

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is not 1: run test_triton_interpreter.py", allow_module_level=True)

EDGE, CANARY = 64, 7.0
LOSSES = {
    "bce": LossSettings(user_l2=0.3, item_l2=0.2, bias_l2=0.1),
    "gbce": LossSettings("gbce", 0.8, item_l2=0.2),
    "bpr": LossSettings("bpr"),
    "softmax": LossSettings("softmax", user_l2=0.1),
    "softmax, cosine": LossSettings(
        "softmax", similarity="cosine", temperature=0.4, user_l2=0.1, item_l2=0.2
    ),
    "bce, cosine": LossSettings(similarity="cosine", temperature=1.5),
}
# Two words of bits, in-batch one and a short last block; a batch has 45 positives.
NEGATIVES = {
    "shared": NegativeSettings("shared", count=70, block_size=40),
    "in-batch": NegativeSettings("in-batch", block_size=37),
    "mixed": NegativeSettings("mixed", count=50, block_size=20),
}
PAIRS = [
    (loss, n)
    for loss in LOSSES
    for n in NEGATIVES
    if (loss, n[-5:]) not in (("gbce", "batch"), ("gbce", "mixed"))
]
VARIANTS = cycle([(3, "bitmap", True), (16, "search", False), (37, None, True), (64, "bitmap", False)])
CASES = [(*pair, *variant) for pair, variant in zip(PAIRS, VARIANTS, strict=False)]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    for tiles in triton_gpu.TILES, triton_gpu.SPLIT_TILES:
        for block in tiles:
            monkeypatch.setitem(tiles, block, triton_gpu.ProductTile(32, 32, 4))


@pytest.fixture
def guarded():
    """Makes copies of tables with canaries before and after, and looks after them."""
    wholes = []

    def copy(tables):
        arrays = []
        for table in tables:
            whole = torch.full((table.numel() + 2 * EDGE,), CANARY, dtype=table.dtype)
            wholes.append(whole)
            arrays.append(whole[EDGE:-EDGE].view(table.shape).copy_(table))
        return Tables(*arrays)

    yield copy
    for whole in wholes:
        assert bool((whole[:EDGE] == CANARY).all())
        assert bool((whole[-EDGE:] == CANARY).all())


def doubled(tables):
    return Tables(*(table.double() for table in tables))


def error(result, oracle):
    """|result - oracle| / |oracle|."""
    return float((result.double() - oracle).norm() / oracle.norm().clamp_min(1e-300))


def negatives_of(settings, exclude):
    made = make_negatives(settings, exclude=exclude is not None)
    if exclude == "search":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(negatives_triton, "BITMAP_LIMIT_BYTES", 0)
            patch.setattr(membership, "BITMAP_WORDS_PER_FILTER_WORD", 0)
            kept = negatives_triton.exclusion_arguments(made.known_positives)  # with the known positives
        assert kept["bit_offsets_ptr"] is not None
    return made


def check(guarded, tables, batch, negatives, loss):
    """Gradients and loss within a few times the error that the reference has in float32."""
    draw = {"key": KEY, "step": STEP}
    oracle, plain = doubled(tables).zeros_like(), tables.zeros_like()
    right = reference.add_gradients(doubled(tables), oracle, batch, negatives, loss, **draw)
    reference.add_gradients(tables, plain, batch, negatives, loss, **draw)
    gradients = guarded(tables.zeros_like())
    value = gradients_triton.add_gradients(guarded(tables), gradients, batch, negatives, loss, **draw)
    assert float(value) == pytest.approx(float(right), rel=2e-6, abs=1e-6)
    for gradient, expected, other in zip(gradients, oracle, plain, strict=True):
        assert error(gradient, expected) < 4 * max(error(other, expected), 5e-8)
        assert bool((gradient == 0)[expected == 0].all())
    again = gradients_triton.loss_sum(tables, batch, negatives, loss, **draw)
    assert float(again) == pytest.approx(float(value), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("loss", "negatives", "dim", "exclude", "bias"), CASES)
def test_gradients(guarded, loss, negatives, dim, exclude, bias):
    tables = make_tables(dim, scale=0.7 if dim < 37 else 0.3, bias=bias)
    check(guarded, tables, make_batch(45), negatives_of(NEGATIVES[negatives], exclude), LOSSES[loss])


@pytest.mark.parametrize("loss", ["bce", "gbce", "bpr", "softmax", "softmax, cosine"])
@pytest.mark.parametrize(
    "settings",
    [NegativeSettings("shared", count=0, block_size=4), NegativeSettings("shared", count=3, block_size=1)],
    ids=["no negatives", "a block for each positive"],
)
def test_edges(guarded, loss, settings):
    check(guarded, make_tables(4), make_batch(5), negatives_of(settings, "bitmap"), LOSSES[loss])


def test_a_block_of_one_has_no_other_items(guarded):
    settings = NegativeSettings("in-batch", block_size=1)
    check(guarded, make_tables(4), make_batch(3), negatives_of(settings, None), LOSSES["softmax"])


def test_short_vectors(guarded):
    # A vector of 0, and one below the least norm: their norms count as 1e-8.
    tables = make_tables(6)
    tables.users[0] = tables.items[0] = 0
    tables.users[1] *= 1e-10
    tables.items[1] *= 1e-10
    check(guarded, tables, make_batch(24), negatives_of(NEGATIVES["mixed"], None), LOSSES["bce, cosine"])


def test_users_without_free_items():
    tables, batch = make_tables(4), Interactions(torch.zeros(3).int(), torch.arange(3).int())
    gradients = tables.zeros_like()
    negatives = negatives_of(NegativeSettings("mixed", count=3, block_size=2), "bitmap")
    value = gradients_triton.add_gradients(
        tables, gradients, batch, negatives, LOSSES["bce"], key=KEY, step=0
    )
    assert float(value) == 0
    assert all(not gradient.any() for gradient in gradients)


def test_large_logits(guarded):
    # Of 10^4, in both directions: the running maximum keeps softmax finite.
    tables = make_tables(4, scale=100.0)
    check(guarded, tables, make_batch(45), negatives_of(NEGATIVES["mixed"], "bitmap"), LOSSES["softmax"])


@pytest.mark.parametrize("loss", ["bce", "softmax, cosine"])
def test_gathered_users(guarded, loss):
    # Row b of the user table belongs to position b; the user says only what is masked.
    batch, negatives = make_batch(45), negatives_of(NEGATIVES["mixed"], "bitmap")
    plain = make_tables(6)
    users = torch.randn(45, plain.users.shape[1], generator=torch.Generator().manual_seed(1))
    tables = Tables(users, plain.items, plain.item_bias)
    leaves = [table.double().requires_grad_() for table in tables]
    shared_reference.batch_loss(*leaves, batch, negatives, LOSSES[loss], key=KEY, step=STEP)[0].backward()
    gradients = guarded(tables.zeros_like())
    arguments = (guarded(tables), gradients, batch, negatives, LOSSES[loss])
    gradients_triton.add_gradients(*arguments, key=KEY, step=STEP, gathered=True)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert error(gradient, leaf.grad) < 1e-6


def test_loss_sum_goes_in_parts(monkeypatch):
    monkeypatch.setattr(triton_gpu, "_LOSSES", 41)
    tables, batch, negatives = make_tables(5), make_batch(45), negatives_of(NEGATIVES["mixed"], "search")
    draw = {"key": KEY, "step": STEP}
    value = gradients_triton.loss_sum(tables, batch, negatives, LOSSES["softmax"], **draw)
    vectors = doubled(Tables(tables.users[batch.user_index.long()], tables.items, tables.item_bias))
    right = shared_reference.batch_loss(*vectors, batch, negatives, LOSSES["softmax"], **draw)[1]
    assert float(value) == pytest.approx(float(right), rel=1e-6)


def test_steps_of_a_shuffled_epoch():
    """The same launches at each step of an epoch, the short last batch too: what a CUDA graph replays."""
    rows, size, seed = 33, 20, (3, 4)
    tables, interactions, loss = make_tables(4), make_batch(rows), LOSSES["softmax"]
    negatives = negatives_of(NegativeSettings("mixed", count=5, block_size=8), "bitmap")
    order = epoch_key(11, 2)
    words = [*map(signed_word, list_key(seed)), *signed_round_keys(order)]
    counters, gradients = torch.zeros(2, dtype=torch.int64), tables.zeros_like()
    losses = torch.zeros(triton_gpu.num_programs(tables.users, size, 8), dtype=torch.float64)
    launches = triton_gpu.shared_launches(
        tables,
        gradients,
        interactions,
        negatives,
        loss,
        words=torch.tensor(words, dtype=torch.int32),
        counters=counters,
        losses=losses,
        batch_size=size,
        shuffle=True,
    )
    for step in (4, 5, 4):  # two steps an epoch
        counters[0] = step
        launches()
        assert counters.tolist() == [step, step + 1]
        positions = torch.arange(step % 2 * size, min(rows, (step % 2 + 1) * size))
        picked = shuffled_rows(positions, rows, order)
        batch = Interactions(interactions.user_index[picked], interactions.item_index[picked])
        oracle = doubled(tables).zeros_like()
        right = reference.add_gradients(doubled(tables), oracle, batch, negatives, loss, key=seed, step=step)
        assert float(losses.sum()) == pytest.approx(float(right), rel=1e-6)
        for gradient, expected in zip(gradients, oracle, strict=True):
            assert error(gradient, expected) < 1e-6
            gradient.zero_()
        losses.zero_()
        lists = launches.lists
        assert lists.users[: len(picked)].equal(batch.user_index)
        assert lists.positives[: len(picked)].equal(batch.item_index)
        drawn = draw_list(1, 5, NUM_ITEMS, key=seed, step=step, device=torch.device("cpu"))
        assert lists.items[1, :5].tolist() == drawn.tolist()
        assert lists.items[1, 5 : 5 + len(picked[8:16])].equal(batch.item_index[8:16])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"deterministic": True}, "with in-batch negatives do not repeat .* uniform or popularity"),
        ({"optimiser": "lazy_adam"}, "whole tables where in-batch negatives .* optimiser auto or adam"),
    ],
    ids=["deterministic", "lazy"],
)
def test_steps_that_are_refused(settings, message):
    tables, negatives = make_tables(4), negatives_of(NEGATIVES["in-batch"], None)
    settings = StepSettings(0.1, 5, 0, negatives=negatives.settings, **settings)
    with pytest.raises(FastTowerError, match=message):
        Steps(TrainState.start(tables), make_batch(5), negatives, settings)


def test_wide_rows_are_refused():
    tables = Tables(torch.zeros(NUM_USERS, 516), torch.zeros(NUM_ITEMS, 516))
    negatives = negatives_of(NEGATIVES["in-batch"], None)
    with pytest.raises(FastTowerError, match="516 dimensions"):
        gradients_triton.loss_sum(tables, make_batch(5), negatives, LOSSES["bce"], key=KEY, step=0)


@pytest.fixture
def _bfloat16(monkeypatch):
    """The interpreter multiplies the bits of bfloat16, and cuts off where a GPU rounds."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def widened(values):
        return (np.asarray(values).view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    def create_dot(self, a, b, d, *options):
        assert a.dtype.scalar == b.dtype.scalar == tl.bfloat16  # not float32
        a, b = (interpreter.TensorHandle(widened(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, d, *options)

    def convert_float(values, source, target, rounding_mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return widened(values).view(np.uint32)
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.tensor(np.asarray(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return convert(values, source, target, rounding_mode)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(interpreter, "_convert_float", convert_float)


@pytest.mark.usefixtures("_bfloat16")
@pytest.mark.parametrize(("loss", "negatives"), [("bce", "mixed"), ("softmax, cosine", "shared")])
def test_bfloat16_tables(loss, negatives):
    tables, batch, loss = make_tables(16, scale=0.7), make_batch(45), LOSSES[loss]
    negatives, draw = negatives_of(NEGATIVES[negatives], "bitmap"), {"key": KEY, "step": STEP}
    rounded = Tables(tables.users.bfloat16(), tables.items.bfloat16(), tables.item_bias)
    oracle, gradients = doubled(tables).zeros_like(), tables.zeros_like()
    right = reference.add_gradients(doubled(rounded), oracle, batch, negatives, loss, **draw)
    value = gradients_triton.add_gradients(rounded, gradients, batch, negatives, loss, **draw)
    assert float(value) == pytest.approx(float(right), rel=1e-6)  # logits are products of bfloat16, exact
    for gradient, expected in zip(gradients, oracle, strict=True):
        assert error(gradient, expected) < 2**-8  # slopes are rounded
