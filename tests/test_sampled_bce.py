"""The loss and its gradients against float64 autograd of the contract's formula, written out."""

import pytest
import torch

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives.reference import sample_negatives
from fasttower_kernels.sampled_bce import LossSettings, reference
from fasttower_kernels.sampled_bce.reference import bce_sum, train_step
from fasttower_kernels.tables import Interactions, Tables, padded

KEY = (5, 6)
NUM_USERS, NUM_ITEMS = 7, 11


def oracle(tables, batch, known, settings):
    """Loss, BCE sum and gradients, one positive at a time, in float64."""
    users, items, bias = (table.double().requires_grad_() for table in tables)
    negatives = sample_negatives(
        batch.user_index, settings.num_negatives, NUM_ITEMS, key=KEY, step=3, known_positives=known
    )
    total = bce = torch.zeros((), dtype=torch.float64)
    for b, (user, positive) in enumerate(
        zip(batch.user_index.tolist(), batch.item_index.tolist(), strict=True)
    ):
        if known is not None and int(known.degrees[user]) == NUM_ITEMS:
            continue
        drawn = [positive, *negatives[b].tolist()]
        logits = [users[user] @ items[item] + bias[item] for item in drawn]
        terms = torch.logaddexp(torch.zeros(()).double(), -logits[0])
        for logit in logits[1:]:
            terms = terms + torch.logaddexp(torch.zeros(()).double(), logit)
        norms = sum((items[item] @ items[item] for item in drawn), torch.zeros(()).double())
        total = total + terms + settings.l2 * (users[user] @ users[user] + 2 / len(drawn) * norms)
        bce = bce + terms
    scale = len(batch) * (1 if settings.loss_scale == "positives" else 1 + settings.num_negatives)
    loss = total / scale
    gradients = torch.autograd.grad(loss, (users, items, bias)) if loss.requires_grad else None
    return bce.detach(), gradients


def make_tables(dim, *, scale=1.0):
    generator = torch.Generator().manual_seed(dim)
    users, items = (torch.zeros(n, padded(dim)) for n in (NUM_USERS, NUM_ITEMS))
    for table in (users, items):
        table[:, :dim] = torch.randn(len(table), dim, generator=generator) * scale
    return Tables(users, items, torch.randn(NUM_ITEMS, generator=generator))


def make_batch(size):
    generator = torch.Generator().manual_seed(size)
    return Interactions(
        torch.randint(NUM_USERS, (size,), generator=generator, dtype=torch.int32),
        torch.randint(NUM_ITEMS, (size,), generator=generator, dtype=torch.int32),
    )


@pytest.fixture
def known():
    """User 0 has touched every item, user 1 all but one."""
    rows = [(0, i) for i in range(NUM_ITEMS)] + [(1, i) for i in range(NUM_ITEMS - 1)] + [(2, 4), (3, 5)]
    index = torch.tensor(rows, dtype=torch.int32)
    return KnownPositives.from_pairs(index[:, 0], index[:, 1], NUM_USERS, NUM_ITEMS)


@pytest.mark.parametrize("dim", [1, 3, 16, 37])
@pytest.mark.parametrize("num_negatives", [0, 1, 10])
@pytest.mark.parametrize("size", [1, 40])
@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize(("l2", "loss_scale"), [(0.0, "pairs"), (0.3, "positives")])
def test_gradients(dim, num_negatives, size, exclude, l2, loss_scale, known):
    known = known if exclude else None
    settings = LossSettings(num_negatives, l2, loss_scale)
    tables, batch = make_tables(dim), make_batch(size)
    gradients = tables.zeros_like()
    bce = train_step(tables, gradients, batch, known, settings, key=KEY, step=3)
    expected_bce, expected = oracle(tables, batch, known, settings)
    torch.testing.assert_close(bce.double(), expected_bce, rtol=1e-5, atol=1e-6)
    for gradient, right in zip(gradients, expected or tables.zeros_like(), strict=True):
        torch.testing.assert_close(gradient.double(), right.double(), rtol=1e-4, atol=1e-6)
    assert (
        float(gradients.users[:, dim:].abs().sum() + gradients.items[:, dim:].abs().sum()) == 0
    )  # the padding
    torch.testing.assert_close(bce_sum(tables, batch, known, settings, key=KEY, step=3), bce.double())


def test_a_long_sum_is_that_of_its_parts_in_float64(known, monkeypatch):
    tables, batch, settings = make_tables(4), make_batch(40), LossSettings(3)
    whole = bce_sum(tables, batch, known, settings, key=KEY, step=3, first_position=100)
    scored, sample = [], reference.sample_negatives
    monkeypatch.setattr(
        reference,
        "sample_negatives",
        lambda users, *rest, **given: scored.append(len(users)) or sample(users, *rest, **given),
    )
    monkeypatch.setattr(reference, "_PART_ROWS", 7)
    cut = bce_sum(tables, batch, known, settings, key=KEY, step=3, first_position=100)
    assert scored == [7, 7, 7, 7, 7, 5]
    parts = [
        float(bce_sum(tables, part, known, settings, key=KEY, step=3, first_position=100 + first))
        for first, part in batch.parts(7)
    ]
    assert float(cut) == sum(parts)
    assert float(cut) == pytest.approx(float(whole), rel=1e-6)


def test_gradients_are_added(known):
    settings, tables, batch = LossSettings(2), make_tables(4), make_batch(9)
    once, twice = tables.zeros_like(), tables.zeros_like()
    train_step(tables, once, batch, known, settings, key=KEY, step=0)
    for _ in range(2):
        train_step(tables, twice, batch, known, settings, key=KEY, step=0)
    torch.testing.assert_close(twice.items, 2 * once.items)


def test_a_user_without_free_items_adds_nothing_but_counts_in_the_batch(known):
    settings, tables = LossSettings(3, l2=0.1), make_tables(4)
    alone = Interactions(torch.tensor([4], dtype=torch.int32), torch.tensor([2], dtype=torch.int32))
    joined = Interactions(torch.tensor([4, 0], dtype=torch.int32), torch.tensor([2, 2], dtype=torch.int32))
    first, second = tables.zeros_like(), tables.zeros_like()
    bce = train_step(tables, first, alone, known, settings, key=KEY, step=0)
    torch.testing.assert_close(train_step(tables, second, joined, known, settings, key=KEY, step=0), bce)
    torch.testing.assert_close(second.users, first.users / 2)
    torch.testing.assert_close(second.items, first.items / 2)


def test_stable_for_large_logits():
    tables = Tables(torch.tensor([[100.0, 0, 0, 0]]), torch.tensor([[100.0, 0, 0, 0], [-100.0, 0, 0, 0]]))
    gradients = tables.zeros_like()
    batch = Interactions(torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))
    bce = train_step(tables, gradients, batch, None, LossSettings(0), key=KEY, step=0)
    assert float(bce) == pytest.approx(1e4)
    assert gradients.users[0, 0] == 100  # -(1 - sigmoid(-1e4)) * -100
