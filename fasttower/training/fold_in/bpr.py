"""A new user's problem under BPR: all pairs of a touched item and one that may be a negative.

With P the user's items and q_j how often item j is expected among the negatives of a positive:

    f(u) = mean_(i in P) sum_j q_j softplus(x_j - x_i)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fasttower.training.fold_in.items import ChunkItems
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.settings import LossSettings

# Pairs of a user that are handled together: the touched items of a busy user go in pieces.
_PAIRS = 1 << 22


class BPR:
    """The problems of a chunk of users, one user at a time, as the pairs of two users share no work."""

    def __init__(self, items: ChunkItems, loss: LossSettings, negatives: Negatives) -> None:
        everything = slice(0, len(items.vectors))
        mine = items.touched(everything)
        self._items = items
        self._touched = [row.nonzero()[:, 0] for row in mine]
        self._rates = items.expected(everything, mine)

    def __call__(self, users: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (C,), gradients (C, D) and Hessians (C, D, D) at users (C, D)."""
        parts = [self._of_one(c, u) for c, u in enumerate(users)]
        value, gradient, hessian = zip(*parts, strict=True)
        return torch.stack(value), torch.stack(gradient), torch.stack(hessian)

    def _of_one(self, c: int, user: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vectors, rates = self._items.vectors, self._rates[c]
        logits = vectors @ user + self._items.bias
        touched = self._touched[c]
        value, gradient, hessian = user.new_zeros(()), user * 0, user.new_zeros(len(user), len(user))
        for some in touched.split(max(1, _PAIRS // len(vectors))):
            margin = logits[None, :] - logits[some][:, None]  # [P, S]
            probability = margin.sigmoid()
            pairs = rates / len(touched)
            value += (softplus(margin) @ pairs).sum()
            slope = probability * pairs
            gradient += slope.sum(0) @ vectors - slope.sum(1) @ vectors[some]
            bend = slope * (1 - probability)
            cross = vectors[some].T @ (bend @ vectors)
            hessian += (vectors.T * bend.sum(0)) @ vectors - cross - cross.T
            hessian += (vectors[some].T * bend.sum(1)) @ vectors[some]
        return value, gradient, hessian
