"""The compiled CPU backend against the plain torch reference: draws bit for bit, the rest to rounding."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

numba = pytest.importorskip("numba")

from fasttower_kernels import membership  # noqa: E402
from fasttower_kernels.known_positives import KnownPositives  # noqa: E402
from fasttower_kernels.negatives import membership_numba_cpu as bits  # noqa: E402
from fasttower_kernels.negatives import numba_cpu as negatives  # noqa: E402
from fasttower_kernels.negatives.reference import sample_negatives  # noqa: E402
from fasttower_kernels.philox import numba_cpu as philox  # noqa: E402
from fasttower_kernels.philox import seed_key  # noqa: E402
from fasttower_kernels.sampled_bce import LossSettings  # noqa: E402
from fasttower_kernels.sampled_bce import numba_cpu as sampled_bce  # noqa: E402
from fasttower_kernels.sampled_bce import reference as sampled_bce_reference  # noqa: E402
from fasttower_kernels.shuffle.reference import round_keys, shuffled_rows  # noqa: E402
from fasttower_kernels.tables import Interactions, Tables, padded  # noqa: E402
from fasttower_kernels.train_steps import StepSettings, TrainState, steps_per_epoch  # noqa: E402
from fasttower_kernels.train_steps import numba_cpu as train_steps  # noqa: E402
from fasttower_kernels.train_steps import reference as train_steps_reference  # noqa: E402

KEY = seed_key(12345678901234567)
NUM_USERS, NUM_ITEMS, NUM_ROWS = 30, 41, 300


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_tables(dim, *, bias=True, scale=0.7):
    generator = torch.Generator().manual_seed(dim)
    users, items = (torch.zeros(n, padded(dim)) for n in (NUM_USERS, NUM_ITEMS))
    for table in (users, items):
        table[:, :dim] = torch.randn(len(table), dim, generator=generator) * scale
    return Tables(users, items, torch.randn(NUM_ITEMS, generator=generator) if bias else None)


def make_interactions(size=NUM_ROWS):
    generator = torch.Generator().manual_seed(size)
    return Interactions(
        torch.randint(NUM_USERS, (size,), generator=generator, dtype=torch.int32),
        torch.randint(NUM_ITEMS, (size,), generator=generator, dtype=torch.int32),
    )


def make_known():
    """User 0 has touched every item, 1 all but one, 2 half, 3 one, 4 all but four, the others nothing."""
    rows = [(0, i) for i in range(NUM_ITEMS)] + [(1, i) for i in range(NUM_ITEMS) if i != 17]
    rows += [(2, i) for i in range(0, NUM_ITEMS, 2)] + [(3, NUM_ITEMS - 1)]
    # Of the draws of user 4, one in five is still a known positive after 15 attempts. The items that are left
    # lie together, so that the gap search finds others than one more draw would.
    rows += [(4, i) for i in range(NUM_ITEMS) if i not in (30, 31, 33, 38)]
    index = torch.tensor(rows, dtype=torch.int32)
    return KnownPositives.from_pairs(index[:, 0], index[:, 1], NUM_USERS, NUM_ITEMS)


def hashed(monkeypatch):
    monkeypatch.setattr(bits, "BITMAP_LIMIT_BYTES", 0)
    known = make_known()
    assert not bits.membership_of(known)[1]
    return known


def from_python(function):
    """A function that only compiled code may call, for Python to call."""
    return numba.njit(lambda *arguments: function(*arguments))  # noqa: PLW0108 - numba is to compile it


def assert_close(ours, right, rtol=1e-5, atol=1e-6):
    for one, other in zip(ours, right, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


# The draws


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert from_python(philox.philox4x32)(*map(np.uint32, (*key, *counter))) == words


gather = from_python(train_steps.gather)


def ordered(n, key, begin=0, size=None):
    """Rows at positions begin .. begin + size - 1 of an epoch's order, as the training step gathers them."""
    size = n if size is None else size
    bits = (n - 1).bit_length()
    rows, unused = np.zeros(size, np.uint32), np.zeros(size, np.uint32)
    index = np.arange(n, dtype=np.int32)
    shuffle = np.uint64(bits // 2), np.uint64(bits - bits // 2), np.array(round_keys(key), dtype=np.uint32)
    gather(index, index, np.uint64(begin), np.uint64(size), shuffle, rows, unused, np.uint64(0))
    return torch.from_numpy(rows.astype(np.int64))


def test_order_known_answers():
    assert ordered(1, (1, 2)).tolist() == [0]
    assert ordered(2, (1, 2)).tolist() == [0, 1]
    thousand = ordered(1000, (1, 2)).numpy()
    digest = hashlib.sha256(thousand.astype("<i8").tobytes()).hexdigest()
    assert digest == "8b7aeb427df2f343f2078eec93c0cc839da9608f9caf5c107ab6f80ce6a353db"


@pytest.mark.parametrize("n", [3, 5, 63, 64, 65, 129, 1025, 65_537])
def test_order_equals_the_reference(n):
    assert ordered(n, KEY).equal(shuffled_rows(torch.arange(n), n, KEY))
    assert ordered(n, KEY, begin=1, size=n - 2).equal(shuffled_rows(torch.arange(1, n - 1), n, KEY))


def test_negatives_known_answers():
    drawn = negatives.sample_negatives(torch.tensor([0, 1, 2]), 6, 3706, key=KEY, step=7)
    assert drawn.tolist() == [
        [2066, 229, 2559, 660, 751, 2019],
        [2413, 1685, 3675, 1017, 3122, 2161],
        [1518, 1068, 2814, 2317, 3081, 607],
    ]


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("size", [1, 63, 130])
@pytest.mark.parametrize("num_negatives", [0, 1, 3, 4, 10])
def test_negatives_equal_the_reference(filtered, size, num_negatives, monkeypatch):
    known = hashed(monkeypatch) if filtered else make_known()
    # Mostly the users whose draws hit known positives; user 0 has no negatives.
    users = torch.randint(1, 5, (size,), generator=torch.Generator().manual_seed(size))
    arguments = {"key": KEY, "step": 7, "known_positives": known, "first_position": 5}
    drawn = negatives.sample_negatives(users, num_negatives, NUM_ITEMS, **arguments)
    assert drawn.equal(sample_negatives(users, num_negatives, NUM_ITEMS, **arguments))


def test_hashed_bits_that_collide(monkeypatch):
    # With one bit per item, nearly every word has all of its bits on: the search alone can tell.
    monkeypatch.setattr(bits, "BITMAP_LIMIT_BYTES", 0)
    monkeypatch.setattr(membership, "FILTER_BITS_PER_ITEM", 1)
    items = torch.randperm(5000, generator=torch.Generator().manual_seed(0))[:1000]
    known = KnownPositives.from_pairs(torch.zeros_like(items), items, 1, 5000)
    arguments = {"key": KEY, "step": 2, "known_positives": known}
    users = torch.zeros(200, dtype=torch.int64)
    drawn = negatives.sample_negatives(users, 10, 5000, **arguments)
    assert drawn.equal(sample_negatives(users, 10, 5000, **arguments))


def test_hashed_bits_do_not_look_into_the_next_row(monkeypatch):
    # The items that users 0, 2, .. have not touched come after theirs, and are the first of the next user's.
    monkeypatch.setattr(bits, "BITMAP_LIMIT_BYTES", 0)
    rows = [(2 * i, item) for i in range(20) for item in range(1000)]
    rows += [(2 * i + 1, 1000 + i) for i in range(20)]
    index = torch.tensor(rows)
    known = KnownPositives.from_pairs(index[:, 0], index[:, 1], 40, 1020)
    arguments = {"key": KEY, "step": 2, "known_positives": known}
    users = torch.arange(0, 40, 2).repeat(20)
    drawn = negatives.sample_negatives(users, 10, 1020, **arguments)
    assert drawn.equal(sample_negatives(users, 10, 1020, **arguments))


def test_a_large_catalogue_is_drawn_whole():
    size = 2**31 - 1
    drawn = negatives.sample_negatives(torch.zeros(50, dtype=torch.int64), 10, size, key=KEY, step=0)
    assert drawn.equal(sample_negatives(torch.zeros(50, dtype=torch.int64), 10, size, key=KEY, step=0))
    assert int(drawn.max()) > 2**30


# The loss and its gradients


@pytest.mark.parametrize("num_negatives", [0, 1, 3, 4, 10, 70])
@pytest.mark.parametrize("size", [1, 64, 200])
@pytest.mark.parametrize("dim", [1, 3])
def test_gradients(dim, size, num_negatives):
    known, batch, tables = make_known(), make_interactions(size), make_tables(dim)
    settings = LossSettings(num_negatives, 0.3, "positives" if size > 1 else "pairs")
    ours, right = tables.zeros_like(), tables.zeros_like()
    bce = sampled_bce.train_step(tables, ours, batch, known, settings, key=KEY, step=3)
    expected = sampled_bce_reference.train_step(tables, right, batch, known, settings, key=KEY, step=3)
    assert float(bce) == pytest.approx(float(expected), rel=1e-5, abs=1e-6)
    assert_close(ours, right)
    assert float(ours.users[:, dim:].abs().sum() + ours.items[:, dim:].abs().sum()) == 0  # the padding


@pytest.mark.parametrize(("dim", "variant"), [(64, "plain"), (100, "filtered"), (512, "bias")])
def test_gradients_of_other_widths(dim, variant, monkeypatch):
    known = hashed(monkeypatch) if variant == "filtered" else None
    tables, batch = make_tables(dim, bias=variant != "plain", scale=0.2), make_interactions(100)
    settings = LossSettings(5, 0.1 if variant == "filtered" else 0.0)
    ours, right = tables.zeros_like(), tables.zeros_like()
    bce = sampled_bce.train_step(tables, ours, batch, known, settings, key=KEY, step=3)
    expected = sampled_bce_reference.train_step(tables, right, batch, known, settings, key=KEY, step=3)
    assert float(bce) == pytest.approx(float(expected), rel=1e-5)
    assert_close(ours, right)


def test_forward_alone():
    tables, batch, known, settings = (
        make_tables(3),
        make_interactions(130),
        make_known(),
        LossSettings(10, 0.3),
    )
    arguments = {"key": KEY, "step": 0, "first_position": 1000}
    bce = sampled_bce.bce_sum(tables, batch, known, settings, **arguments)
    right = sampled_bce_reference.bce_sum(tables, batch, known, settings, **arguments)
    assert float(bce) == pytest.approx(float(right), rel=1e-5)


@pytest.mark.parametrize("logit", [1e-3, 1.0, 20.0, 88.0, 150.0, 1e4])
@pytest.mark.parametrize("sign", [1, -1])
def test_stable_for_large_logits(logit, sign):
    tables = make_tables(3)
    for table in tables:
        table.zero_()
    tables.users[:, 0], tables.items[:, 0] = logit, sign
    ours, batch, settings = tables.zeros_like(), make_interactions(64), LossSettings(1, 0.3)
    bce = sampled_bce.train_step(tables, ours, batch, make_known(), settings, key=KEY, step=0)
    weight = float((batch.user_index != 0).sum())
    x = torch.tensor(sign * logit, dtype=torch.float64)
    softplus = torch.nn.functional.softplus
    assert float(bce) == pytest.approx(weight * float(softplus(x) + softplus(-x)), rel=1e-6)
    assert all(bool(gradient.isfinite().all()) for gradient in ours)
    coefficient = float(torch.sigmoid(x) - torch.sigmoid(-x)) / 64
    assert float(ours.item_bias.double().sum()) == pytest.approx(weight * coefficient, rel=1e-5, abs=1e-6)


def test_small_losses_are_not_lost():
    tables, batch = make_tables(3), make_interactions(130)
    for table in tables:
        table.zero_()
    tables.users[:, 0], tables.items[:, 0] = 20.0, 1.0
    bce = sampled_bce.bce_sum(tables, batch, make_known(), LossSettings(0, 0.3), key=KEY, step=0)
    count = int((batch.user_index != 0).sum())
    assert float(bce) == pytest.approx(count * np.log1p(np.exp(-20.0)), rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_run_shows_in_the_loss(value):
    tables = make_tables(3)
    tables.users[5] = value
    bce = sampled_bce.train_step(
        tables,
        tables.zeros_like(),
        make_interactions(200),
        make_known(),
        LossSettings(3, 0.3),
        key=KEY,
        step=0,
    )
    assert not np.isfinite(float(bce))


# The steps


def run(
    module,
    dim,
    threads=1,
    *,
    plain=False,
    num_negatives=4,
    batch_size=70,
    calls=(5,),
    epoch=1,
    optimiser="adam",
):
    torch.set_num_threads(threads)
    state = TrainState.start(make_tables(dim, bias=not plain))
    loss = LossSettings(num_negatives, 0.0 if plain else 0.2)
    settings = StepSettings(loss, 0.05, batch_size, seed=9, optimiser=optimiser)
    step = epoch * steps_per_epoch(NUM_ROWS, batch_size)
    bce = 0.0
    for count in calls:
        known = None if plain else make_known()
        bce += float(
            module.run_steps(state, make_interactions(), known, settings, first_step=step, num_steps=count)
        )
        step += count
    assert all(not gradient.any() for gradient in state.gradients)
    return bce, [*state.parameters, *state.moments_1, *state.moments_2]


@pytest.mark.parametrize(
    ("dim", "threads", "options"),
    [
        (3, 1, {}),
        (1, 1, {"num_negatives": 0, "batch_size": 300, "calls": (1,)}),
        (3, 2, {}),
        (3, 2, {"num_negatives": 70, "batch_size": 299, "calls": (2,)}),
        (16, 1, {"plain": True, "num_negatives": 10}),
    ],
)
def test_steps(dim, threads, options):
    bce, arrays = run(train_steps, dim, threads, **options)
    expected, right = run(train_steps_reference, dim, **options)
    assert bce == pytest.approx(expected, rel=1e-5)
    assert_close(arrays, right, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_repeats_bit_for_bit_in_one_call_or_many(threads):
    bce, arrays = run(train_steps, 3, threads)
    for calls in ((5,), (1, 3, 1)):
        again, others = run(train_steps, 3, threads, calls=calls)
        assert again == pytest.approx(bce, rel=1e-12)
        assert all(one.equal(other) for one, other in zip(arrays, others, strict=True))


def in_new_process(script, **environment):
    environment["PYTHONPATH"] = ":".join(path for path in sys.path if path)
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | environment
    ).stdout.split()


def test_threads_are_those_of_torch_and_have_a_tile_each():
    assert train_steps.thread_count(10_000) == 1
    torch.set_num_threads(7)
    assert [train_steps.thread_count(size) for size in (1, 64, 65, 10_000)] == [1, 1, 2, 7]


CACHED = """
import torch
torch.set_num_threads(1)
from tests.test_numba_backend import run, train_steps
run(train_steps, 3)
stats = train_steps._compiled(train_steps.Variant(4, True, True, True, True)).stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def test_compiled_code_is_found_again_by_another_process():
    run(train_steps, 3)
    assert in_new_process(CACHED) == ["1", "0"]


HASHED = """
import hashlib
import torch
torch.set_num_threads(1)
from tests.test_numba_backend import run, train_steps
_, arrays = run(train_steps, 16, batch_size=4, calls=(70,), optimiser="lazy_adam")
print(hashlib.sha256(b"".join(array.numpy().tobytes() for array in arrays)).hexdigest())
"""


def test_the_process_that_compiles_gets_the_bits_that_later_ones_get(tmp_path):
    compiled = in_new_process(HASHED, NUMBA_CACHE_DIR=str(tmp_path))
    assert list(tmp_path.rglob("*.nbc"))
    assert in_new_process(HASHED, NUMBA_CACHE_DIR=str(tmp_path)) == compiled
