"""Drawing items in proportion to a power of their popularity, by an alias table.

A word of 32 bits gives a cell, the next one its side: ``cell = word_0 * I >> 32``, and the item is the cell
where ``word_1 < threshold[cell]``, else ``alias[cell]``.

Source: Walker, "An Efficient Method for Generating Discrete Random Variables with General Distributions"
(ACM TOMS 1977); the table is made as in Vose, "A Linear Algorithm for Generating Random Numbers with a Given
Distribution" (IEEE TSE 1991), in float64. The power: Mikolov et al., "Distributed Representations of Words
and Phrases and their Compositionality" (NIPS 2013), section 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fasttower_kernels.known_positives import KnownPositives

_ALWAYS = (1 << 32) - 1


@dataclass(frozen=True)
class Popularity:
    """A proposal p over the items.

    Attributes:
        threshold: (I,), int32: the bits of an unsigned 32-bit word.
        alias: (I,), int32; a cell that is always its own item is its own alias.
        log_p: (I,), float32: logarithm of p.
        log_free_mass: (U,), float32: logarithm of 1 - P_u, the mass that a user's known positives leave; 0
            without known positives.
    """

    threshold: Tensor
    alias: Tensor
    log_p: Tensor
    log_free_mass: Tensor


def popularity(
    item_counts: Tensor, power: float, num_users: int, known_positives: KnownPositives | None
) -> Popularity:
    """The proposal ``p_i ~ count_i ** power``; an item without a count has half of the smallest one.

    Args:
        item_counts: (I,), int64: how often each item stands in the part that is trained on.
        power: 0 or more.
        num_users: U.
        known_positives: what is drawn again, or None.

    Returns:
        On the device of the counts.
    """
    counts = item_counts.cpu().numpy().astype(np.float64)
    counts[counts == 0] = counts[counts > 0].min() / 2 if counts.any() else 1
    weights = counts**power
    p = weights / weights.sum()
    threshold, alias = _alias_table(p)
    free_mass = torch.ones(num_users, dtype=torch.float64)
    if known_positives is not None:
        users = torch.repeat_interleave(torch.arange(num_users), known_positives.degrees.cpu())
        free_mass.index_add_(0, users, -torch.from_numpy(p)[known_positives.items.long().cpu()])
    device = item_counts.device
    # A user who has touched everything has no negatives: any number will do.
    log_free_mass = free_mass.clamp_(min=1e-12).log_().float()
    return Popularity(
        torch.from_numpy(threshold.view(np.int32)).to(device),
        torch.from_numpy(alias).to(device),
        torch.from_numpy(np.log(p).astype(np.float32)).to(device),
        log_free_mass.to(device),
    )


def _alias_table(p: NDArray[np.float64]) -> tuple[NDArray[np.uint32], NDArray[np.int32]]:
    """Thresholds and aliases of the cells."""
    share = (p * len(p)).tolist()
    alias = list(range(len(p)))
    small = [i for i, value in enumerate(share) if value < 1]
    large = [i for i, value in enumerate(share) if value >= 1]
    while small and large:
        low, high = small.pop(), large[-1]
        alias[low] = high
        share[high] -= 1 - share[low]
        if share[high] < 1:
            small.append(large.pop())
    for i in (*small, *large):  # rounding left them a little off 1
        share[i] = 1.0
    threshold = np.minimum(np.array(share) * 2.0**32, _ALWAYS).astype(np.uint32)
    return threshold, np.array(alias, dtype=np.int32)
