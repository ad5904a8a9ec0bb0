"""Negatives of a batch: fasttower's counter-based draws beside numpy's and torch's generators.

The training step never runs these functions alone: its kernel draws as it scores.
"""

import numpy as np
import pytest
import torch

from fasttower_kernels.negatives import numba_cpu, reference
from fasttower_kernels.philox import seed_key

BATCH_SIZE, NUM_NEGATIVES = 8192, 10
FASTTOWER = {"fasttower": numba_cpu.sample_negatives, "fasttower_reference": reference.sample_negatives}


def numpy_way(users, num_items, table):
    generator = np.random.default_rng(0)
    users = users.numpy()[:, None]

    def draw():
        negatives = generator.integers(0, num_items, (BATCH_SIZE, NUM_NEGATIVES))
        if table is not None:
            rows, columns = np.nonzero(table[users, negatives])
            while len(rows):
                drawn = generator.integers(0, num_items, len(rows))
                negatives[rows, columns] = drawn
                again = table[users[rows, 0], drawn]
                rows, columns = rows[again], columns[again]
        return torch.from_numpy(negatives)

    return draw


def torch_way(users, num_items, table):
    table = None if table is None else torch.from_numpy(table)
    users = users[:, None]

    def draw():
        negatives = torch.randint(num_items, (BATCH_SIZE, NUM_NEGATIVES))
        if table is not None:
            rows, columns = table[users, negatives].nonzero(as_tuple=True)
            while len(rows):
                drawn = torch.randint(num_items, (len(rows),))
                negatives[rows, columns] = drawn
                again = table[users[rows, 0], drawn]
                rows, columns = rows[again], columns[again]
        return negatives

    return draw


OTHERS = {"numpy": numpy_way, "torch_randint": torch_way}


@pytest.mark.parametrize("sampling", ["plain", "exact exclusion"])
@pytest.mark.parametrize("way", [*FASTTOWER, *OTHERS])
def test_negatives(benchmark_in, way, sampling, ml_1m_shape, known):
    data, left_out = ml_1m_shape, known if sampling == "exact exclusion" else None
    users = data.interactions.user_index[:BATCH_SIZE].long()
    # The others look known positives up in a table, which is the fastest while it is small.
    table = np.zeros((data.num_users, data.num_items), dtype=bool)
    table[data.interactions.user_index, data.interactions.item_index] = True

    if way in FASTTOWER:

        def draw(of=FASTTOWER[way]):
            return of(users, NUM_NEGATIVES, data.num_items, key=seed_key(1), step=3, known_positives=left_out)

        right = reference.sample_negatives(
            users, NUM_NEGATIVES, data.num_items, key=seed_key(1), step=3, known_positives=left_out
        )
        assert draw().equal(right)
    else:
        draw = OTHERS[way](users, data.num_items, None if left_out is None else table)

    negatives = draw()
    assert negatives.shape == (BATCH_SIZE, NUM_NEGATIVES)
    touched = int(table[users[:, None], negatives].sum())
    assert touched == 0 if left_out is not None else touched > 0
    halves = torch.bincount(negatives.flatten() * 2 // data.num_items, minlength=2)
    # Known positives are few and mostly the first, popular items.
    assert 0.45 < halves[0] / halves.sum() < 0.51
    benchmark_in(
        f"negatives, {sampling}", positives=BATCH_SIZE, negatives=NUM_NEGATIVES, items=data.num_items
    )(draw)
