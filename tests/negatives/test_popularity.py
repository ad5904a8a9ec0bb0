"""Negatives by popularity and lists that blocks share: the alias table, distributions, known answers."""

import importlib.util

import pytest
import torch

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import membership_numba_cpu as membership
from fasttower_kernels.negatives import sample_negatives
from fasttower_kernels.negatives.popularity import popularity
from fasttower_kernels.negatives.reference import ATTEMPTS, draw, draw_list
from fasttower_kernels.philox import seed_key

needs_numba = pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="numba is not installed")
KEY = seed_key(12345678901234567)
NUM_ITEMS = 101
FEW, NEARLY_ALL, ALL, NONE = range(4)  # how much the users have touched


def make_counts():
    counts = (torch.rand(NUM_ITEMS, generator=torch.Generator().manual_seed(0)) ** 4 * 1000).long()
    assert (counts == 0).any()
    return counts


def make_known():
    """The items that NEARLY_ALL has left are rare: most of its negatives come from the gap search."""
    free = make_counts().argsort()[:5].tolist()
    touched = {FEW: range(3, 40, 7), NEARLY_ALL: set(range(NUM_ITEMS)) - set(free), ALL: range(NUM_ITEMS)}
    rows = torch.tensor([(user, item) for user, items in touched.items() for item in sorted(items)])
    return KnownPositives.from_pairs(rows[:, 0], rows[:, 1], 4, NUM_ITEMS)


def expected_p(power):
    counts = make_counts().double()
    counts[counts == 0] = counts[counts > 0].min() / 2
    return counts**power / (counts**power).sum()


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0, 3.0])
def test_the_alias_table_is_exact(power):
    table = popularity(make_counts(), power, 1, None)
    stays = (table.threshold.long() & 0xFFFFFFFF).double() / 2**32  # share of a cell that is its own item
    p = stays.clone().index_add_(0, table.alias.long(), 1 - stays) / NUM_ITEMS
    assert float((p - expected_p(power)).abs().max()) < 1e-9
    torch.testing.assert_close(table.log_p.double(), expected_p(power).log(), rtol=1e-6, atol=1e-6)


def test_the_mass_that_known_positives_leave():
    known, p = make_known(), expected_p(0.75)
    table = popularity(make_counts(), 0.75, 4, known)
    free = [1 - float(p[known.items[known.indptr[u] : known.indptr[u + 1]].long()].sum()) for u in range(4)]
    assert table.log_free_mass[[FEW, NEARLY_ALL, NONE]].exp().tolist() == pytest.approx(
        [free[FEW], free[NEARLY_ALL], 1], rel=1e-5
    )


@pytest.mark.parametrize("user", [FEW, NEARLY_ALL, NONE])
def test_draws_follow_popularity_over_the_untouched(user):
    known, p = make_known(), expected_p(0.75)
    table = popularity(make_counts(), 0.75, 4, known)
    drawn = draw(
        torch.full((6000,), user), 10, NUM_ITEMS, key=KEY, step=0, known_positives=known, popularity=table
    )
    free = torch.ones(NUM_ITEMS, dtype=torch.bool)
    free[known.items[known.indptr[user] : known.indptr[user + 1]].long()] = False
    mass = float(p[free].sum())
    by_rank = (1 - mass) ** ATTEMPTS  # then uniform over the untouched
    assert float(drawn.by_rank.double().mean()) == pytest.approx(by_rank, abs=0.01)
    assert (by_rank > 0.5) == (user == NEARLY_ALL)
    share = (1 - by_rank) * p / mass + by_rank / float(free.sum())
    expected = 60_000 * share[free]
    counts = torch.bincount(drawn.items.flatten(), minlength=NUM_ITEMS)
    assert not counts[~free].any()
    chi_square = float(((counts[free] - expected) ** 2 / expected).sum())
    freedom = int(free.sum()) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_known_answers():
    """By a separate scalar implementation in numpy: words 0 and 1 of a counter, words 2 and 3, the next."""
    table = popularity(torch.tensor([5, 0, 1, 10, 4]), 0.75, 3, None)
    drawn = sample_negatives(
        torch.tensor([0, 1, 2]), 5, 5, key=KEY, step=7, popularity=table, backend="torch"
    )
    assert drawn.tolist() == [[2, 3, 3, 3, 0], [3, 4, 3, 0, 3], [2, 3, 4, 3, 0]]


@needs_numba
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("size", [1, 63, 130])
@pytest.mark.parametrize("num_negatives", [0, 1, 2, 5])
@pytest.mark.parametrize("exclude", [True, False])
def test_numba_draws_the_same(filtered, size, num_negatives, exclude, monkeypatch):
    if filtered:
        monkeypatch.setattr(membership, "BITMAP_LIMIT_BYTES", 0)
    known = make_known() if exclude else None
    users = torch.randint(4, (size,), generator=torch.Generator().manual_seed(size))
    call = {"key": KEY, "step": 7, "known_positives": known, "first_position": 5}
    call["popularity"] = popularity(make_counts(), 0.75, 4, known)
    ours, right = (
        sample_negatives(users, num_negatives, NUM_ITEMS, backend=name, **call) for name in ("numba", "torch")
    )
    counts = users != ALL if exclude else users >= 0  # the negatives of the others mean nothing
    assert ours[counts].equal(right[counts])


@pytest.mark.parametrize(
    ("block", "items"),
    [
        (0, [517, 1088, 1947, 1704, 1042, 2310, 3496, 1952, 3068, 1319]),
        (1, [1738, 2090, 112, 1892, 1278, 988, 1159, 2011, 3576, 26]),
        (5, [1669, 1678, 3696, 2298, 3468, 2138, 2744, 1674, 174, 1712]),
    ],
)
@pytest.mark.parametrize("backend", ["torch", pytest.param("numba", marks=needs_numba)])
def test_known_answers_of_a_list(block, items, backend):
    """By a separate scalar implementation in numpy."""
    if backend == "torch":
        drawn = draw_list(block, 10, 3706, key=KEY, step=7, device=torch.device("cpu")).tolist()
    else:
        drawn = compiled_list(block, 10, 3706)
    assert drawn == items


def compiled_list(block, count, num_items):
    import numba
    import numpy as np

    from fasttower_kernels.negatives import Negatives
    from fasttower_kernels.settings import NegativeSettings
    from fasttower_kernels.step.shared_negatives.block_list_numba_cpu import draw_items
    from fasttower_kernels.step.shared_negatives.numba_cpu import sampling_of

    sampling = sampling_of(Negatives(NegativeSettings("shared", count=count), 1, num_items), KEY)
    items = np.empty(count + 3, dtype=np.uint32)
    numba.njit(lambda *given: draw_items(*given))(items, np.uint64(block), sampling, np.uint32(7))  # noqa: PLW0108
    return items[:count].tolist()


def test_a_list_is_uniform_and_other_blocks_steps_and_seeds_have_others():
    def drawn(block=0, step=0, key=KEY, count=50_000):
        return draw_list(block, count, NUM_ITEMS, key=key, step=step, device=torch.device("cpu"))

    counts = torch.bincount(drawn(), minlength=NUM_ITEMS).double()
    chi_square = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert chi_square < (NUM_ITEMS - 1) + 5 * (2 * (NUM_ITEMS - 1)) ** 0.5
    lists = [drawn(count=20), drawn(1, count=20), drawn(step=1, count=20), drawn(key=(1, 2), count=20)]
    assert len({tuple(items.tolist()) for items in lists}) == 4
