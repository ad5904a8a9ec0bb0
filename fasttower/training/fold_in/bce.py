"""A new user's problem under BCE and generalised BCE: a logistic regression.

With P the user's n items, q_j how often item j is expected among the negatives of a positive, and beta 1 but
for gbce:

    f(u) = beta mean_(i in P) softplus(-x_i) + sum_j q_j softplus(x_j)
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus

from fasttower.training.fold_in.items import ChunkItems, Symmetric
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.settings import LossSettings


class BCE:
    """f of a chunk of users, with its gradient and Hessian."""

    def __init__(self, items: ChunkItems, loss: LossSettings, negatives: Negatives) -> None:
        self._items = items
        self._beta: Tensor | float = 1.0
        if loss.name == "gbce":
            free = items.free if negatives.redraws else negatives.num_items
            share = (items.free * 0 + negatives.settings.count) / free
            self._beta = 1 - loss.calibration * (1 - share.clamp(max=1))

    def __call__(self, users: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (C,), gradients (C, D) and Hessians (C, D, D) at users (C, D)."""
        items = self._items
        value, gradient = users.new_zeros(len(users)), users * 0
        hessian = Symmetric(len(users), users.shape[1], users.device)
        for tile in items.tiles():
            mine = items.touched(tile)
            pull, push = self._beta * mine / items.degrees, items.expected(tile, mine)
            logits, weight = items.logits(tile, users), pull + push
            # softplus(-x) = softplus(x) - x
            value += (weight * softplus(logits) - pull * logits).sum(1)
            probability = logits.sigmoid()
            gradient.addmm_(weight * probability - pull, items.vectors[tile])
            hessian.add(weight * probability * (1 - probability), items.vectors[tile])
        return value, gradient, hessian.full()
