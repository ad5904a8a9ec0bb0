"""The loss of vectors from any tower, against float64 autograd of the contract's formula."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import nn

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives.reference import sample_negatives
from fasttower_kernels.philox import seed_key
from fasttower_kernels.sampled_bce import LossSettings, sampled_bce_loss

KEY = seed_key(12345678901234567)
NUM_USERS, NUM_ITEMS = 7, 11
needs_numba = pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="numba is not installed")
BACKENDS = ["torch", pytest.param("numba", marks=needs_numba)]


def make_known():
    """User 0 has touched every item, user 1 all but one."""
    rows = [(0, i) for i in range(NUM_ITEMS)] + [(1, i) for i in range(NUM_ITEMS - 1)] + [(2, 4), (3, 5)]
    index = torch.tensor(rows)
    return KnownPositives.from_pairs(index[:, 0], index[:, 1], NUM_USERS, NUM_ITEMS)


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


def written_out(vectors, user_index, item_index, known, settings):
    """The formula in float64; the negatives from the reference."""
    users, items, *bias = (vector.detach().double().requires_grad_() for vector in vectors)
    negatives = sample_negatives(
        user_index, settings.num_negatives, NUM_ITEMS, key=KEY, step=3, known_positives=known
    )
    drawn = torch.cat([item_index[:, None], negatives], dim=1)
    logits = (users[:, None] * items[drawn]).sum(-1)
    if bias:
        logits = logits + bias[0][drawn]
    terms = F.softplus(-logits[:, 0]) + F.softplus(logits[:, 1:]).sum(-1)
    norms = users.square().sum(-1) + 2 / drawn.shape[1] * items[drawn].square().sum((1, 2))
    counts = torch.ones(()) if known is None else known.degrees[user_index] < NUM_ITEMS
    loss = (counts * (terms + settings.l2 * norms)).sum() / settings.divisor(len(users))
    loss.backward()
    return loss.detach(), [users.grad, items.grad, *(b.grad for b in bias)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dim", "num_negatives", "size", "exclude", "bias", "l2", "loss_scale"),
    [
        (1, 1, 1, True, True, 0.3, "positives"),
        (3, 3, 130, True, True, 0.3, "pairs"),
        (3, 0, 130, True, True, 0.3, "positives"),
        (4, 70, 9, True, True, 0.3, "positives"),
        (16, 5, 64, False, True, 0.0, "pairs"),
        (37, 10, 53, True, False, 0.0, "positives"),
    ],
)
def test_value_and_gradients(backend, dim, num_negatives, size, exclude, bias, l2, loss_scale):
    known = make_known() if exclude else None
    settings, vectors = LossSettings(num_negatives, l2, loss_scale), make_vectors(size, dim, bias=bias)
    user_index, item_index = make_index(size)
    loss = sampled_bce_loss(
        *vectors[:2],
        item_index,
        user_index=user_index if exclude else None,
        item_bias=vectors[2] if bias else None,
        known_positives=known,
        settings=settings,
        key=KEY,
        step=3,
        backend=backend,
    )
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    expected, right = written_out(vectors, user_index, item_index, known, settings)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-6, atol=0)
    (-2.5 * loss).backward()
    for vector, gradient in zip(vectors, right, strict=True):
        assert float((vector.grad.double() + 2.5 * gradient).norm() / gradient.norm()) < 5e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_users_who_have_seen_everything_alone(backend):
    vectors, index = make_vectors(4, 5), torch.zeros(4, dtype=torch.int32)
    loss = sampled_bce_loss(
        *vectors[:2],
        index,
        user_index=index,
        item_bias=vectors[2],
        known_positives=make_known(),
        settings=LossSettings(3, l2=0.1),
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
    expected = sampled_bce_loss(users, items, index, key=KEY, step=1, backend=backend)
    (right,) = torch.autograd.grad(expected, items, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * expected, items)  # what is kept for backward is not used up
    assert twice.equal(2 * right)
    whole = torch.zeros(8, NUM_ITEMS + 2)
    whole[:, 1:-1] = items.detach().T
    whole.requires_grad_()
    # A transposed part of a larger tensor, and users that stay as they are.
    loss = sampled_bce_loss(users.detach(), whole[:, 1:-1].T, index, key=KEY, step=1, backend=backend)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(whole.grad[:, 1:-1].T, right)
    with torch.no_grad():
        assert not sampled_bce_loss(users, items, index, key=KEY, step=1, backend=backend).requires_grad


def test_float64_is_differentiated_right():
    users, items, bias = (vector.detach().double().requires_grad_() for vector in make_vectors(6, 3))
    user_index, item_index = make_index(6)

    def loss(users, items, bias):
        return sampled_bce_loss(
            users,
            items,
            item_index,
            user_index=user_index,
            item_bias=bias,
            known_positives=make_known(),
            settings=LossSettings(4, l2=0.2),
            key=KEY,
            step=3,
            backend="torch",
        )

    assert torch.autograd.gradcheck(loss, (users, items, bias))


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
    optimiser = torch.optim.Adam(towers.parameters(), lr=0.03)
    losses = []
    for step in range(60):
        user_index, item_index = pairs[step % 2 :: 2].T
        users, items, bias = towers(user_index)
        loss = sampled_bce_loss(
            users,
            items,
            item_index,
            user_index=user_index,
            item_bias=bias,
            known_positives=known,
            settings=LossSettings(4, l2=1e-3),
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


def fast(users, items, index, **options):
    return sampled_bce_loss(users, items, index, **{"key": KEY, "step": 0, "backend": "auto"} | options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"users": torch.zeros(3, 5)}, r"\(3, 5\) and item_vectors \(11, 4\)"),
        ({"users": torch.zeros(0, 4)}, "none of them empty"),
        ({"items": torch.zeros(NUM_ITEMS, 4, dtype=torch.float16)}, "float16"),
        ({"users": torch.zeros(3, 4, dtype=torch.float64)}, "user_vectors is torch.float64|item_vectors is"),
        ({"item_bias": torch.zeros(10)}, r"item_bias has shape \(10,\)"),
        ({"index": torch.tensor([0, 1])}, r"item_index has shape \(2,\); expected \(3,\)"),
        ({"index": torch.tensor([0.0, 1, 2])}, "item_index is torch.float32"),
        ({"index": torch.tensor([0, 1, 11])}, "item_index goes from 0 to 11; expected 0 to 10"),
        ({"index": torch.tensor([0, -1, 2])}, "item_index goes from -1"),
        ({"known_positives": make_known()}, "without user_index"),
        (
            {"known_positives": make_known(), "user_index": torch.tensor([0, 1, 7])},
            "user_index goes from 0 to 7; expected 0 to 6",
        ),
        (
            {
                "known_positives": make_known(),
                "user_index": torch.tensor([0, 1, 2]),
                "items": torch.zeros(10, 4),
            },
            "are of 11 items",
        ),
        ({"step": 2**32}, "step is 4294967296"),
        ({"step": -1}, "step is -1"),
        ({"backend": "triton"}, "triton"),
    ],
)
def test_what_does_not_fit_is_said(change, said):
    arguments = {
        "users": torch.zeros(3, 4),
        "items": torch.zeros(NUM_ITEMS, 4),
        "index": torch.tensor([0, 1, 2]),
    }
    with pytest.raises(FastTowerError, match=said):
        fast(**arguments | change)
