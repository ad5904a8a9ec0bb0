"""The ten best items of each user: fasttower's tiles beside all scores at once and `torch.topk`."""

from functools import partial

import numpy as np
import pytest
import torch

from fasttower_kernels.topk import top_k

DIM, K = 64, 10
SHAPES = {
    # users, items
    "ML-1M's shape": (6_040, 3_706),
    "ML-1M's shape, seen items left out": (6_040, 3_706),
    "2,048 users of ML-20M's shape": (2_048, 26_744),
}


def fasttower_way(users, items, seen, backend="auto"):
    def recommend():
        rows = None if seen is None else torch.arange(len(users))
        found = top_k(users, items, k=K, seen=seen, seen_users=rows, backend=backend)
        return found.scores, found.items.long()

    return recommend


def torch_way(users, items, seen):
    # Where the seen items are is found before the clock runs.
    rows = None if seen is None else torch.repeat_interleave(torch.arange(len(users)), seen.degrees)
    columns = None if seen is None else seen.items.long()

    def recommend():
        scores = users @ items.T
        if rows is not None:
            scores[rows, columns] = -torch.inf
        return torch.topk(scores, K)

    return recommend


def numpy_way(users, items, seen):
    users, items = users.numpy(), items.numpy()
    rows = None if seen is None else np.repeat(np.arange(len(users)), seen.degrees)
    columns = None if seen is None else seen.items.numpy()

    def recommend():
        scores = users @ items.T
        if rows is not None:
            scores[rows, columns] = -np.inf
        best = np.argpartition(scores, -K, axis=1)[:, -K:]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
        best = np.take_along_axis(best, order, axis=1)
        return torch.from_numpy(np.take_along_axis(scores, best, axis=1)), torch.from_numpy(best)

    return recommend


WAYS = {
    "fasttower": fasttower_way,
    "fasttower_reference": partial(fasttower_way, backend="torch"),
    "torch_matmul_topk": torch_way,
    "numpy_argpartition": numpy_way,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_topk(benchmark_in, way, shape, known):
    generator = torch.Generator().manual_seed(0)
    users, items = (torch.randn(rows, DIM, generator=generator) for rows in SHAPES[shape])
    seen = known if "seen" in shape else None
    recommend = WAYS[way](users, items, seen)

    scores, found = recommend()
    right_scores, right = torch_way(users, items, seen)()
    torch.testing.assert_close(scores, right_scores, rtol=1e-4, atol=1e-4)
    # Items whose scores are equal but for rounding may change places.
    assert (found == right).double().mean() > 0.999
    benchmark_in(f"top-{K}, {shape}", users=len(users), items=len(items), dim=DIM, k=K)(recommend)
