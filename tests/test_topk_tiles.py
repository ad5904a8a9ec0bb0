"""Top-K does not depend on how its work is cut up: tiles, budgets, threads, backends; the budget is kept."""

import os
import subprocess
import sys
import textwrap
from threading import Thread

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from topk_oracle import assert_equal, integers, oracle, padded, random_seen

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.topk import certified, reference, top_k
from fasttower_kernels.topk.tiles import Catalogue

try:
    from fasttower_kernels.topk import keys_numba_cpu, numba_cpu, scan_numba_cpu
except ImportError:
    numba_cpu = None

needs_numba = pytest.mark.skipif(numba_cpu is None, reason="no numba")
BACKENDS = ["torch", pytest.param("numba", marks=needs_numba)]
# One user and some items at a time, some of both, and everything at once.
BUDGETS = [1, 3_000, 50_000, 2**26]


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_users=st.sampled_from([0, 1, 2, 5, 17]),
    num_items=st.sampled_from([1, 2, 3, 16, 41, 255, 256, 257, 700, 1301]),
    dim=st.integers(1, 5),
    k=st.sampled_from([1, 2, 3, 10, 64, 300]),
    spread=st.integers(1, 4),
    seen_share=st.sampled_from([None, 0.0, 0.02, 0.3, 0.9, 1.0]),
    candidate_share=st.sampled_from([None, 0.0, 0.01, 0.5, 0.95, 1.0]),
    bias=st.booleans(),
    budget=st.sampled_from(BUDGETS),
    threads=st.sampled_from([1, 2, 3]),
)
def test_equals_the_oracle_with_planted_ties(
    *, seed, backend, num_users, num_items, dim, k, spread, seen_share, candidate_share, bias, budget, threads
):
    generator = np.random.default_rng(seed)
    users = padded(integers(generator, -spread, spread + 1, num_users, dim), dim + 3)
    items = padded(integers(generator, -spread, spread + 1, num_items, dim), dim + 2)
    given = {}
    if bias:
        given["item_bias"] = integers(generator, -1, 2, num_items)
    if seen_share is not None:
        given["seen"] = random_seen(generator, 6, num_items, seen_share)
        given["seen_users"] = torch.from_numpy(generator.integers(0, 6, num_users).astype(np.int32))
    if candidate_share is not None:
        given["candidates"] = torch.from_numpy(generator.random(num_items) < candidate_share)
    torch.set_num_threads(threads)

    result = top_k(users, items, k=k, memory_budget_bytes=budget, backend=backend, **given)

    assert torch.get_num_threads() == threads
    assert_equal(result, oracle(users, items, k, **given))
    # Bits, too: 0.0 is never -0.0.
    assert not torch.signbit(result.scores[result.scores == 0]).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_ties_across_tiles_go_to_the_smaller_index(backend, budget):
    # One level, two levels, each level better than all before it, and each worse.
    num_items = 5000
    levels = [np.zeros(num_items), np.arange(num_items) // 7 % 2]
    levels += [np.arange(num_items) // 3, -(np.arange(num_items) // 3)]
    item_vectors = torch.from_numpy(np.stack(levels, axis=1).astype(np.float32))
    users = torch.eye(4)
    for k in (1, 10, 333):
        result = top_k(users, item_vectors, k=k, memory_budget_bytes=budget, backend=backend)
        assert_equal(result, oracle(users, item_vectors, k))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("share", [0.03, 0.97])  # gathered and masked
def test_nothing_but_unseen_candidates_is_given(backend, budget, share):
    generator = np.random.default_rng(5)
    users, items = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (50, 2000))
    candidates = torch.from_numpy(generator.random(2000) < share)
    # Seen are the best of each user, so that only what is left out properly leaves room for others.
    scores = (users @ items.T).masked_fill(~candidates, -torch.inf)
    mask = np.zeros((50, 2000), dtype=bool)
    np.put_along_axis(mask, scores.topk(20).indices.numpy(), values=True, axis=1)
    rows, columns = (torch.from_numpy(index) for index in mask.nonzero())
    seen = KnownPositives.from_pairs(rows, columns, 50, 2000)
    result = top_k(
        users,
        items,
        k=60,
        seen=seen,
        seen_users=torch.arange(50),
        candidates=candidates,
        memory_budget_bytes=budget,
        backend=backend,
    )
    there = result.items >= 0
    left = int(candidates.sum()) - 20
    assert (there.sum(1) == min(60, left)).all()
    assert torch.isfinite(result.scores[there]).all()
    assert (result.scores[~there] == -torch.inf).all()
    item = result.items.long().clamp(min=0)
    assert candidates[item][there].all()
    assert not torch.from_numpy(mask).gather(1, item)[there].any()
    best = scores.masked_fill(torch.from_numpy(mask), -torch.inf).topk(min(60, left)).values
    torch.testing.assert_close(result.scores[:, : best.shape[1]], best)


@pytest.mark.parametrize("num_items", [26_744, 100_000])
def test_a_tile_has_fewer_than_2_31_scores_on_the_largest_gpu(num_items):
    catalogue = Catalogue.of(torch.ones(1, 1).expand(num_items, 1), None, None, 1)
    rows, columns = reference.tile_shape(catalogue, 141 << 30, per_row=reference.BYTES_PER_BEST * 10)
    assert 2**31 - columns <= rows * columns < 2**31


@pytest.mark.parametrize("scoring", ["float32", "bfloat16"])
def test_no_budget_makes_a_tile_larger_than_what_torch_can_count(monkeypatch, scoring):
    most, tiles, multiply = 40_000, [], reference.multiply
    for module in (reference, certified):
        monkeypatch.setattr(
            module,
            "multiply",
            lambda *factors, out: tiles.append(out.numel()) or multiply(*factors, out=out),
        )
    monkeypatch.setattr(reference, "_MOST_SCORES", most)
    generator = np.random.default_rng(3)
    users, items = integers(generator, -3, 4, 101, 6), integers(generator, -3, 4, 1500, 6)
    result = top_k(users, items, k=9, scoring=scoring, memory_budget_bytes=1 << 30, backend="torch")
    assert most // 2 < max(tiles) <= most
    assert_equal(result, oracle(users, items, 9))


@needs_numba
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="rounds in a way of its own")
@pytest.mark.parametrize("dim", [7, 64, 130])
def test_no_bit_depends_on_budget_threads_or_other_users(dim):
    users, items = (torch.randn(n, dim, generator=torch.Generator().manual_seed(n)) for n in (1100, 2309))
    bias = torch.randn(len(items), generator=torch.Generator().manual_seed(1))
    right = top_k(users, items, k=7, item_bias=bias, backend="numba")
    for threads, budget, rows in [
        (2, None, 1100),
        (3, 20_000, 301),
        (1, 1, 67),
        (1, None, 5),
        (1, None, 1),
        (2, 1, 3),
    ]:
        torch.set_num_threads(threads)
        some = top_k(users[:rows], items, k=7, item_bias=bias, memory_budget_bytes=budget, backend="numba")
        assert torch.equal(some.items, right.items[:rows])
        assert torch.equal(some.scores, right.scores[:rows])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gathered", [False, True])
def test_a_bias_alone_can_make_any_item_the_best(backend, gathered):
    candidates = torch.arange(1301) % 2 == 1 if gathered else None
    for item in range(1, 1301, 34):
        bias = torch.zeros(1301)
        bias[item] = 1
        result = top_k(
            torch.ones(1, 1),
            torch.zeros(1301, 1),
            k=1,
            item_bias=bias,
            candidates=candidates,
            backend=backend,
        )
        assert result.items.tolist() == [[item]]
        assert result.scores.tolist() == [[1.0]]


@needs_numba
def test_many_chunks_on_several_threads_keep_their_rows(monkeypatch):
    monkeypatch.setattr(numba_cpu, "_ROWS", 8)
    generator = np.random.default_rng(1)
    users, items = integers(generator, -9, 10, 999, 6), integers(generator, -9, 10, 1500, 6)
    seen, rows = random_seen(generator, 40, 1500, 0.1), torch.from_numpy(generator.integers(0, 40, 999))
    torch.set_num_threads(4)
    result = top_k(users, items, k=9, seen=seen, seen_users=rows)
    assert_equal(result, oracle(users, items, 9, seen=seen, seen_users=rows))


@needs_numba
@pytest.mark.parametrize(
    ("budget", "k"), [(50_000, 1), (1_000_000, 1), (3_000_000, 1), (50_000, 500), (1_000_000, 500)]
)
def test_all_workers_together_keep_the_budget(monkeypatch, budget, k):
    shapes = []
    worker = numba_cpu._Worker
    monkeypatch.setattr(numba_cpu, "_Worker", lambda shape: shapes.append(shape) or worker(shape))
    torch.set_num_threads(4)
    top_k(torch.ones(3000, 2), torch.ones(5000, 2), k=k, memory_budget_bytes=budget, backend="numba")
    assert budget // 2 < sum(shape.num_bytes for shape in shapes) <= budget


@needs_numba
@pytest.mark.parametrize("k", [1, 100, 3000])
def test_a_worker_takes_no_more_than_it_needs(k):
    catalogue = Catalogue.of(torch.ones(30_000, 2), None, None, 1)
    assert 2 << 20 <= numba_cpu._shape(10**5, k, catalogue, 1, 1 << 28).num_bytes <= (4 << 20) + 300_000


@needs_numba
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("share", [0.5, 0.95])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_parameters_are_ranked_in_every_mode_of_torch(monkeypatch, threads, share, mode):
    monkeypatch.setattr(numba_cpu, "_ROWS", 8)
    generator = np.random.default_rng(4)
    candidates = torch.from_numpy(generator.random(300) < share)
    vectors, bias = (torch.nn.Parameter(integers(generator, -9, 10, 300, *rest)) for rest in ([4], []))
    torch.set_num_threads(threads)
    with mode():
        result = top_k(vectors, vectors, k=5, item_bias=bias, candidates=candidates)
    assert not result.scores.requires_grad
    expected = oracle(vectors.detach(), vectors.detach(), 5, item_bias=bias.detach(), candidates=candidates)
    assert_equal(result, expected)


@needs_numba
@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_leaves_the_number_of_threads(monkeypatch, threads):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(numba_cpu._Worker, "run", fail)
    monkeypatch.setattr(numba_cpu, "_ROWS", 8)
    torch.set_num_threads(threads)
    with pytest.raises(MemoryError):
        top_k(torch.ones(50, 2), torch.ones(9, 2), k=1, backend="numba")
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_uninitialised_memory_is_not_read(backend, share):
    # In deterministic mode torch fills what it allocates with NaN.
    generator = np.random.default_rng(2)
    users, items = integers(generator, -3, 4, 37, 3), integers(generator, -3, 4, 777, 3)
    candidates = torch.from_numpy(generator.random(777) <= share)
    given = {"item_bias": integers(generator, -3, 4, 777), "candidates": candidates}
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        result = top_k(users, items, k=20, memory_budget_bytes=9_000, backend=backend, **given)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal(result, oracle(users, items, 20, **given))


def test_the_best_of_a_tile_take_negative_zero_for_zero():
    columns, best = reference._best_of_tile(torch.tensor([[-1.0, -0.0, 0.0, -0.0, 0.0]]), 3)
    assert columns.tolist() == [[1, 2, 3]]
    assert not torch.signbit(best).any()


@needs_numba
@pytest.mark.parametrize("gathered", [False, True])
def test_the_scan_writes_nowhere_else(gathered):
    rows, stride, width, k, guard = 3, 512, 300, 4, 64
    block = scan_numba_cpu.BLOCK
    generator = np.random.default_rng(0)

    def guarded(shape, dtype, value):
        whole = np.full(guard + int(np.prod(shape)) + guard, 77, dtype=dtype)
        inside = whole[guard:-guard].reshape(shape)
        inside[:] = value
        return whole, inside

    values = np.full((rows, stride), np.nan, np.float32)
    values[:, :width] = generator.integers(-50, 1, (rows, width))
    values[values == 0] = -0.0
    values[:, 0] = values[:, width - 1] = 50  # what is seen would be the best
    values[:, width - 2] = 0.0  # equals -0.0, and comes later
    wholes, arrays = zip(
        guarded(rows * stride, np.float32, values.ravel()),
        guarded(2 * block, np.float32, 0),
        guarded((rows, k + 3), np.uint64, 99),
        guarded(rows, np.int64, 0),
        guarded(rows, np.float32, -np.inf),
        guarded((rows, k), np.int32, -1),
        guarded((rows, k), np.float32, -np.inf),
        guarded(rows, np.int64, np.arange(rows) * 2),
        strict=True,
    )
    tile, bias, keys, counts, thresholds, items, scores, cursors = arrays
    first = 0 if gathered else 1000
    index = np.arange(width) * 3 + 1000 if gathered else np.empty(0, np.int64)
    item_of = index if gathered else np.arange(width) + first
    seen = item_of[[0, width - 1] * rows].astype(np.int32)  # the first and the last column of each row
    scan_numba_cpu.scan_tile(True, gathered)(
        tile, stride, width, bias, first, index, cursors, np.arange(rows) * 2 + 2, seen,
        keys, counts, thresholds, k,
    )  # fmt: skip
    assert (thresholds > 0).sum() == 0  # zeros are found, and what is seen is not
    assert (thresholds > -np.inf).all()  # the keys were full more than once
    keys_numba_cpu.finish_rows()(keys, counts, k)
    keys[:, :k].sort(axis=1)
    keys_numba_cpu.unpack()(keys, items, scores)

    for whole in wholes:
        assert (whole[:guard] == 77).all()
        assert (whole[-guard:] == 77).all()
    written = tile.reshape(rows, stride)
    np.testing.assert_array_equal(written[:, 1 : width - 1], values[:, 1 : width - 1])
    assert np.isnan(written[:, block * 2 :]).all()
    for r in range(rows):
        order = np.lexsort((item_of[1:-1], -values[r, 1 : width - 1]))[:k] + 1
        np.testing.assert_array_equal(items[r], item_of[order])
        np.testing.assert_array_equal(scores[r], values[r, order])
        assert scores[r, 0] == 0
    assert not np.signbit(scores[scores == 0]).any()
    np.testing.assert_array_equal(cursors, np.arange(rows) * 2 + 2)


@needs_numba
@pytest.mark.parametrize("k", [1, 2, 10, 97, 500])
@pytest.mark.parametrize("order", ["ascending", "descending", "as it comes", "one value"])
def test_any_order_of_scores_leaves_the_best_keys(k, order):
    # Long enough to fill the keys again and again, whatever their number is.
    scores = torch.randperm(9000, generator=torch.Generator().manual_seed(k)).float() - 4500
    if order == "one value":
        scores.zero_()
    elif order != "as it comes":
        scores = scores.sort(descending=order == "descending").values
    users = torch.tensor([[1.0], [-1.0], [1e-30]])
    result = top_k(users, scores[:, None], k=k, backend="numba", memory_budget_bytes=100_000)
    assert_equal(result, oracle(users, scores[:, None], k))


def test_few_candidates_are_gathered_while_their_index_fits():
    vectors, candidates = torch.ones(1000, 2), torch.arange(1000) % 10 == 0
    assert len(Catalogue.of(vectors, None, candidates, 2000)) == 100
    assert len(Catalogue.of(vectors, None, candidates, 1599)) == 1000
    assert len(Catalogue.of(vectors, None, ~candidates, 10**6)) == 1000
    assert Catalogue.of(vectors, None, candidates | True, 10**6).candidates is None


BUDGETS_KEPT = (1_000_000, 16_000_000)
MEMORY = """
    import ctypes
    import torch
    from fasttower_kernels.known_positives import KnownPositives
    from fasttower_kernels.topk import reference, top_k

    # What is freed goes back to the system (M_MMAP_THRESHOLD), so that it counts when it is allocated again.
    ctypes.CDLL(None).mallopt(-3, 16384)

    def resident(name):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

    def peak_of(**arguments):
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
        before = resident("VmRSS")
        top_k(users, items, **arguments)
        return resident("VmHWM") - before

    num_users, num_items = 400, 20000
    users, items = (torch.randn(n, 20)[:, :16] for n in (num_users, num_items))  # strided
    everyone = torch.arange(num_users)
    seen = KnownPositives.from_pairs(
        everyone.repeat_interleave(60), torch.randint(num_items, (num_users * 60,)), num_users, num_items
    )
    given = {"item_bias": torch.randn(num_items), "seen": seen, "seen_users": everyone}
    some = torch.rand(num_items) < 0.5
    for backend, scoring, k in %s:
        torch.set_num_threads(1 if backend == "torch" else 2)
        for budget in %s:
            for candidates in (None, some):
                options = given | {
                    "backend": backend, "scoring": scoring, "k": k, "memory_budget_bytes": budget,
                    "candidates": candidates,
                }
                peak_of(**options)  # libraries allocate what they keep
                result = num_users * k * 8
                print(f"{backend}-{scoring}-{k}", budget, peak_of(**options) - result)

"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak that can be reset")
def test_the_budget_is_kept():
    ways = [("torch", "float32", 5), ("torch", "bfloat16", 5)]
    if numba_cpu is not None:
        ways += [("numba", "float32", 5), ("numba", "float32", 1000)]
    program = [sys.executable, "-c", textwrap.dedent(MEMORY) % (ways, BUDGETS_KEPT)]
    done = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    peaks = [(way, int(budget), int(peak)) for way, budget, peak in map(str.split, done.splitlines())]
    assert len(peaks) == 2 * len(ways) * len(BUDGETS_KEPT)
    for _, budget, peak in peaks:
        assert peak <= budget + 500_000, peaks  # half a megabyte for the interpreter and stacks
    # The measurement sees what is allocated: all scores would be 32 MB.
    seen = {"torch-float32-5": 3_000_000, "torch-bfloat16-5": 2_000_000, "numba-float32-5": 1_500_000}
    for way, least in seen.items():
        assert max((peak for name, _, peak in peaks if name == way), default=least + 1) > least, peaks


@needs_numba
def test_calls_that_overlap_leave_torch_its_threads():
    def later_thread():
        numbers = []
        thread = Thread(target=lambda: numbers.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return numbers[0]

    torch.set_num_threads(3)
    numba_cpu._matmul_threads.forget()  # those that other tests have made
    generator = torch.Generator().manual_seed(0)
    users, items = (torch.randn(n, 8, generator=generator) for n in (3000, 2000))
    calls = [Thread(target=top_k, args=(users[:n], items), kwargs={"k": 5}) for n in (1000, 3000, 2000)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert (torch.get_num_threads(), later_thread()) == (3, 3)
