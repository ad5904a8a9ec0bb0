"""Ranking metrics on the device, equal to RePlay's.

A user is a row; its relevant items are its row of the truth. Every metric but Coverage is the mean over the
users with at least one relevant item; a user with relevant items and no recommendations scores 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives


def ranking_metrics(items: Tensor, truth: KnownPositives, train_items: Tensor, k: int) -> dict[str, float]:
    """NDCG, HitRate, Recall, MAP, MRR and Coverage of the first k recommendations.

    With h_j = 1 where the j-th recommendation (j from 1) is relevant, n relevant items and m = min(k, n):
    ``NDCG = sum_j h_j / log2(j + 1) / sum_(j <= m) 1 / log2(j + 1)``, ``HitRate = max_j h_j``,
    ``Recall = sum_j h_j / n``, ``MAP = sum_j h_j * (h_1 + .. + h_j) / j / m``, ``MRR = max_j h_j / j``, and
    ``Coverage`` = distinct training items recommended / training items.

    Users without a relevant item count in no metric, Coverage included. Recommendations are taken in the
    order given, so ties are the caller's. Where a row holds fewer than k, the missing ones are misses.

    Args:
        items: (R, K), integer, best first; -1 for none, at the end of a row; only the first k are read.
        truth: the relevant items of the same R rows.
        train_items: (I,), bool: which items the training part holds; Coverage is relative to them.
        k: the cutoff, at least 1.

    Returns:
        ``{"NDCG@k": .., "HitRate@k": .., "Recall@k": .., "MAP@k": .., "MRR@k": .., "Coverage@k": ..}``.

    Raises:
        FastTowerError: rows that do not match, items outside the catalogue, or no relevant item at all.

    Source:
        RePlay 0.22, ``replay.metrics``: equal to 1e-6.
    """
    return means(*metrics_per_user(items, truth, train_items, k), k)


def means(per_user: Mapping[str, Tensor], coverage: float, k: int) -> dict[str, float]:
    """The means over the users, and the coverage, by names with the cutoff."""
    values = torch.stack([values.mean() for values in per_user.values()]).tolist()
    return {
        f"{name}@{k}": value for name, value in zip([*per_user, "Coverage"], [*values, coverage], strict=True)
    }


def metrics_per_user(
    items: Tensor, truth: KnownPositives, train_items: Tensor, k: int
) -> tuple[dict[str, Tensor], float]:
    """What `ranking_metrics` takes the means of, (R',) for users with a relevant item, and the coverage."""
    if k < 1:
        raise FastTowerError(f"k is {k}; ask for a cutoff of at least 1")
    if train_items.shape != (truth.num_items,) or not train_items.any():
        raise FastTowerError(
            f"train_items marks {int(train_items.sum())} of {len(train_items)} items; "
            f"expected at least one of {truth.num_items}"
        )
    if items.ndim != 2 or len(items) != truth.num_users:
        raise FastTowerError(
            f"recommendations have shape {tuple(items.shape)}; expected ({truth.num_users}, K), a row for "
            f"each row of the truth"
        )
    if len(truth.items) == 0:
        raise FastTowerError(
            "no user has a relevant item, so there is nothing to evaluate; give a larger test part"
        )
    items = items[:, :k].long()
    if items.numel() and not -1 <= int(items.min()) <= int(items.max()) < truth.num_items:
        raise FastTowerError(
            f"recommended items span {int(items.min())} to {int(items.max())}; expected -1 (none) to "
            f"{truth.num_items - 1}"
        )

    # float64 wherever the device has it; rounding in float32 stays within 1e-6 of it.
    dtype = torch.float32 if items.device.type == "mps" else torch.float64
    evaluated = truth.degrees > 0  # [R]
    relevant = truth.degrees[evaluated]  # [R']
    hits = _hits(items, truth)[evaluated].to(dtype)  # [R', K]
    position = torch.arange(1, k + 1, dtype=dtype, device=items.device)
    discount = (position + 1).log2().reciprocal()
    ideal = discount.cumsum(0)[relevant.clamp(max=k) - 1]  # [R']
    position, discount = position[: hits.shape[1]], discount[: hits.shape[1]]

    recommended = items[evaluated]
    per_user = {
        "NDCG": hits @ discount / ideal,
        "HitRate": hits.sum(1).clamp(max=1),
        "Recall": hits.sum(1) / relevant,
        "MAP": (hits * hits.cumsum(1) / position).sum(1) / relevant.clamp(max=k),
        # The first hit has the largest reciprocal rank; the zero column stands for no hit.
        "MRR": torch.nn.functional.pad(hits / position, (0, 1)).amax(1),
    }
    covered = recommended[recommended >= 0].unique()
    coverage = int(train_items[covered].sum()) / int(train_items.sum())
    return per_user, coverage


def _hits(items: Tensor, truth: KnownPositives) -> Tensor:
    """Which recommendations are relevant: (R, K), bool."""
    rows = torch.arange(len(items), device=items.device)
    # A row's items are sorted and rows follow each other, so that the joint keys are sorted as well.
    keys = torch.repeat_interleave(rows, truth.degrees) * truth.num_items + truth.items  # [nnz]
    wanted = rows[:, None] * truth.num_items + items
    place = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
    # An item of -1 would be the key of the last item of the row before.
    return (keys[place] == wanted) & (items >= 0)
