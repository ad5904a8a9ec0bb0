"""The loss of vectors from any tower, against float64 autograd of the contract, written out."""

import importlib.util

import pytest
import torch
from step.oracle import KEY, NUM_ITEMS, NUM_USERS, STEP, make_negatives, oracle
from torch import nn

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.philox import seed_key
from fasttower_kernels.settings import LossSettings, NegativeSettings
from fasttower_kernels.step import sampled_loss
from fasttower_kernels.tables import Interactions, Tables

needs_numba = pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="numba is not installed")
BACKENDS = ["torch", pytest.param("numba", marks=needs_numba)]


PLAIN = Negatives(NegativeSettings(), NUM_USERS, NUM_ITEMS)


def make_vectors(size, dim, *, bias=True):
    generator = torch.Generator().manual_seed(dim)
    shapes = [(size, dim), (NUM_ITEMS, dim)] + ([(NUM_ITEMS,)] if bias else [])
    scale = dim**-0.25
    return [(torch.randn(shape, generator=generator) * scale).requires_grad_() for shape in shapes]


def make_index(size):
    generator = torch.Generator().manual_seed(size)
    users, items = (torch.randint(n, (size,), generator=generator) for n in (NUM_USERS, NUM_ITEMS))
    users[0] = 3  # the loss is not 0
    return users, items


def written_out(vectors, user_index, item_index, negatives, loss):
    """The oracle of tables; all rows of a user hold the same vector."""
    users, items, *bias = (vector.detach() for vector in vectors)
    table = torch.zeros(NUM_USERS, users.shape[1])
    table[user_index] = users
    batch = Interactions(user_index.int(), item_index.int())
    _, value, right = oracle(Tables(table, items, *bias), batch, negatives, loss)
    return value, right


LOSSES = {
    "bce": LossSettings(user_l2=0.3, item_l2=0.2),
    "bce, pairs": LossSettings(scale="pairs"),
    "gbce": LossSettings("gbce", 0.8, item_l2=0.2),
    "bpr": LossSettings("bpr"),
    "softmax, cosine": LossSettings(
        "softmax", similarity="cosine", temperature=0.4, user_l2=0.1, item_l2=0.2
    ),
}
NEGATIVES = {
    "uniform": NegativeSettings(count=5),
    "none": NegativeSettings(count=0),
    "many": NegativeSettings(count=70),
    "popularity": NegativeSettings("popularity", count=5),
    "hard": NegativeSettings(count=3, pool=9),
    "shared": NegativeSettings("shared", count=6, block_size=8),
    "in-batch": NegativeSettings("in-batch", block_size=16),
    "mixed": NegativeSettings("mixed", count=3, block_size=5),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("loss", "negatives", "dim", "size", "exclude", "bias"),
    [
        ("bce", "uniform", 1, 1, True, True),
        ("bce", "many", 4, 9, True, True),
        pytest.param("bce", "none", 3, 130, True, True, marks=pytest.mark.slow),
        pytest.param("bce", "hard", 3, 130, True, True, marks=pytest.mark.slow),
        ("bce", "mixed", 3, 130, True, True),
        ("bce, pairs", "uniform", 16, 64, False, True),
        pytest.param("gbce", "shared", 5, 30, True, False, marks=pytest.mark.slow),
        ("bpr", "popularity", 37, 53, True, False),
        pytest.param("bpr", "in-batch", 37, 53, True, False, marks=pytest.mark.slow),
        ("softmax, cosine", "uniform", 3, 130, True, True),
        ("softmax, cosine", "in-batch", 3, 130, True, True),
    ],
)
def test_value_and_gradients(backend, loss, negatives, dim, size, exclude, bias):
    negatives = make_negatives(NEGATIVES[negatives], exclude=exclude)
    loss, vectors = LOSSES[loss], make_vectors(size, dim, bias=bias)
    user_index, item_index = make_index(size)
    with torch.no_grad():
        vectors[0][:] = vectors[0][user_index.unique(return_inverse=True)[1]]  # one vector for each user
    value = sampled_loss(
        *vectors[:2],
        item_index,
        negatives=negatives,
        user_index=user_index if exclude else None,
        item_bias=vectors[2] if bias else None,
        loss=loss,
        key=KEY,
        step=STEP,
        backend=backend,
    )
    assert value.dtype == torch.float32
    assert value.shape == ()
    expected, right = written_out(vectors, user_index, item_index, negatives, loss)
    torch.testing.assert_close(value.detach().double(), expected, rtol=2e-6, atol=0)
    (-2.5 * value).backward()
    of_users = torch.zeros_like(right.users).index_add_(0, user_index, vectors[0].grad.double())
    for gradient, exactly in zip((of_users, *(v.grad.double() for v in vectors[1:])), right, strict=True):
        assert float((gradient + 2.5 * exactly).norm() / exactly.norm()) < 5e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("negatives", ["uniform", "in-batch"])
def test_only_users_who_have_seen_everything(backend, negatives):
    vectors, index = make_vectors(4, 5), torch.zeros(4, dtype=torch.int32)
    loss = sampled_loss(
        *vectors[:2],
        index,
        negatives=make_negatives(NEGATIVES[negatives]),
        user_index=index,
        item_bias=vectors[2],
        loss=LossSettings(user_l2=0.1, item_l2=0.1),
        key=KEY,
        step=0,
        backend=backend,
    )
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(not vector.grad.any() for vector in vectors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_of_any_strides_and_those_without_gradients(backend):
    users, items = make_vectors(9, 8, bias=False)
    _, index = make_index(9)
    call = {"negatives": PLAIN, "key": KEY, "step": 1, "backend": backend}
    expected = sampled_loss(users, items, index, **call)
    (right,) = torch.autograd.grad(expected, items, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * expected, items)  # what is kept for backward is not used up
    assert twice.equal(2 * right)
    whole = torch.zeros(8, NUM_ITEMS + 2)
    whole[:, 1:-1] = items.detach().T
    whole.requires_grad_()
    # A transposed part of a larger tensor, and users that stay as they are.
    loss = sampled_loss(users.detach(), whole[:, 1:-1].T, index, **call)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(whole.grad[:, 1:-1].T, right)
    with torch.no_grad():
        assert not sampled_loss(users, items, index, **call).requires_grad


@pytest.mark.parametrize(
    ("loss", "negatives"),
    [
        ("bce", "uniform"),
        ("bce, pairs", "popularity"),
        ("gbce", "uniform"),
        ("bpr", "popularity"),
        ("softmax, cosine", "uniform"),
        ("gbce", "shared"),
        ("bpr", "in-batch"),
        ("softmax, cosine", "mixed"),
    ],
)
def test_float64_is_differentiated_right(loss, negatives):
    loss, settings = LOSSES[loss], NEGATIVES[negatives]
    users, items, bias = (vector.detach().double().requires_grad_() for vector in make_vectors(6, 3))
    user_index, item_index = make_index(6)

    def value(users, items, bias):
        return sampled_loss(
            users,
            items,
            item_index,
            negatives=make_negatives(settings),
            user_index=user_index,
            item_bias=bias,
            loss=loss,
            key=KEY,
            step=3,
            backend="torch",
        )

    assert torch.autograd.gradcheck(value, (users, items, bias))


class Towers(nn.Module):
    """Users by a table; items by a small network over features, with a learned bias."""

    def __init__(self, features):
        super().__init__()
        self.features = features
        self.users = nn.Embedding(NUM_USERS, 6)
        self.items = nn.Sequential(nn.Linear(features.shape[1], 16), nn.ReLU(), nn.Linear(16, 6))
        self.bias = nn.Parameter(torch.zeros(NUM_ITEMS))

    def forward(self, user_index):
        return self.users(user_index), self.items(self.features), self.bias


def train_towers(backend):
    torch.manual_seed(0)
    towers = Towers(torch.randn(NUM_ITEMS, 5))
    # Users like items whose number leaves the same remainder.
    pairs = torch.tensor([(u, i) for u in range(NUM_USERS) for i in range(NUM_ITEMS) if (u - i) % 3 == 0])
    known = KnownPositives.from_pairs(*pairs.T, NUM_USERS, NUM_ITEMS)
    negatives = Negatives(NegativeSettings(count=4), NUM_USERS, NUM_ITEMS, known)
    optimiser = torch.optim.Adam(towers.parameters(), lr=0.03)
    losses = []
    for step in range(60):
        user_index, item_index = pairs[step % 2 :: 2].T
        users, items, bias = towers(user_index)
        loss = sampled_loss(
            users,
            items,
            item_index,
            negatives=negatives,
            user_index=user_index,
            item_bias=bias,
            loss=LossSettings(user_l2=1e-3, item_l2=1e-3),
            key=seed_key(1),
            step=step,
            backend=backend,
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_network_learns(backend):
    losses = train_towers(backend)
    assert losses[-1] < losses[0] / 4


@needs_numba
def test_a_network_learns_alike_in_every_backend():
    assert train_towers("numba") == pytest.approx(train_towers("torch"), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"user_vectors": torch.zeros(3, 5)}, r"\(3, 5\) and item_vectors \(11, 4\)"),
        ({"user_vectors": torch.zeros(0, 4)}, "none of them empty"),
        ({"item_vectors": torch.zeros(NUM_ITEMS, 4, dtype=torch.float16)}, "float16"),
        (
            {"user_vectors": torch.zeros(3, 4, dtype=torch.float64)},
            "user_vectors is torch.float64|item_vectors is",
        ),
        ({"item_bias": torch.zeros(10)}, r"item_bias has shape \(10,\)"),
        ({"item_index": torch.tensor([0, 1])}, r"item_index has shape \(2,\); expected \(3,\)"),
        ({"item_index": torch.tensor([0.0, 1, 2])}, "item_index is torch.float32"),
        ({"item_index": torch.tensor([0, 1, 11])}, "item_index goes from 0 to 11; expected 0 to 10"),
        ({"item_index": torch.tensor([0, -1, 2])}, "item_index goes from -1"),
        ({"negatives": make_negatives(NegativeSettings())}, "user_index is missing"),
        (
            {"negatives": make_negatives(NegativeSettings()), "user_index": torch.tensor([0, 1, 7])},
            "user_index goes from 0 to 7; expected 0 to 6",
        ),
        (
            {
                "negatives": make_negatives(NegativeSettings()),
                "user_index": torch.tensor([0, 1, 2]),
                "item_vectors": torch.zeros(10, 4),
            },
            "are of 11 items",
        ),
        ({"item_vectors": torch.zeros(10, 4)}, "negatives are of 11 items; expected 10"),
        ({"loss": LossSettings(bias_l2=0.1)}, "bias_l2 is 0.1; the loss of vectors takes 0"),
        (
            {
                "negatives": make_negatives(NegativeSettings("in-batch"), exclude=False),
                "loss": LossSettings("gbce"),
            },
            "gbce is calibrated for uniform negatives, not in-batch",
        ),
        ({"step": 2**32}, "step is 4294967296"),
        ({"step": -1}, "step is -1"),
        ({"backend": "triton"}, "triton"),
    ],
)
def test_what_does_not_fit_is_said(change, said):
    arguments = {
        "user_vectors": torch.zeros(3, 4),
        "item_vectors": torch.zeros(NUM_ITEMS, 4),
        "item_index": torch.tensor([0, 1, 2]),
        "negatives": PLAIN,
        "key": KEY,
        "step": 0,
    }
    with pytest.raises(FastTowerError, match=said):
        sampled_loss(**arguments | change)
