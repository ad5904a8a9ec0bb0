"""What the tests of top-K share: an exact oracle, and inputs whose scores are exact."""

import numpy as np
import torch

from fasttower_kernels.known_positives import KnownPositives


def oracle(user_vectors, item_vectors, k, *, item_bias=None, seen=None, seen_users=None, candidates=None):
    """Sort everything in float64 by (-score, index); items that are seen or no candidates are dropped."""
    scores = user_vectors.double().cpu().numpy() @ item_vectors.double().cpu().numpy().T
    if item_bias is not None:
        scores = scores + item_bias.double().cpu().numpy()
    items = np.full((len(scores), k), -1, dtype=np.int32)
    best = np.full((len(scores), k), -np.inf, dtype=np.float32)
    for row, row_scores in enumerate(scores):
        order = np.lexsort((np.arange(len(row_scores)), -row_scores))
        if seen is not None:
            user = int(seen_users[row])
            order = order[
                ~np.isin(order, seen.items[seen.indptr[user] : seen.indptr[user + 1]].cpu().numpy())
            ]
        if candidates is not None:
            order = order[candidates.cpu().numpy()[order]]
        order = order[:k]
        items[row, : len(order)] = order
        best[row, : len(order)] = row_scores[order]
    return items, best


def assert_equal(result, expected):
    items, scores = expected
    assert result.items.dtype == torch.int32
    assert result.scores.dtype == torch.float32
    np.testing.assert_array_equal(result.items.cpu().numpy(), items)
    np.testing.assert_array_equal(result.scores.cpu().numpy(), scores)


def integers(generator, low, high, *shape):
    """Small integers as floats: sums and products of them are exact, whatever the order of summation."""
    return torch.from_numpy(generator.integers(low, high, shape).astype(np.float32))


def padded(vectors, width):
    """The same values as a view of wider storage, whose padding would be noticed if it were read."""
    storage = torch.full((len(vectors), width), torch.nan)
    storage[:, : vectors.shape[1]] = vectors
    return storage[:, : vectors.shape[1]]


def random_seen(generator, num_users, num_items, share):
    pairs = np.argwhere(generator.random((num_users, num_items)) < share)
    return KnownPositives.from_pairs(
        torch.from_numpy(pairs[:, 0]), torch.from_numpy(pairs[:, 1]), num_users, num_items
    )
