"""The popularity baseline: items by the number of distinct users who touched them.

It is ranked as a one-dimensional model is, through the same top-K, so that seen items and ties (the smaller
item index first) are treated alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.topk import TopK, top_k


def item_popularity(known_positives: KnownPositives) -> Tensor:
    """Distinct users of each item: (I,), int64."""
    return torch.bincount(known_positives.items, minlength=known_positives.num_items)


def most_popular(
    known_positives: KnownPositives, user_index: Tensor, *, k: int, filter_seen: bool = True
) -> TopK:
    """The K most popular items for each of the users, with their counts as scores.

    Args:
        known_positives: the pairs of fit: what is counted and, with `filter_seen`, what is left out.
        user_index: (R,), int32 or int64: the users to recommend to.
        k: K, items wanted per user, at least 1.
        filter_seen: leave out what the user has touched.

    Returns:
        Items (R, K) and counts (R, K), as `top_k` gives them. Counts are exact up to 2**24 users per item.
    """
    counts = item_popularity(known_positives)
    return top_k(
        torch.ones((len(user_index), 1), device=counts.device),
        counts.float()[:, None],
        k=k,
        seen=known_positives if filter_seen else None,
        seen_users=user_index if filter_seen else None,
    )
