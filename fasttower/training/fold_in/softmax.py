"""A new user's problem under the softmax that the sampled one estimates.

With P the user's items, F the items that may be its negatives and ``z(u) = log sum_(j in F) exp(x_j)``:

    f(u) = mean_(i in P) [ -x_i + log(exp(x_i) + exp(z)) ] = mean_(i in P) softplus(z - x_i)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fasttower.training.fold_in.items import ChunkItems, Symmetric
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.settings import LossSettings

_NEVER = -1e30  # the logarithm of nothing, in numbers that can be subtracted


class Softmax:
    """f of a chunk of users, with its gradient and Hessian."""

    def __init__(self, items: ChunkItems, loss: LossSettings, negatives: Negatives) -> None:
        self._items = items

    def __call__(self, users: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (C,), gradients (C, D) and Hessians (C, D, D) at users (C, D).

        With s_i = sigmoid(z - x_i), p the softmax over F and m its mean vector,
        ``f' = mean_i s_i (m - v_i)`` and
        ``f'' = mean_i [ s_i Cov_p(v) + s_i (1 - s_i) (m - v_i) (m - v_i)^T ]``.
        """
        items = self._items
        z = torch.full((len(users),), _NEVER, device=users.device)
        for tile in items.tiles():
            free = items.counts(tile, items.touched(tile)).log().clamp(min=_NEVER)
            z = torch.logaddexp(z, (items.logits(tile, users) + free).logsumexp(1))
        count = len(users)
        value, slope, bend = (users.new_zeros(count, 1) for _ in range(3))
        mean, own, pull = users * 0, users * 0, users * 0
        second = Symmetric(2 * count, users.shape[1], users.device)  # of p, then of the positives
        for tile in items.tiles():
            mine = items.touched(tile)
            margin = z[:, None] - items.logits(tile, users)
            share, s = mine / items.degrees, margin.sigmoid()
            p, of_own, curve = (
                items.counts(tile, mine) * (-margin).clamp(max=0).exp(),
                share * s,
                share * s * (1 - s),
            )
            value += (share * softplus(margin)).sum(1, keepdim=True)
            slope += of_own.sum(1, keepdim=True)
            bend += curve.sum(1, keepdim=True)
            mean.addmm_(p, items.vectors[tile])
            own.addmm_(of_own, items.vectors[tile])
            pull.addmm_(curve, items.vectors[tile])
            second.add(torch.cat([p, curve]), items.vectors[tile])
        of_p, of_positives = second.full().split(count)
        outer = mean[:, :, None] * mean[:, None, :]
        cross = mean[:, :, None] * pull[:, None, :]
        hessian = slope[:, :, None] * (of_p - outer) + of_positives + bend[:, :, None] * outer
        return value[:, 0], slope * mean - own, hessian - cross - cross.transpose(1, 2)
