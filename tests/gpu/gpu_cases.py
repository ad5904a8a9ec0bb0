"""What the tests on a GPU share: known positives, tables, batches, negatives and the relative error."""

import os

import torch

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.philox import seed_key
from fasttower_kernels.step import TrainState
from fasttower_kernels.tables import Interactions, Tables, padded

DEVICE = torch.device("cuda")
KEY = seed_key(0xFEDCBA9876543210 >> 1)
NUM_USERS, NUM_ITEMS = 300, 500


def make_known(num_users=NUM_USERS, num_items=NUM_ITEMS):
    """User 0 has touched everything, user 1 all but one item, user 2 nothing."""
    generator = torch.Generator().manual_seed(2)
    share = torch.rand(num_users, generator=generator)
    share[0] = 2
    touched = torch.rand(num_users, num_items, generator=generator) < share[:, None]
    touched[1] = True
    touched[1, 17] = False
    touched[2] = False
    users, items = touched.nonzero(as_tuple=True)
    return KnownPositives.from_pairs(users.int(), items.int(), num_users, num_items).to(DEVICE)


def make_tables(dim, num_users=NUM_USERS, num_items=NUM_ITEMS, bias=True):
    generator = torch.Generator().manual_seed(dim)
    users, items = (torch.zeros(n, padded(dim)) for n in (num_users, num_items))
    for table in (users, items):
        table[:, :dim] = torch.randn(len(table), dim, generator=generator) / dim**0.5
    item_bias = torch.randn(num_items, generator=generator).to(DEVICE) if bias else None
    return Tables(users.to(DEVICE), items.to(DEVICE), item_bias)


def make_batch(size, num_users=NUM_USERS, num_items=NUM_ITEMS):
    generator = torch.Generator().manual_seed(size)
    users, items = (
        torch.randint(n, (size,), generator=generator, dtype=torch.int32) for n in (num_users, num_items)
    )
    return Interactions(users.to(DEVICE), items.to(DEVICE))


def make_negatives(settings, interactions, tables, known=None):
    return Negatives.of(settings, interactions, len(tables.users), len(tables.items), known)


def start_state(tables):
    """A state of copies of the tables.

    Second moments begin above 0: otherwise Adam makes a whole step of a row's first gradient however near 0
    it is, and there its sign is rounding's.
    """
    state = TrainState.start(Tables(*(table.clone() for table in tables)))
    for moments in state.moments_2:
        moments.fill_(1e-6)
    return state


def doubled(tables):
    return Tables(*(table.double() for table in tables))


def doubled_state(state):
    """A copy in float64."""
    return TrainState(
        *(doubled(t) for t in (state.parameters, state.gradients, state.moments_1, state.moments_2))
    )


def error(result, oracle):
    """|result - oracle| / |oracle|."""
    return float((result.double() - oracle).norm() / oracle.norm().clamp_min(1e-300))


def leave_a_lost_device():
    """End a worker of pytest-xdist whose device an error has made useless; another one takes its place.

    Every further test in it would fail, and so quickly that it would be given most of them.
    """
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise
