"""Compiled gradients against plain torch, at shapes and widths that tiles, chunks and vectors cut."""

import pytest
import torch

pytest.importorskip("numba")

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.negatives import membership_numba_cpu as membership
from fasttower_kernels.settings import LossSettings, NegativeSettings
from fasttower_kernels.step.gradients import numba_cpu, reference
from fasttower_kernels.tables import Interactions, Tables, padded

KEY = (11, 12)
NUM_USERS, NUM_ITEMS = 30, 41


def make_tables(dim, *, bias=True):
    generator = torch.Generator().manual_seed(dim)
    users, items = (torch.zeros(n, padded(dim)) for n in (NUM_USERS, NUM_ITEMS))
    for table in (users, items):
        table[:, :dim] = torch.randn(len(table), dim, generator=generator) * 0.7 / max(dim / 30, 1) ** 0.5
    return Tables(users, items, torch.randn(NUM_ITEMS, generator=generator) if bias else None)


def make_interactions(size):
    generator = torch.Generator().manual_seed(size)
    return Interactions(
        torch.randint(NUM_USERS, (size,), generator=generator, dtype=torch.int32),
        torch.randint(NUM_ITEMS, (size,), generator=generator, dtype=torch.int32),
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


def assert_right(tables, batch, negatives, loss):
    ours, right = tables.zeros_like(), tables.zeros_like()
    value = numba_cpu.add_gradients(tables, ours, batch, negatives, loss, key=KEY, step=3)
    expected = reference.add_gradients(tables, right, batch, negatives, loss, key=KEY, step=3)
    assert float(value) == pytest.approx(float(expected), rel=1e-5, abs=1e-6)
    for one, other in zip(ours, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    return ours


@pytest.mark.parametrize("num_negatives", [0, 1, 3, 4, 10, 70])
@pytest.mark.parametrize("size", [1, 64, 200])
@pytest.mark.parametrize("dim", [1, 3])
def test_gradients(dim, size, num_negatives):
    loss = LossSettings(user_l2=0.3, item_l2=0.3, scale="positives" if size > 1 else "pairs")
    negatives = Negatives(NegativeSettings(count=num_negatives), NUM_USERS, NUM_ITEMS, make_known())
    gradients = assert_right(make_tables(dim), make_interactions(size), negatives, loss)
    for table in gradients.users, gradients.items:
        assert not table[:, dim:].any()  # the padding


@pytest.mark.parametrize(("dim", "variant"), [(64, "plain"), (100, "filtered"), (512, "bias")])
def test_gradients_of_other_widths(dim, variant, monkeypatch):
    known = None
    if variant == "filtered":
        monkeypatch.setattr(membership, "BITMAP_LIMIT_BYTES", 0)
        known = make_known()
        assert not membership.membership_of(known)[1]
    l2 = 0.1 if variant == "filtered" else 0.0
    negatives = Negatives(NegativeSettings(count=5), NUM_USERS, NUM_ITEMS, known)
    tables = make_tables(dim, bias=variant != "plain")
    assert_right(tables, make_interactions(100), negatives, LossSettings(user_l2=l2, item_l2=l2))
