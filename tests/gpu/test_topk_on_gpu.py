"""Top-K on a GPU: every precision gives float32's result."""

import numpy as np
import pytest
import torch
from gpu_cases import DEVICE, leave_a_lost_device
from topk_oracle import assert_equal, integers, oracle, random_seen

from fasttower_kernels.topk import certified, top_k

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)

SCORINGS = ["float32", "tf32", "bfloat16"]


@pytest.fixture(autouse=True)
def _device():
    yield
    leave_a_lost_device()


@pytest.fixture
def scored_twice(monkeypatch):
    """How many users were scored in float32 throughout."""
    counts = []

    def spy(users, *rest, **options):
        counts.append(len(users))
        return reference(users, *rest, **options)

    reference = certified.top_k_torch
    monkeypatch.setattr(certified, "top_k_torch", spy)
    return counts


@pytest.fixture(params=[False, True], ids=["settings as they come", "tf32 allowed everywhere"])
def _settings(request):
    before = torch.get_float32_matmul_precision()
    if request.param:
        torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_settings")
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("spread", [1, 1000])  # exact in every precision, and in float32 alone
@pytest.mark.parametrize("budget", [None, 1_000_000])
def test_exact_scores_give_the_oracles_bits(scoring, spread, budget):
    generator = np.random.default_rng(spread)
    users, items = (integers(generator, -spread, spread + 1, n, 8).to(DEVICE) for n in (211, 3001))
    given = {
        "item_bias": integers(generator, -spread, spread + 1, 3001).to(DEVICE),
        "seen": random_seen(generator, 300, 3001, 0.05).to(DEVICE),
        "seen_users": torch.from_numpy(generator.integers(0, 300, 211)).to(DEVICE),
    }
    for candidates in (None, torch.from_numpy(generator.random(3001) < 0.5).to(DEVICE)):
        options = given | {"candidates": candidates}
        result = top_k(users, items, k=10, scoring=scoring, memory_budget_bytes=budget, **options)
        assert_equal(result, oracle(users, items, 10, **options))


@pytest.mark.usefixtures("_settings")
@pytest.mark.parametrize("scoring", SCORINGS)
def test_scores_are_those_of_float32_and_nearly_everybody_is_proved(scoring, scored_twice):
    generator = torch.Generator().manual_seed(0)
    users, items = (torch.randn(n, 64, generator=generator).to(DEVICE) for n in (2000, 26_744))
    result = top_k(users, items, k=10, scoring=scoring)
    exact = users.double() @ items.double().T
    torch.testing.assert_close(result.scores.double(), exact.topk(10).values, rtol=1e-5, atol=1e-5)
    assert sum(scored_twice) <= 20


@pytest.mark.parametrize("scoring", ["tf32", "bfloat16"])
@pytest.mark.parametrize("dim", [1, 7, 64, 1000])
@pytest.mark.parametrize("bias", [False, True])
def test_the_bound_holds(scoring, dim, bias):
    # Positive values only: their sums grow, and lose most to sums that are cut off.
    generator = torch.Generator().manual_seed(dim)
    users, items = (torch.rand(n, dim, generator=generator).to(DEVICE) for n in (100, 5000))
    biases = torch.randn(5000, generator=generator).to(DEVICE) if bias else None
    catalogue = certified.Catalogue.of(items, biases, None, 1 << 30)
    found, outside = certified._keep(users, catalogue, 50, None, 5000, scoring)
    scores = users.double() @ items.double().T + (0 if biases is None else biases.double())
    left = scores.scatter(1, found.long(), -torch.inf).amax(1)
    assert (outside >= left).all()


def test_a_budget_beyond_2_31_scores_changes_nothing():
    # 2.4e9 scores would fit the budget; tiles that large are too much for 32-bit indices.
    needed = 44 << 30
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"less than {needed >> 30} GiB of free device memory")
    generator = np.random.default_rng(0)
    users, items = (integers(generator, -9, 10, n, 8).to(DEVICE) for n in (90_000, 26_744))
    large, small = (top_k(users, items, k=10, memory_budget_bytes=n << 30) for n in (32, 1))
    assert large.items.equal(small.items)
    assert large.scores.equal(small.scores)
