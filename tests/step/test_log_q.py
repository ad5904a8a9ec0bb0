"""The sampled softmax against the full one: log q makes their gradients agree on average."""

import pytest
import torch
from step.oracle import NUM_ITEMS, NUM_USERS, make_batch, make_known, make_tables

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.settings import LossSettings, NegativeSettings
from fasttower_kernels.step import add_gradients
from fasttower_kernels.tables import Interactions, Tables

BATCH, STEPS, COUNT = 24, 24, 1000


def make_negatives(settings, batch):
    """The batch's own pairs are known, and one user has two rare items left: the gap search runs."""
    known = make_known()
    users = torch.repeat_interleave(torch.arange(NUM_USERS), known.degrees)
    user = int(batch.user_index[-1])
    own = batch.item_index[batch.user_index == user].tolist()
    left = [item for item in range(NUM_ITEMS) if item not in own][-2:]
    others = torch.tensor([item for item in range(NUM_ITEMS) if item not in left])
    known = KnownPositives.from_pairs(
        torch.cat([users, batch.user_index, torch.full_like(others, user)]),
        torch.cat([known.items, batch.item_index, others]),
        NUM_USERS,
        NUM_ITEMS,
    )
    items = torch.repeat_interleave(torch.arange(NUM_ITEMS), torch.arange(NUM_ITEMS, 0, -1) ** 2).int()
    return Negatives.of(settings, Interactions(items * 0, items), NUM_USERS, NUM_ITEMS, known)


def full_softmax(tables, batch, known):
    """The gradients over all items that a user has not touched, in float64."""
    users, items, bias = (table.double().requires_grad_() for table in tables)
    total = 0
    for user, positive in zip(batch.user_index.tolist(), batch.item_index.tolist(), strict=True):
        free = torch.ones(NUM_ITEMS, dtype=torch.bool)
        free[known.items[known.indptr[user] : known.indptr[user + 1]].long()] = False
        if free.any():
            logits = items @ users[user] + bias
            total = total + torch.cat([logits[free], logits[positive, None]]).logsumexp(0) - logits[positive]
    return torch.autograd.grad(total / len(batch), (users, items, bias))


@pytest.mark.parametrize(
    "settings",
    [
        NegativeSettings(count=COUNT),
        NegativeSettings("popularity", count=COUNT),
        NegativeSettings("shared", count=COUNT, block_size=10),
    ],
    ids=lambda settings: settings.proposal,
)
def test_the_average_gradient_is_the_full_softmaxs(settings):
    tables, batch = make_tables(3, scale=0.7), make_batch(BATCH)
    negatives = make_negatives(settings, batch)
    sampled = []
    for step in range(STEPS):
        gradients = tables.zeros_like()
        call = {"key": (1, 2), "step": step, "backend": "torch"}
        add_gradients(tables, gradients, batch, negatives, LossSettings("softmax"), **call)
        sampled.append(torch.cat([gradient.flatten().double() for gradient in gradients]))
    full = full_softmax(Tables(*tables), batch, negatives.known_positives)
    expected = torch.cat([gradient.flatten() for gradient in full])
    steps = torch.stack(sampled)
    statistical = float(steps.std(0).norm() / STEPS**0.5)
    error = float((steps.mean(0) - expected).norm())
    assert statistical < 0.01 * float(expected.norm())  # else the test shows nothing
    assert error < 3 * statistical + float(expected.norm()) / COUNT  # a ratio's own bias goes with 1 / N
