"""Top-K: what it means, on every device, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from topk_oracle import assert_equal, integers, oracle, random_seen

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.topk import top_k

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 7, 64, 4999])
def test_ties_at_the_boundary_go_to_the_smaller_index(device, k):
    # Long rows, where torch.topk chooses freely among equals: all equal, two levels, and none equal.
    generator = np.random.default_rng(0)
    num_items = 5000
    rows = [np.zeros(num_items), generator.integers(0, 2, num_items), generator.permutation(num_items)]
    item_vectors = torch.from_numpy(np.stack(rows, axis=1).astype(np.float32)).to(device)
    user_vectors = torch.eye(3, device=device)
    assert_equal(top_k(user_vectors, item_vectors, k=k), oracle(user_vectors, item_vectors, k))


@pytest.mark.parametrize("device", DEVICES)
def test_negative_zero_ties_with_zero(device):
    item_vectors = torch.tensor([[-0.0], [0.0], [-0.0], [0.0], [-1.0]], device=device)
    result = top_k(torch.ones((1, 1), device=device), item_vectors, k=3, item_bias=None)
    assert result.items.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("device", DEVICES)
def test_seen_on_a_large_case(device):
    generator = np.random.default_rng(3)
    users = integers(generator, -9, 10, 257, 16).to(device)
    items = integers(generator, -9, 10, 1009, 16).to(device)
    bias = integers(generator, -3, 4, 1009).to(device)
    seen = random_seen(generator, 400, 1009, 0.1).to(device)
    rows = torch.from_numpy(generator.integers(0, 400, 257)).to(device)
    result = top_k(
        users, items, k=10, item_bias=bias, seen=seen, seen_users=rows, memory_budget_bytes=200_000
    )
    assert_equal(result, oracle(users, items, 10, item_bias=bias, seen=seen, seen_users=rows))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_items=st.integers(1, 60), k=st.integers(1, 20))
def test_relabelling_items_permutes_the_result(seed, num_items, k):
    generator = np.random.default_rng(seed)
    users = integers(generator, -8, 9, 5, 4)
    items = integers(generator, -8, 9, num_items, 4)
    bias = torch.from_numpy(generator.permutation(num_items) / 64).float()  # distinct, exact: no ties
    label = torch.from_numpy(generator.permutation(num_items))  # the new label of each item
    relabelled = torch.empty_like(items)
    relabelled[label] = items
    relabelled_bias = torch.empty_like(bias)
    relabelled_bias[label] = bias
    scores = items @ users.T + bias[:, None]
    if any(len(column.unique()) < num_items for column in scores.T):
        return  # a tie goes by label, so only the untied cases are permuted

    before = top_k(users, items, k=k, item_bias=bias)
    after = top_k(users, relabelled, k=k, item_bias=relabelled_bias)

    moved = torch.where(before.items >= 0, label[before.items.clamp(min=0).long()], -1)
    assert torch.equal(moved.int(), after.items)
    assert torch.equal(before.scores, after.scores)


def test_a_user_who_has_seen_everything_gets_nothing_and_one_with_two_left_gets_two():
    seen = KnownPositives.from_pairs(
        torch.tensor([0] * 5 + [1] * 3), torch.tensor([0, 1, 2, 3, 4, 0, 2, 4]), 2, 5
    )
    items = torch.arange(5.0)[:, None]
    result = top_k(torch.ones(2, 1), items, k=3, seen=seen, seen_users=torch.tensor([0, 1]))
    assert result.items.tolist() == [[-1, -1, -1], [3, 1, -1]]
    assert result.scores.tolist() == [[-torch.inf] * 3, [3.0, 1.0, -torch.inf]]


def test_parameters_are_ranked_without_gradients():
    vectors = torch.nn.Parameter(torch.eye(3))
    result = top_k(vectors, vectors, k=1)
    assert result.items.tolist() == [[0], [1], [2]]
    assert not result.scores.requires_grad


def test_an_empty_catalogue_gives_nothing():
    result = top_k(torch.ones(2, 3), torch.ones(0, 3), k=2)
    assert result.items.tolist() == [[-1, -1]] * 2


def test_scores_are_those_of_a_plain_matmul():
    generator = torch.Generator().manual_seed(0)
    users = torch.randn(67, 64, generator=generator)
    items = torch.randn(311, 64, generator=generator)
    bias = torch.randn(311, generator=generator)
    result = top_k(users, items, k=11, item_bias=bias, memory_budget_bytes=50_000)
    exact = users.double() @ items.double().T + bias
    torch.testing.assert_close(result.scores.double(), exact.topk(11).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        exact.gather(1, result.items.long()), result.scores.double(), rtol=1e-5, atol=1e-5
    )


ONE_SEEN = KnownPositives.from_pairs(torch.tensor([0]), torch.tensor([1]), 2, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"memory_budget_bytes": 0}, "memory_budget_bytes is 0"),
        ({"backend": "triton"}, "no top-K; choose auto, torch or numba"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"candidates": torch.ones(4)}, "candidates are torch.float32 of shape \\(4,\\)"),
        ({"candidates": torch.ones(3, dtype=torch.bool)}, "expected bool of shape \\(4,\\)"),
        ({"candidates": torch.ones(4, dtype=torch.bool, device="meta")}, "use one device"),
        ({"user_vectors": torch.tensor([[1.0, torch.nan]])}, "user_vectors hold NaN or infinity"),
        ({"item_vectors": torch.full((4, 2), -torch.inf)}, "item_vectors hold NaN or infinity"),
        ({"item_bias": torch.tensor([0.0, 0.0, torch.nan, 0.0])}, "item_bias hold NaN or infinity"),
        ({"item_vectors": torch.full((4, 2), 3e38)}, "beyond float32"),
        ({"user_vectors": torch.ones(1, 2, dtype=torch.float64)}, "user_vectors is torch.float64"),
        ({"user_vectors": torch.ones(1, 3)}, "expected \\(R, D\\) and \\(I, D\\)"),
        ({"user_vectors": torch.ones(2)}, "expected \\(R, D\\) and \\(I, D\\)"),
        ({"user_vectors": torch.ones(1, 0), "item_vectors": torch.ones(4, 0)}, "D >= 1"),
        ({"item_bias": torch.ones(3)}, "item_bias has shape \\(3,\\)"),
        ({"item_vectors": torch.ones(4, 2, device="meta")}, "use one device"),
        ({"seen": ONE_SEEN}, "without seen_users"),
        ({"seen": ONE_SEEN, "seen_users": torch.tensor([2])}, "seen has rows 0 to 1"),
        ({"seen": ONE_SEEN, "seen_users": torch.tensor([-1])}, "goes from -1"),
        ({"seen": ONE_SEEN, "seen_users": torch.tensor([0, 1])}, "expected int32 or int64 of shape \\(1,\\)"),
        ({"seen": ONE_SEEN, "seen_users": torch.tensor([0.0])}, "expected int32 or int64"),
        ({"seen": ONE_SEEN.to("meta"), "seen_users": torch.tensor([0])}, "move them to one device"),
        (
            {"seen": KnownPositives(ONE_SEEN.indptr, ONE_SEEN.items, 5), "seen_users": torch.tensor([0])},
            "seen knows 5 items",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_line(changes, message):
    arguments = {"user_vectors": torch.ones(1, 2), "item_vectors": torch.ones(4, 2), "k": 2} | changes
    with pytest.raises(FastTowerError, match=message) as error:
        top_k(arguments.pop("user_vectors"), arguments.pop("item_vectors"), **arguments)
    assert "\n" not in str(error.value)
