"""Top-K by reduced precision: the result of float32 whatever rounding does, by bounds that hold."""

from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from topk_oracle import assert_equal, integers, oracle, padded, random_seen

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.topk import certified, precision, top_k
from fasttower_kernels.topk.tiles import Catalogue

# On a CPU the matmul of factors rounded to tf32 is in float32, which is what a tensor core is to equal.
REDUCED = ["bfloat16", "tf32"]


@pytest.fixture(autouse=True)
def tf32_everywhere(monkeypatch):
    monkeypatch.setitem(precision._DEVICES, "tf32", ("cpu", "cuda"))


def few_spare(patch, spare):
    patch.setattr(certified, "_FEWEST_SPARE", spare)


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


@pytest.mark.parametrize("scoring", REDUCED)
@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_users=st.sampled_from([0, 1, 2, 5, 17]),
    num_items=st.sampled_from([1, 2, 3, 16, 41, 257, 700, 1301]),
    dim=st.integers(1, 5),
    k=st.sampled_from([1, 2, 3, 10, 64, 300]),
    spare=st.sampled_from([1, 2, 7, 32]),
    spread=st.sampled_from([1, 3, 300, 1500]),  # scores of the larger ones are exact only in float32
    seen_share=st.sampled_from([None, 0.0, 0.02, 0.3, 0.9, 1.0]),
    candidate_share=st.sampled_from([None, 0.0, 0.01, 0.5, 0.95, 1.0]),
    bias=st.booleans(),
    budget=st.sampled_from([1, 60_000, 2**26]),
)
def test_equals_the_oracle_with_planted_ties(
    *, scoring, seed, num_users, num_items, dim, k, spare, spread, seen_share, candidate_share, bias, budget
):
    generator = np.random.default_rng(seed)
    users = padded(integers(generator, -spread, spread + 1, num_users, dim), dim + 3)
    items = padded(integers(generator, -spread, spread + 1, num_items, dim), dim + 2)
    given = {}
    if bias:
        given["item_bias"] = integers(generator, -spread, spread + 1, num_items)
    if seen_share is not None:
        given["seen"] = random_seen(generator, 6, num_items, seen_share)
        given["seen_users"] = torch.from_numpy(generator.integers(0, 6, num_users).astype(np.int32))
    if candidate_share is not None:
        given["candidates"] = torch.from_numpy(generator.random(num_items) < candidate_share)
    with pytest.MonkeyPatch.context() as patch:
        few_spare(patch, spare)
        result = top_k(users, items, k=k, scoring=scoring, memory_budget_bytes=budget, **given)
    assert_equal(result, oracle(users, items, k, **given))
    assert not torch.signbit(result.scores[result.scores == 0]).any()


def keep(user, items, bias, kept, scoring, columns=64):
    catalogue = Catalogue.of(items, bias, None, 1 << 20)
    return certified._keep(user, catalogue, kept, None, columns, scoring)


def true_scores(users, items, bias):
    scores = users.double() @ items.double().T
    return scores if bias is None else scores + bias.double()


def assert_nothing_outside_is_above_the_bound(users, items, bias, kept, scoring):
    found, outside = keep(users, items, bias, kept, scoring)
    left = true_scores(users, items, bias).scatter(1, found.long(), -torch.inf).amax(1)
    assert (outside.double() >= left).all(), (outside.double() - left).min()


HALF = 2.0**-8  # 1 + HALF becomes 1 in bfloat16, 1 + HALF / 8 in tf32


@pytest.mark.parametrize(
    ("scoring", "user", "item", "bias"),
    [
        pytest.param("bfloat16", [1.0], [1 + HALF], None, id="items"),
        pytest.param("bfloat16", [1 + HALF], [1.0], None, id="users"),
        pytest.param("bfloat16", [1 + HALF] * 64, [1 + HALF] * 64, None, id="both"),
        pytest.param("bfloat16", [-1.0], [-1 - HALF], None, id="signs"),
        pytest.param("bfloat16", [1.0, HALF / 2], [1.0, 2.0], None, id="the score"),
        pytest.param("bfloat16", [1.0, HALF / 2], [-1.0, 1.0], None, id="a score below zero"),
        pytest.param("bfloat16", [1.0, 1.0], [256.0, 1.0], -256.0, id="the score before its bias"),
        pytest.param("bfloat16", [1.0], [1.0], HALF / 2, id="the score after its bias"),
        pytest.param("bfloat16", [2.0**-83 * (1 + HALF)], [2.0**30], None, id="users whose squares are 0"),
        pytest.param("bfloat16", [2.0**30], [2.0**-83 * (1 + HALF)], None, id="items whose squares are 0"),
        pytest.param("tf32", [1.0], [1 + HALF / 8 - 2**-20], None, id="items in tf32"),
        pytest.param("tf32", [1 + HALF / 8 - 2**-20], [1.0], None, id="users in tf32"),
        pytest.param("tf32", [1.0, 2.0**-12], [1.0, 2.0**-12], None, id="sums in float32"),
        pytest.param("tf32", [1.0], [1.0], 2.0**-24, id="a bias in float32"),
    ],
)
def test_each_rounding_is_in_the_bound(scoring, user, item, bias):
    # All items are alike: the ones left out lack what rounding took from all of them.
    items = torch.tensor([item] * 100)
    biases = None if bias is None else torch.full((100,), bias)
    found, _ = keep(torch.tensor([user]), items, biases, 10, scoring)
    assert (found >= 0).all()
    assert_nothing_outside_is_above_the_bound(torch.tensor([user]), items, biases, 10, scoring)


@pytest.mark.parametrize(
    ("user", "last"), [(1.0, 1.0), (1 + HALF / 8 - 2**-20, 0.5)], ids=["most is lost", "longest"]
)
def test_the_bound_is_that_of_all_tiles(user, last):
    items = torch.full((128, 1), 1 + HALF / 8 - 2**-20 if user == 1 else 1.0)
    items[64:] = last
    assert_nothing_outside_is_above_the_bound(torch.tensor([[user]]), items, None, 10, "tf32")


@pytest.mark.parametrize("scoring", REDUCED)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dim=st.sampled_from([1, 2, 7, 64, 300]),
    num_users=st.sampled_from([1, 9]),
    num_items=st.sampled_from([30, 257]),
    user_scale=st.sampled_from([1e-25, 1e-6, 1.0, 1e8]),
    item_scale=st.sampled_from([1e-12, 1.0, 1e20]),
    heavy=st.booleans(),
    bias=st.booleans(),
)
def test_the_bound_holds_for_vectors_of_any_size(
    *, seed, scoring, dim, num_users, num_items, user_scale, item_scale, heavy, bias
):
    generator = torch.Generator().manual_seed(seed)
    users, items = (torch.randn(n, dim, generator=generator) for n in (num_users, num_items))
    if heavy:  # a few items much larger than the others
        items *= torch.exp(2 * torch.randn(num_items, 1, generator=generator))
    users, items = users * user_scale, items * item_scale
    biases = torch.randn(num_items, generator=generator) * user_scale * item_scale * 4 if bias else None
    assert_nothing_outside_is_above_the_bound(users, items, biases, 12, scoring)


def test_what_bfloat16_gets_wrong_is_scored_again(scored_twice):
    # To the first user all items are the same in bfloat16; to the second they are plain.
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    items = torch.stack([1 + order * 2.0**-17, order.float()], dim=1)
    users = torch.eye(2)
    kept, _ = keep(users, items, None, 42, "bfloat16", columns=1024)
    right = oracle(users, items, 10)
    assert not np.isin(right[0][0], kept[0]).all()  # bfloat16 alone cannot tell
    result = top_k(users, items, k=10, scoring="bfloat16")
    assert_equal(result, right)
    assert scored_twice == [1]


def test_nobody_proved_is_everybody_scored_again(scored_twice):
    items = torch.ones(500, 3)
    items[250:] = 2
    users = torch.arange(1.0, 8)[:, None].expand(-1, 3)
    result = top_k(users, items, k=5, scoring="bfloat16")
    assert_equal(result, oracle(users, items, 5))
    assert scored_twice == [7]


@pytest.mark.parametrize("scoring", REDUCED)
@pytest.mark.parametrize("bias", [False, True])
def test_nearly_everybody_is_proved(scored_twice, scoring, bias):
    generator = torch.Generator().manual_seed(0)
    users, items = (torch.randn(n, 64, generator=generator) for n in (1000, 8000))
    given = {"item_bias": torch.randn(8000, generator=generator)} if bias else {}
    result = top_k(users, items, k=10, scoring=scoring, **given)
    right = top_k(users, items, k=10, **given)
    assert sum(scored_twice) <= 10
    torch.testing.assert_close(result.scores, right.scores, rtol=1e-5, atol=1e-5)
    assert (result.items == right.items).double().mean() > 0.999


def test_few_items_left_are_proved_to_be_all(scored_twice):
    # Nothing is left, fewer than K, K, fewer than are kept, and as many as that.
    num_items, left = 300, [0, 3, 5, 20, 37]
    pairs = [(user, item) for user, many in enumerate(left) for item in range(num_items - many)]
    rows, columns = (torch.tensor(index) for index in zip(*pairs, strict=True))
    seen = KnownPositives.from_pairs(rows, columns, len(left), num_items)
    users, items = torch.ones(len(left), 1), torch.arange(300.0).roll(7)[:, None]
    given = {"seen": seen, "seen_users": torch.arange(len(left))}
    result = top_k(users, items, k=5, scoring="bfloat16", **given)
    assert_equal(result, oracle(users, items, 5, **given))
    assert scored_twice == []


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("others", [0, 4])
def test_scores_that_bfloat16_makes_infinite_are_scored_again(sign, others):
    largest = torch.finfo(torch.float32).max
    items = sign * largest * (1 - torch.arange(200) * 2.0**-20)
    items[:others] = 1
    items = items[:, None]
    assert items[100].bfloat16().isinf()
    users = torch.tensor([[1.0], [0.0], [-1.0], [0.5]])
    result = top_k(users, items, k=5, scoring="bfloat16")
    assert_equal(result, oracle(users, items, 5))


def test_a_sum_that_may_overflow_proves_nothing():
    # Factors are exact in bfloat16 and their squares finite; sums in another order might be infinite.
    users, items = torch.full((1, 2), 2.0**63), torch.full((50, 2), 2.0**63)
    items[:, 1] *= -1
    items[7] = 2.0**62
    _, outside = keep(users, items, None, 40, "bfloat16")
    assert not outside.isfinite().any()
    assert_equal(top_k(users, items, k=3, scoring="bfloat16"), oracle(users, items, 3))


def test_all_that_would_be_kept_is_scored_at_once(scored_twice, monkeypatch):
    monkeypatch.setattr(certified, "_keep", None)
    items = torch.arange(42.0)[:, None]
    assert top_k(torch.ones(2, 1), items, k=10, scoring="bfloat16").items[:, 0].tolist() == [41, 41]
    assert scored_twice == [2]


def test_rounding_to_tf32_is_to_the_nearest():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1000, 5, generator=generator) * torch.exp(20 * torch.randn(1000, 5, generator=generator))
    mantissa, exponent = np.frexp(x.double().numpy())
    nearest = np.floor(np.abs(mantissa) * 2**11 + 0.5) / 2**11
    expected = np.copysign(np.ldexp(nearest, exponent), x.numpy())
    result = precision.rounded(padded(x, 8), "tf32")
    assert result.dtype == torch.float32
    np.testing.assert_array_equal(result.double().numpy(), expected)
    assert precision.rounded(torch.tensor([2 - 2.0**-23, -0.0]), "tf32").tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring": "float16"}, "scoring is 'float16'; expected float32, tf32, bfloat16"),
        ({"scoring": "bfloat16", "backend": "numba"}, "backend numba has only float32"),
        ({"scoring": "bfloat16", "backend": "triton"}, "no top-K"),
    ],
)
def test_a_scoring_that_is_not_there_is_refused(options, message):
    with pytest.raises(FastTowerError, match=message) as error:
        top_k(torch.ones(1, 2), torch.ones(4, 2), k=2, **options)
    assert "\n" not in str(error.value)


def test_a_device_without_the_scoring_is_refused(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(FastTowerError, match="tf32, which runs on cuda, and the vectors are on cpu; choose"):
        top_k(torch.ones(1, 2), torch.ones(4, 2), k=2, scoring="tf32")
    with pytest.raises(FastTowerError, match="runs on cpu and cuda, and the vectors are on mps"):
        precision.check_scoring("bfloat16", torch.device("mps"))
    precision.check_scoring("float32", torch.device("mps"))


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("partial_sums", [False, True])
@pytest.mark.parametrize("tf32", [False, True])
def test_torchs_settings_are_as_before(before, partial_sums, tf32):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has the older name")
    started = matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction
    try:
        matmul.fp32_precision = before
        matmul.allow_bf16_reduced_precision_reduction = partial_sums
        with suppress(MemoryError), precision._cuda_settings(tf32=tf32):
            assert matmul.fp32_precision == ("tf32" if tf32 else "ieee")
            assert not matmul.allow_bf16_reduced_precision_reduction
            raise MemoryError
        assert matmul.fp32_precision == before
        assert matmul.allow_bf16_reduced_precision_reduction == partial_sums
    finally:
        matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction = started


@pytest.mark.parametrize("before", [False, True])
def test_settings_of_an_older_torch_are_as_before(monkeypatch, before):
    matmul = SimpleNamespace(allow_tf32=before, allow_bf16_reduced_precision_reduction=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    for tf32 in (False, True):
        with precision._cuda_settings(tf32=tf32):
            assert matmul.allow_tf32 == tf32
            assert not matmul.allow_bf16_reduced_precision_reduction
        assert matmul == SimpleNamespace(allow_tf32=before, allow_bf16_reduced_precision_reduction=True)
