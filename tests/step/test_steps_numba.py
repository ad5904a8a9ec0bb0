"""The compiled steps against the plain torch reference, to rounding; they repeat bit for bit."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("numba")

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.settings import LossSettings, NegativeSettings, StepSettings
from fasttower_kernels.step import Step, TrainState, numba_cpu, steps_per_epoch
from fasttower_kernels.step.variant_numba_cpu import Variant, variant_of
from fasttower_kernels.tables import Interactions, Tables, padded

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


def make_interactions():
    generator = torch.Generator().manual_seed(NUM_ROWS)
    return Interactions(
        torch.randint(NUM_USERS, (NUM_ROWS,), generator=generator, dtype=torch.int32),
        torch.randint(NUM_ITEMS, (NUM_ROWS,), generator=generator, dtype=torch.int32),
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


L2 = {"user_l2": 0.2, "item_l2": 0.2}


def run(
    backend,
    dim,
    threads=1,
    *,
    loss=LossSettings(**L2),  # noqa: B008 - it is frozen
    negatives=NegativeSettings(count=4),  # noqa: B008
    plain=False,
    batch_size=70,
    calls=(5,),
    epoch=1,
    optimiser="adam",
):
    """The sum of the losses; parameters and moments."""
    torch.set_num_threads(threads)
    state = TrainState.start(make_tables(dim, bias=not plain))
    settings = StepSettings(0.05, batch_size, seed=9, loss=loss, negatives=negatives, optimiser=optimiser)
    interactions, known = make_interactions(), None if plain else make_known()
    drawn = Negatives.of(negatives, interactions, NUM_USERS, NUM_ITEMS, known)
    steps = Step(state, interactions, drawn, settings, backend=backend)
    first, total = epoch * steps_per_epoch(NUM_ROWS, batch_size), 0.0
    for count in calls:
        total += float(steps.run(first, count))
        first += count
    assert all(not gradient.any() for gradient in state.gradients)
    return total, [*state.parameters, *state.moments_1, *state.moments_2]


def assert_equal_to_rounding(dim, threads, rtol=2e-4, atol=2e-5, **options):
    total, arrays = run("numba", dim, threads, **options)
    expected, right = run("torch", dim, **options)
    assert total == pytest.approx(expected, rel=1e-5)
    for one, other in zip(arrays, right, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("dim", "threads", "options"),
    [
        (3, 1, {}),
        (1, 1, {"negatives": NegativeSettings(count=0), "batch_size": 300, "calls": (1,)}),
        (3, 2, {}),
        (3, 2, {"negatives": NegativeSettings(count=70), "batch_size": 299, "calls": (2,)}),
        (16, 1, {"plain": True, "loss": LossSettings(), "negatives": NegativeSettings(count=10)}),
    ],
)
def test_steps(dim, threads, options):
    assert_equal_to_rounding(dim, threads, **options)


SHARED = {
    "shared": NegativeSettings("shared", count=20, block_size=32),
    "in-batch": NegativeSettings("in-batch", block_size=48),
    "mixed": NegativeSettings("mixed", count=9, block_size=70),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("negatives", SHARED)
def test_shared_negatives(negatives, threads):
    """Blocks that threads share, and a last block that is shorter."""
    options = {"loss": LossSettings("softmax", **L2), "negatives": SHARED[negatives], "batch_size": 130}
    assert_equal_to_rounding(3, threads, calls=(3,), **options)


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(LossSettings("gbce", **L2), marks=pytest.mark.slow),
        pytest.param(LossSettings("bpr", **L2, bias_l2=0.1), marks=pytest.mark.slow),
        LossSettings("softmax", **L2),
        LossSettings("bce", similarity="cosine", temperature=0.5),
    ],
    ids=lambda loss: f"{loss.name} {loss.similarity}",
)
@pytest.mark.parametrize(
    "negatives", [NegativeSettings(count=4), NegativeSettings(count=4, pool=12)], ids=["all", "hard"]
)
def test_every_loss(loss, negatives):
    assert_equal_to_rounding(3, 2, loss=loss, negatives=negatives)


def test_popularity():
    loss, negatives = LossSettings("softmax", **L2), NegativeSettings("popularity", count=5)
    assert_equal_to_rounding(3, 2, loss=loss, negatives=negatives)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dataflow", ["own", "shared"])
def test_repeats_bit_for_bit_in_one_call_or_many(dataflow, threads):
    options = {}
    if dataflow == "shared":  # as compiled above
        options = {"loss": LossSettings("softmax", **L2), "negatives": SHARED["mixed"]}
    total, arrays = run("numba", 3, threads, **options)
    for calls in ((5,), (1, 3, 1)):
        again, others = run("numba", 3, threads, calls=calls, **options)
        assert again == pytest.approx(total, rel=1e-12)
        assert all(one.equal(other) for one, other in zip(arrays, others, strict=True))


def in_new_process(script, **environment):
    environment["PYTHONPATH"] = ":".join(path for path in sys.path if path)
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | environment
    ).stdout.split()


def test_threads_are_those_of_torch_and_have_a_tile_each():
    assert numba_cpu.thread_count(10_000) == 1
    torch.set_num_threads(7)
    assert [numba_cpu.thread_count(size) for size in (1, 64, 65, 10_000)] == [1, 1, 2, 7]


CACHED = """
import torch
torch.set_num_threads(1)
from tests.step.test_steps_numba import numba_cpu, run, variant
run("numba", 3)
stats = numba_cpu._compiled(variant(), "own", False).stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def variant():
    """That of a run with dim 3."""
    negatives = Negatives(NegativeSettings(count=4), NUM_USERS, NUM_ITEMS, make_known())
    return variant_of(make_tables(3), negatives, LossSettings(**L2))


def test_compiled_code_is_found_again_by_another_process():
    assert variant() == Variant(4, True, True, True, True, "dot", "uniform", "bce")
    run("numba", 3)
    assert in_new_process(CACHED) == ["1", "0"]


HASHED = """
import hashlib
import torch
torch.set_num_threads(1)
from tests.step.test_steps_numba import run
_, arrays = run("numba", 16, batch_size=4, calls=(70,), optimiser="lazy_adam")
print(hashlib.sha256(b"".join(array.numpy().tobytes() for array in arrays)).hexdigest())
"""


@pytest.mark.slow
def test_the_process_that_compiles_gets_the_bits_that_later_ones_get(tmp_path):
    compiled = in_new_process(HASHED, NUMBA_CACHE_DIR=str(tmp_path))
    assert list(tmp_path.rglob("*.nbc"))
    assert in_new_process(HASHED, NUMBA_CACHE_DIR=str(tmp_path)) == compiled
