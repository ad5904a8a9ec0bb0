"""Vectors of users who were not there at training, from what they touched and the items as they are.

With the items fixed, a user's part of the training loss is a logistic regression of its own, and as the
negatives are uniform over the items that may be drawn, their expectation is a mean over these. So with P the
user's n items, F the items that may be drawn, N negatives each, and x_j = <u, v_j> + bias_j,

    f(u) = mean_(j in P) softplus(-x_j) + N * mean_(j in F) softplus(x_j) + l2 * |u|^2

is what training minimises over u, on the mean. It is convex and has D unknowns: Newton's method gets there in
a handful of steps, all users of a chunk at once.

Source:
    The loss is the sampled BCE of `fasttower_kernels.sampled_bce`. Newton's method with backtracking: Boyd
    and Vandenberghe, "Convex Optimization", section 9.5.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.sampled_bce import LossSettings

_CHUNK_BYTES = 1 << 26
_LIVE_BUFFERS = 8  # users x items arrays that a chunk's iteration holds

# Of a larger catalogue a sample of this size stands for the items that may be drawn.
_MOST_DRAWN_ITEMS = 1 << 16

_MOST_STEPS, _MOST_HALVINGS = 30, 12
_TOLERANCE = 1e-4
_LEAST_L2 = 1e-4  # without any, a user whose items the vectors can tell apart would have no finite optimum


@torch.no_grad()
def fold_in(
    touched: KnownPositives,
    item_vectors: Tensor,
    item_bias: Tensor | None,
    loss: LossSettings,
    *,
    exclude_known_positives: bool,
) -> Tensor:
    """The vectors that the training loss is least for, on the mean over the negatives, with the items fixed.

    Args:
        touched: the items of each of the R users.
        item_vectors: (I, D), float32.
        item_bias: (I,), float32, or None.
        loss: that the item vectors were trained with; an L2 below 1e-4 counts as 1e-4.
        exclude_known_positives: whether negatives were drawn from the untouched items alone. Of more than
            65,536 items, a fixed sample of this size stands for those that may be drawn.

    Returns:
        (R, D), float32, on the items' device. A user who touched nothing gets zeros, which leave the bias.
    """
    num_items, dim = item_vectors.shape
    device = item_vectors.device
    drawn = torch.ones(num_items, dtype=torch.bool, device=device)
    if num_items > _MOST_DRAWN_ITEMS:
        drawn = torch.zeros_like(drawn)
        order = torch.randperm(num_items, generator=torch.Generator().manual_seed(0))
        drawn[order[:_MOST_DRAWN_ITEMS].to(device)] = True
    bias = torch.zeros(num_items, device=device) if item_bias is None else item_bias

    vectors = torch.zeros((touched.num_users, dim), device=device)
    columns = min(num_items, 2 * _MOST_DRAWN_ITEMS)
    rows = max(1, min(_CHUNK_BYTES // (4 * dim * dim), _CHUNK_BYTES // (4 * _LIVE_BUFFERS * columns)))
    for begin in range(0, touched.num_users, rows):
        users = torch.arange(begin, min(begin + rows, touched.num_users), device=device)
        users = users[touched.degrees[users] > 0]
        if len(users):
            objective = _Objective.of(
                touched, users, item_vectors, bias, drawn, loss, exclude_known_positives
            )
            vectors[users] = _newton(objective)
    return vectors


class _Objective:
    """f of a chunk of C users over the S items that matter to it, its gradient and its Hessian.

    Attributes:
        items: (S, D): the vectors.
        bias: (S,).
        pull: (C, S): the weight of softplus(-x); 1 / n at the user's items.
        push: (C, S): the weight of softplus(x); N / |F| at the items that may be drawn.
        l2: of the user vector.
    """

    def __init__(self, items: Tensor, bias: Tensor, pull: Tensor, push: Tensor, l2: float) -> None:
        self.items, self.bias, self.pull, self.push, self.l2 = items, bias, pull, push, l2
        self._upper = torch.triu_indices(items.shape[1], items.shape[1], device=items.device)

    @staticmethod
    def of(
        touched: KnownPositives,
        users: Tensor,
        item_vectors: Tensor,
        bias: Tensor,
        drawn: Tensor,
        loss: LossSettings,
        exclude: bool,
    ) -> _Objective:
        """The objective of some of the users; (I,) bool ``drawn`` says which items stand for all."""
        degrees = touched.degrees[users]
        row = torch.repeat_interleave(degrees)
        begins = touched.indptr[users] - (degrees.cumsum(0) - degrees)
        item = touched.items[begins[row] + torch.arange(len(row), device=users.device)].long()
        there = drawn.clone()
        there[item] = True
        place = there.cumsum(0) - 1
        mine = torch.zeros((len(users), int(there.sum())), dtype=torch.bool, device=users.device)
        mine[row, place[item]] = True
        push = (drawn[there] & ~mine if exclude else drawn[there].expand_as(mine)).float()
        push *= loss.num_negatives / push.sum(1, keepdim=True).clamp(min=1)
        return _Objective(
            item_vectors[there], bias[there], mine / degrees[:, None], push, max(loss.l2, _LEAST_L2)
        )

    def logits(self, vectors: Tensor) -> Tensor:
        """x: (C, S)."""
        return torch.addmm(self.bias, vectors, self.items.T)

    def value(self, vectors: Tensor, logits: Tensor) -> Tensor:
        """F: (C,)."""
        # softplus(-x) = softplus(x) - x
        loss = (self.pull + self.push) * softplus(logits) - self.pull * logits
        return loss.sum(1) + self.l2 * vectors.square().sum(1)

    def step(self, vectors: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Newton's step (C, D), to be taken away from the vectors, and its slope (C,), not negative."""
        weight = self.pull + self.push
        probability = logits.sigmoid()
        gradient = (weight * probability - self.pull) @ self.items + 2 * self.l2 * vectors
        hessian = self._hessian(weight * probability * (1 - probability))
        step = torch.linalg.solve(hessian, gradient)
        return step, (step * gradient).sum(1)

    def _hessian(self, curvature: Tensor) -> Tensor:
        """``sum_j curvature_j v_j v_j^T + 2 l2``: (C, D, D)."""
        dim = self.items.shape[1]
        first, second = self._upper
        packed = torch.zeros((len(curvature), len(first)), device=curvature.device)
        tile = max(1, _CHUNK_BYTES // (4 * len(first)))
        for begin in range(0, len(self.items), tile):
            items = self.items[begin : begin + tile]
            packed.addmm_(curvature[:, begin : begin + tile], items[:, first] * items[:, second])
        hessian = torch.empty((len(curvature), dim, dim), device=curvature.device)
        hessian[:, first, second] = packed
        hessian[:, second, first] = packed
        hessian.diagonal(dim1=1, dim2=2).add_(2 * self.l2)
        return hessian


def _newton(objective: _Objective) -> Tensor:
    """The minimum of each user's f: (C, D)."""
    num_users, dim = len(objective.pull), objective.items.shape[1]
    vectors = torch.zeros((num_users, dim), device=objective.items.device)
    logits = objective.logits(vectors)
    value = objective.value(vectors, logits)
    for _ in range(_MOST_STEPS):
        step, slope = objective.step(vectors, logits)
        size = torch.ones_like(value)
        for _ in range(_MOST_HALVINGS):
            moved = vectors - size[:, None] * step
            moved_logits = objective.logits(moved)
            moved_value = objective.value(moved, moved_logits)
            # Below rounding a step that changes nothing is as good as any.
            too_far = moved_value > value - 0.25 * size * slope + 1e-6 * value.abs()
            if not too_far.any():
                break
            size = torch.where(too_far, size / 2, size)
        vectors, logits, value = moved, moved_logits, moved_value
        if float((step.norm(dim=1) / (1 + vectors.norm(dim=1))).max()) < _TOLERANCE:
            break
    return vectors
