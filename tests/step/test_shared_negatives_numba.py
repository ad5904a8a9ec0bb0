"""The compiled step with shared negatives against plain torch in float64, at shapes that its tiles cut."""

import subprocess
import sys
from functools import lru_cache

import numpy as np
import pytest
import torch

from fasttower_kernels.compiled import SOURCES, entry_point, flat_arrays, uint32, uint64
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.losses.numba_cpu import NORMALISED, TILE
from fasttower_kernels.losses.scales_numba_cpu import factors_of, scales_of
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.settings import LossSettings, NegativeSettings
from fasttower_kernels.step.batch_numba_cpu import take_own
from fasttower_kernels.step.gradients import reference
from fasttower_kernels.step.shared_negatives import numba_cpu, user_tile_numba_cpu
from fasttower_kernels.step.shared_negatives.batch_numba_cpu import Lists, add_shared_batch
from fasttower_kernels.step.variant_numba_cpu import variant_of
from fasttower_kernels.tables import Interactions, Tables, padded
from fasttower_kernels.threads import run_in_threads

KEY, STEP = (11, 12), 5
NUM_USERS, NUM_ITEMS = 90, 60


def make_tables(dim, *, num_items=NUM_ITEMS, bias=True):
    generator = torch.Generator().manual_seed(dim)
    users, items = (torch.zeros(rows, padded(dim)) for rows in (NUM_USERS, num_items))
    for table in (users, items):
        table[:, :dim] = torch.randn(len(table), dim, generator=generator) / dim**0.25
    return Tables(users, items, torch.randn(num_items, generator=generator) if bias else None)


def make_batch(size, num_items=NUM_ITEMS):
    generator = torch.Generator().manual_seed(size)
    users = torch.randint(NUM_USERS, (size,), generator=generator, dtype=torch.int32)
    items = (torch.rand(size, generator=generator).square() * num_items).int()  # some stand often
    return Interactions(users, items)


def make_negatives(settings, num_items=NUM_ITEMS):
    generator = torch.Generator().manual_seed(1)
    users = torch.randint(NUM_USERS, (800,), generator=generator, dtype=torch.int32)
    items = torch.randint(num_items, (800,), generator=generator, dtype=torch.int32)
    everything = torch.arange(num_items, dtype=torch.int32)
    pairs = torch.cat([users, torch.full_like(everything, 2)]), torch.cat([items, everything])
    known = KnownPositives.from_pairs(*pairs, NUM_USERS, num_items)
    return Negatives.of(settings, make_batch(500, num_items), NUM_USERS, num_items, known)


def in_float64(tables):
    return Tables(*(table.double() for table in tables))


def assert_right(tables, batch, negatives, loss):
    gradients, right = tables.zeros_like(), in_float64(tables.zeros_like())
    value = numba_cpu.run_batch(tables, gradients, batch, negatives, loss, key=KEY, step=STEP)
    right_value = reference.add_gradients(
        in_float64(tables), right, batch, negatives, loss, key=KEY, step=STEP
    )
    torch.testing.assert_close(value, right_value.double(), rtol=1e-5, atol=1e-6)
    for gradient, expected in zip(gradients, right, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("proposal", "count", "block_size", "size"),
    [
        ("in-batch", 0, 1, 5),  # the block's list is the positive itself, which is masked
        ("shared", 0, 32, 70),
        ("shared", 1, 7, 20),
        ("shared", 70, 100, 100),  # more than the items, more than a tile
        ("in-batch", 0, 130, 300),  # two tiles and a bit, and a last block of 40
        ("mixed", 17, 64, 65),  # a last block of 1
    ],
)
@pytest.mark.parametrize(
    ("dim", "loss"),
    [
        (1, LossSettings("bce")),
        (16, LossSettings("bpr")),
        (64, LossSettings("softmax")),
        (128, LossSettings("softmax", similarity="cosine", user_l2=0.2, item_l2=0.1, bias_l2=0.3)),
    ],
    ids=["1 bce", "16 bpr", "64 softmax", "128 softmax cosine l2"],
)
def test_shapes(dim, loss, proposal, count, block_size, size):
    negatives = make_negatives(NegativeSettings(proposal, count=count, block_size=block_size))
    assert_right(make_tables(dim), make_batch(size), negatives, loss)


@pytest.mark.parametrize("name", ["bpr", "softmax"])
def test_a_list_of_several_chunks(name):
    """The slopes of a chunk need what the others hold: bpr the sum for the positive, softmax all logits."""
    count = 2 * user_tile_numba_cpu.CHUNK + 3
    negatives = make_negatives(NegativeSettings("mixed", count=count, block_size=80), num_items=700)
    dim = {"bpr": 16, "softmax": 64}[name]  # as compiled above
    assert_right(make_tables(dim, num_items=700), make_batch(90, 700), negatives, LossSettings(name))


def test_vectors_below_the_least_norm():
    loss = LossSettings("softmax", similarity="cosine", user_l2=0.2, item_l2=0.1, bias_l2=0.3)
    tables, batch = make_tables(128), make_batch(60)
    tables.users[int(batch.user_index[0])] = 0
    tables.items[int(batch.item_index[1])] *= 2e-9
    gradients, right = tables.zeros_like(), in_float64(tables.zeros_like())
    negatives = make_negatives(NegativeSettings("in-batch", block_size=60))
    numba_cpu.run_batch(tables, gradients, batch, negatives, loss, key=KEY, step=STEP)
    reference.add_gradients(in_float64(tables), right, batch, negatives, loss, key=KEY, step=STEP)
    for gradient, expected in zip(gradients, right, strict=True):
        size = expected.abs().amax(-1, keepdim=True) if expected.ndim == 2 else expected.abs().max()
        assert ((gradient.double() - expected).abs() <= 1e-4 * size + 1e-6).all()
    assert gradients.users.abs().max() > 1e4


def test_gathered_users_and_parts_of_a_batch():
    settings, loss = NegativeSettings("mixed", count=9, block_size=32), LossSettings("softmax")
    negatives, tables, batch = make_negatives(settings), make_tables(64), make_batch(100)
    gradients = tables.zeros_like()
    value = numba_cpu.run_batch(tables, gradients, batch, negatives, loss, key=KEY, step=STEP)

    rows = batch.user_index.long()
    gathered = Tables(tables.users[rows], tables.items, tables.item_bias)
    of_rows = gathered.zeros_like()
    again = numba_cpu.run_batch(gathered, of_rows, batch, negatives, loss, key=KEY, step=STEP, gathered=True)
    assert torch.equal(again, value)
    assert torch.equal(of_rows.items, gradients.items)
    summed = torch.zeros_like(gradients.users).index_add_(0, rows, of_rows.users)
    torch.testing.assert_close(summed, gradients.users, rtol=1e-5, atol=1e-7)

    parts = 0
    for begin in range(0, 100, 64):
        part = Interactions(batch.user_index[begin : begin + 64], batch.item_index[begin : begin + 64])
        parts += numba_cpu.run_batch(
            tables, None, part, negatives, loss, key=KEY, step=STEP, first_position=begin
        )
    torch.testing.assert_close(parts, value, rtol=1e-12, atol=0)


@lru_cache
def threaded(variant, sources=SOURCES):
    """The part of a training step that adds the gradients, a thread's share of it."""
    width, has_bias, exclude, _, has_l2, similarity, _, loss = variant
    cosine, normalised = similarity == "cosine", loss in NORMALISED

    def run(parameters, gradients, batch, known, sampling, constants, factors, own, sums, counter, thread):
        _ = sources
        users, items, size = batch
        flags, heads = np.zeros(sampling.num_items, np.uint8), np.empty(sampling.num_items, np.uint32)
        sums[thread] = add_shared_batch(
            parameters,
            (gradients[0][0], gradients[1][thread], gradients[2][thread]),
            own[thread],
            take_own(users, items, size, thread, uint64(len(own)), own[thread]),
            Lists(items, size, uint64(0), flags, heads),
            known,
            sampling,
            constants,
            uint32(5),
            scales_of(size, factors),
            width,
            has_bias,
            exclude,
            has_l2,
            cosine,
            loss,
            normalised,
            False,
        )

    return entry_point(run)


def gradients_in_threads(threads, tables, batch, negatives, loss):
    """The sum of the losses, and the gradients of users, items and bias."""
    size = len(batch)
    users, items = (np.zeros(size + 2 * TILE, np.uint32) for _ in range(2))
    users[:size], items[:size] = batch.user_index.numpy(), batch.item_index.numpy()
    shapes = [(1, table.numel()) if i == 0 else (threads, table.numel()) for i, table in enumerate(tables)]
    gradients = tuple(np.zeros(shape, np.float32) for shape in shapes)
    sums = np.zeros(threads)
    run_in_threads(
        threaded(variant_of(tables, negatives, loss)),
        (
            flat_arrays(tables),
            gradients,
            (users, items, uint64(size)),
            numba_cpu.known_rows(negatives.known_positives),
            numba_cpu.sampling_of(negatives, KEY),
            numba_cpu.constants_of(negatives, loss),
            factors_of(loss, negatives.settings.scored),
            np.zeros((threads, 3, size + 2 * TILE), np.uint32),
            sums,
        ),
        threads,
    )
    return sums.sum(), [gradient.sum(0) for gradient in gradients]


@pytest.mark.parametrize("settings", [NegativeSettings("shared", count=40), NegativeSettings("in-batch")])
def test_threads_share_a_batch(settings):
    negatives, tables, batch = make_negatives(settings), make_tables(64), make_batch(600)
    loss = LossSettings("softmax")
    one, two, again = (gradients_in_threads(n, tables, batch, negatives, loss) for n in (1, 2, 2))
    assert two[0] == again[0]
    assert all(np.array_equal(a, b) for a, b in zip(two[1], again[1], strict=True))
    assert two[0] == pytest.approx(one[0], rel=1e-6)
    for part, whole in zip(two[1], one[1], strict=True):
        np.testing.assert_allclose(part, whole, rtol=1e-4, atol=1e-6)

    alone = tables.zeros_like()
    value = numba_cpu.run_batch(tables, alone, batch, negatives, loss, key=KEY, step=STEP)
    assert float(value) == one[0]  # the same code whoever calls it
    assert all(np.array_equal(a, b.numpy().reshape(-1)) for a, b in zip(one[1], alone, strict=True))


def test_a_diverged_run_shows():
    tables, batch = make_tables(64), make_batch(100)
    tables.users[int(batch.user_index[0]), 3] = torch.nan
    gradients = tables.zeros_like()
    negatives = make_negatives(NegativeSettings("in-batch", block_size=64))
    value = numba_cpu.run_batch(
        tables, gradients, batch, negatives, LossSettings("softmax"), key=KEY, step=STEP
    )
    assert torch.isnan(value)
    assert torch.isnan(gradients.items).any()


LARGE_BLOCK = """
import resource, torch
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.settings import LossSettings, NegativeSettings
from fasttower_kernels.step.shared_negatives import numba_cpu
from fasttower_kernels.tables import Interactions, Tables
def run(size):
    index = torch.arange(size, dtype=torch.int32)
    batch = Interactions(index, index)
    tables = Tables(torch.ones(size, 4), torch.ones(size, 4), torch.zeros(size))
    settings = NegativeSettings("in-batch", block_size=size)
    negatives = Negatives.of(settings, batch, size, size, KnownPositives.from_pairs(index, index, size, size))
    numba_cpu.run_batch(tables, tables.zeros_like(), batch, negatives, LossSettings(), key=(0, 0), step=0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(16)
before = run(16)
print(run(8192) - before)
"""


def test_memory_does_not_grow_with_the_scores():
    """A block's scores would take 256 MB."""
    result = subprocess.run([sys.executable, "-c", LARGE_BLOCK], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 16 << 10
