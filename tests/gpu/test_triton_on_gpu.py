"""Single Triton kernels on a GPU: against the reference, and races, which no interpreter shows."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from gpu_cases import (
    DEVICE,
    KEY,
    NUM_ITEMS,
    NUM_USERS,
    doubled,
    error,
    leave_a_lost_device,
    make_batch,
    make_known,
    make_negatives,
    make_tables,
)

from fasttower_kernels.adam import reference as adam_reference
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import reference as negatives_reference
from fasttower_kernels.settings import LossSettings, NegativeSettings
from fasttower_kernels.shuffle import epoch_key
from fasttower_kernels.shuffle import reference as shuffle_reference
from fasttower_kernels.step import TrainState
from fasttower_kernels.step.gradients import reference
from fasttower_kernels.tables import Interactions, Tables

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)
if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from fasttower_kernels.adam import triton_gpu as adam_triton
from fasttower_kernels.negatives import triton_gpu as negatives_triton
from fasttower_kernels.shuffle import triton_gpu as shuffle_triton
from fasttower_kernels.step import lazy_triton_gpu
from fasttower_kernels.step.gradients import triton_gpu
from fasttower_kernels.step.own_negatives import triton_gpu as own_triton

LOSSES = {
    "bce": LossSettings(user_l2=0.3, item_l2=0.2, bias_l2=0.1),
    "gbce": LossSettings("gbce", user_l2=0.3, item_l2=0.2, bias_l2=0.1),
    "bpr": LossSettings("bpr", user_l2=0.3, item_l2=0.2, bias_l2=0.1),
    "softmax": LossSettings("softmax", user_l2=0.3, item_l2=0.2, bias_l2=0.1),
}


@pytest.fixture(autouse=True)
def _device():
    yield
    leave_a_lost_device()


@pytest.fixture(params=["plain", "bitmaps", "filters"])
def known(request, monkeypatch):
    """Known positives that are left out in each way, or None."""
    if request.param == "plain":
        return None
    if request.param == "filters":
        monkeypatch.setattr(negatives_triton, "BITMAP_LIMIT_BYTES", 0)
    return make_known()


@pytest.mark.parametrize("num_rows", [1, 2, 3, 1000, 1_000_209])
def test_shuffle(num_rows):
    positions, key = torch.arange(num_rows, device=DEVICE), epoch_key(5, 2)
    rows = shuffle_triton.shuffled_rows(positions, num_rows, key)
    assert rows.equal(shuffle_reference.shuffled_rows(positions, num_rows, key))


@pytest.mark.parametrize("num_negatives", [1, 10, 1003])
def test_negatives(known, num_negatives):
    users = torch.arange(2 * NUM_USERS, device=DEVICE).int() % NUM_USERS
    draw = {"key": KEY, "step": 2**32 - 1, "known_positives": known, "first_position": 7}
    negatives = negatives_triton.sample_negatives(users, num_negatives, NUM_ITEMS, **draw)
    expected = negatives_reference.sample_negatives(users, num_negatives, NUM_ITEMS, **draw)
    counts = (
        torch.ones_like(users, dtype=torch.bool) if known is None else known.degrees[users.long()] < NUM_ITEMS
    )
    assert negatives[counts].equal(expected[counts])


@pytest.mark.parametrize("num_negatives", [1, 10, 103])
def test_negatives_by_popularity(known, num_negatives):
    tables, settings = make_tables(4), NegativeSettings("popularity")
    users = torch.arange(2 * NUM_USERS, device=DEVICE).int() % NUM_USERS
    table = make_negatives(settings, make_batch(1009), tables, known).popularity
    draw = {"key": KEY, "step": 7, "known_positives": known, "popularity": table, "first_position": 7}
    negatives = negatives_triton.sample_negatives(users, num_negatives, NUM_ITEMS, **draw)
    expected = negatives_reference.sample_negatives(users, num_negatives, NUM_ITEMS, **draw)
    counts = (
        torch.ones_like(users, dtype=torch.bool) if known is None else known.degrees[users.long()] < NUM_ITEMS
    )
    assert negatives[counts].equal(expected[counts])


def test_a_search_in_long_rows_excludes_what_the_bitmap_does(monkeypatch):
    # Rows of 0 to 20,000 items, of which the longest are drawn from again and again.
    num_users, num_items = 999, 20_011
    generator = torch.Generator(DEVICE).manual_seed(0)
    share = torch.rand(num_users, 1, generator=generator, device=DEVICE) ** 4
    touched = torch.rand(num_users, num_items, generator=generator, device=DEVICE) < share
    pairs = touched.nonzero().T.int()
    users = torch.arange(4 * num_users, device=DEVICE).int() % num_users
    drawn = []
    for limit in (negatives_triton.BITMAP_LIMIT_BYTES, 0):
        monkeypatch.setattr(negatives_triton, "BITMAP_LIMIT_BYTES", limit)
        known = KnownPositives.from_pairs(*pairs, num_users, num_items)
        drawn.append(
            negatives_triton.sample_negatives(users, 33, num_items, key=KEY, step=5, known_positives=known)
        )
    assert drawn[0].equal(drawn[1])
    assert not bool(touched[users.long()[:, None], drawn[0]].any())


def check_gradients(tables, batch, negatives, loss, *, deterministic=False, bound=2e-6):
    oracle, gradients = doubled(tables).zeros_like(), tables.zeros_like()
    expected = reference.add_gradients(doubled(tables), oracle, batch, negatives, loss, key=KEY, step=3)
    call = tables, gradients, batch, negatives, loss
    if deterministic:
        value = own_triton.run_batch(*call, key=KEY, step=3, deterministic=True)
    else:
        value = triton_gpu.add_gradients(*call, key=KEY, step=3)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for gradient, right in zip(gradients, oracle, strict=True):
        assert error(gradient, right) < bound


@pytest.mark.parametrize("dim", [1, 3, 16, 64, 100, 128, 256, 512])
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients(dim, known, deterministic):
    tables, batch, loss = make_tables(dim), make_batch(1009), LossSettings(user_l2=0.1, item_l2=0.1)
    negatives = make_negatives(NegativeSettings(count=10), batch, tables, known)
    check_gradients(tables, batch, negatives, loss, deterministic=deterministic)


@pytest.mark.parametrize(
    ("count", "loss", "bias"),
    [
        (0, LossSettings(user_l2=0.1, item_l2=0.1), True),
        (3, LossSettings(scale="pairs"), False),
        (5, LossSettings(user_l2=0.2, item_l2=0.2), False),
        (101, LossSettings(), True),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_of_other_sizes(count, loss, bias, deterministic):
    tables, batch = make_tables(16, bias=bias), make_batch(501)
    negatives = make_negatives(NegativeSettings(count=count), batch, tables, make_known())
    check_gradients(tables, batch, negatives, loss, deterministic=deterministic)


@pytest.mark.parametrize("dim", [16, 64])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_each_loss(known, dim, similarity, loss):
    tables, batch = make_tables(dim), make_batch(1009)
    negatives = make_negatives(NegativeSettings(count=10), batch, tables, known)
    check_gradients(tables, batch, negatives, replace(LOSSES[loss], similarity=similarity))


@pytest.mark.parametrize("dim", [13, 64, 200])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("loss", ["bpr", "softmax"])
@pytest.mark.parametrize(
    "settings",
    [
        NegativeSettings("popularity", count=10),
        NegativeSettings(count=3, pool=21),
        NegativeSettings("popularity", count=40, pool=103),
    ],
    ids=["popularity", "hard", "hard by popularity"],
)
def test_gradients_of_each_proposal(known, dim, similarity, loss, settings):
    # So few positives that no logits are so near each other that float32 and float64 choose differently.
    tables, batch = make_tables(dim), make_batch(211)
    negatives = make_negatives(settings, batch, tables, known)
    check_gradients(tables, batch, negatives, replace(LOSSES[loss], similarity=similarity))


@pytest.mark.parametrize("name", ["gbce", "bpr", "softmax"])
def test_deterministic_gradients_of_each_loss(name):
    tables, batch, loss = make_tables(64), make_batch(1009), replace(LOSSES[name], bias_l2=0)
    negatives = make_negatives(NegativeSettings(count=10), batch, tables, make_known())
    check_gradients(tables, batch, negatives, loss, deterministic=True)


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("proposal", ["in-batch", "mixed", "shared"])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("loss", ["softmax", "bce"])
def test_gradients_of_shared_negatives(dim, proposal, similarity, loss):
    # Four blocks, the last one short, and lists that are no multiple of a tile.
    tables, batch = make_tables(dim), make_batch(1009)
    settings = NegativeSettings(proposal, count=101, block_size=300)
    negatives = make_negatives(settings, batch, tables, make_known())
    check_gradients(tables, batch, negatives, replace(LOSSES[loss], similarity=similarity))


def test_gradients_of_a_large_batch():
    # As many users and items as MovieLens 20M has; the most popular item is in 2,000 of the positives.
    num_users, num_items, size = 138_493, 26_744, 65_536
    generator = torch.Generator().manual_seed(0)
    users, items = (
        (torch.rand(size, generator=generator) ** power * n).int().to(DEVICE)
        for power, n in ((2, num_users), (3, num_items))
    )
    tables = make_tables(64, num_users, num_items)
    batch, loss = Interactions(users, items), LossSettings(user_l2=0.01, item_l2=0.01)
    negatives = make_negatives(NegativeSettings(count=10), batch, tables)
    check_gradients(tables, batch, negatives, loss, bound=2e-5)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_of_gathered_users(known, deterministic):
    # Row b of the user table belongs to position b; the user only says what is left out.
    batch, tables = make_batch(333), make_tables(20, num_users=333)
    negatives = make_negatives(NegativeSettings(count=5), batch, tables, known)
    loss, draw = LossSettings(user_l2=0.2, item_l2=0.2), {"key": KEY, "step": 3}
    users, items = (table.double().requires_grad_() for table in (tables.users, tables.items))
    total, _ = reference.batch_loss(users, items, tables.item_bias.double(), batch, negatives, loss, **draw)
    total.backward()
    gradients = tables.zeros_like()
    call = tables, gradients, batch, negatives, loss
    own_triton.run_batch(*call, **draw, gathered=True, deterministic=deterministic)
    assert error(gradients.users, users.grad) < 2e-6
    assert error(gradients.items, items.grad) < 2e-6


@pytest.mark.parametrize("dim", [5, 64])
@pytest.mark.parametrize(
    "settings", [NegativeSettings(count=10), NegativeSettings("mixed", count=10)], ids=["own", "shared"]
)
def test_the_loss_without_gradients(known, dim, settings):
    tables, batch, loss = make_tables(dim), make_batch(20_011), LossSettings(user_l2=0.5, item_l2=0.5)
    negatives, draw = make_negatives(settings, batch, tables, known), {"key": KEY, "step": 0}
    oracle = reference.loss_sum(doubled(tables), batch, negatives, loss, **draw)
    value = triton_gpu.loss_sum(tables, batch, negatives, loss, **draw)
    assert float(value) == pytest.approx(float(oracle), rel=1e-6)


@pytest.mark.parametrize("dim", [16, 64])
@pytest.mark.parametrize(
    "settings",
    [NegativeSettings(count=5), NegativeSettings("shared", count=5, block_size=64)],
    ids=["own", "shared"],
)
def test_races(dim, settings):
    # Every positive is of one of 2 users and 3 items, so that adds that are not atomic lose most of the sum.
    # The order of 40,000 adds to one item makes a difference of about 1e-5.
    tables, batch = make_tables(dim, 2, 3), make_batch(20_000, 2, 3)
    loss, oracle = LossSettings(user_l2=0.1, item_l2=0.1), doubled(tables).zeros_like()
    negatives = make_negatives(settings, batch, tables)
    reference.add_gradients(doubled(tables), oracle, batch, negatives, loss, key=KEY, step=3)
    for _ in range(20):
        gradients = tables.zeros_like()
        triton_gpu.add_gradients(tables, gradients, batch, negatives, loss, key=KEY, step=3)
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
        for one, adam in ((state, adam_triton), (oracle, adam_reference)):
            adam.adam_step(
                one.parameters, one.gradients, one.moments_1, one.moments_2, count=count, learning_rate=0.1
            )
    for result, right in zip(state.parameters, oracle.parameters, strict=True):
        assert error(result, right) < 1e-6
    assert not any(bool(gradient.any()) for gradient in state.gradients)


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


def test_rows_past_2_31_elements():
    num_users, width, part = 2**29 + 8, 4, 2**26
    # The users, their gradients and, looked at part by part, two copies of a part; and room for others.
    needed = 4 * width * (2 * num_users + 2 * part) + (1 << 30)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"{free / 2**30:.1f} GiB of free device memory, needs {needed / 2**30:.1f}")
    users, gradients = (torch.zeros(num_users, width, device=DEVICE) for _ in range(2))
    users[-1] = 0.25
    items, item_gradients = torch.ones(3, width, device=DEVICE), torch.zeros(3, width, device=DEVICE)
    batch = Interactions(*(torch.tensor([i], dtype=torch.int32, device=DEVICE) for i in (num_users - 1, 1)))
    tables = Tables(users, items)
    negatives = make_negatives(NegativeSettings(count=0), batch, tables)
    call = tables, Tables(gradients, item_gradients), batch, negatives, LossSettings()
    triton_gpu.add_gradients(*call, key=KEY, step=0)
    slope = float(torch.sigmoid(torch.tensor(1.0, dtype=torch.float64))) - 1
    assert gradients[-1].tolist() == pytest.approx([slope] * width, rel=1e-6)
    assert not any(bool((rows != 0).any()) for rows in gradients[:-1].split(part))
