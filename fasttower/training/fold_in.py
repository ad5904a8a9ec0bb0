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

_CHUNK_USERS = 1024  # share the outer products of the items' vectors
_TILE_BYTES = 1 << 25

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

    Takes D^2 / 2 multiplications for each user, item and step of some six; its memory is bounded.

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
    for begin in range(0, touched.num_users, _CHUNK_USERS):
        users = torch.arange(begin, min(begin + _CHUNK_USERS, touched.num_users), device=device)
        users = users[touched.degrees[users] > 0]
        if len(users):
            objective = _Objective(touched, users, item_vectors, bias, drawn, loss, exclude_known_positives)
            vectors[users] = _newton(objective)
    return vectors


class _Objective:
    """f of a chunk of C users, with its gradient and Hessian, over the items that matter to it, by tiles.

    Attributes:
        items: (S, D): the vectors of the items that may be drawn or that one of the users touched.
        bias: (S,).
        drawn: (S,), bool: which may be drawn.
        row: (nnz,): the user, from 0 to C - 1, of each touched item, sorted by
        place: (nnz,): the item, from 0 to S - 1.
        degrees: (C, 1): n.
        negatives_each: (C, 1): N / |F|, the weight of an item that may be drawn.
    """

    def __init__(
        self,
        touched: KnownPositives,
        users: Tensor,
        item_vectors: Tensor,
        bias: Tensor,
        drawn: Tensor,
        loss: LossSettings,
        exclude: bool,
    ) -> None:
        degrees = touched.degrees[users]
        row = torch.repeat_interleave(degrees)
        begins = touched.indptr[users] - (degrees.cumsum(0) - degrees)
        item = touched.items[begins[row] + torch.arange(len(row), device=users.device)].long()
        there = drawn.clone()
        there[item] = True
        place, order = (there.cumsum(0) - 1)[item].sort(stable=True)
        self.items, self.bias, self.drawn = item_vectors[there], bias[there], drawn[there]
        self.row, self.place = row[order], place
        self.degrees = degrees[:, None].float()
        self.exclude, self.l2 = exclude, max(loss.l2, _LEAST_L2)
        free = self.drawn.sum().expand(len(users), 1).float()
        if exclude:
            mine = torch.zeros((len(users), 1), device=users.device)
            free = free - mine.index_add_(0, self.row, self.drawn[self.place].float()[:, None])
        self.negatives_each = loss.num_negatives / free.clamp(min=1)
        dim = item_vectors.shape[1]
        self._upper = torch.triu_indices(dim, dim, device=users.device)
        self._tile = max(1, _TILE_BYTES // (4 * max(len(users), dim * (dim + 1) // 2)))

    def __call__(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The value f (C,), its gradient (C, D) and its Hessian (C, D, D) at the vectors (C, D)."""
        num_users, dim = vectors.shape
        value = self.l2 * vectors.square().sum(1)
        gradient = 2 * self.l2 * vectors
        packed = torch.zeros((num_users, dim * (dim + 1) // 2), device=vectors.device)
        for begin in range(0, len(self.items), self._tile):
            tile = slice(begin, begin + self._tile)
            items = self.items[tile]
            pull, push = self._weights(tile)  # of softplus(-x) and of softplus(x): [C, T]
            logits = torch.addmm(self.bias[tile], vectors, items.T)
            weight = pull + push
            # softplus(-x) = softplus(x) - x
            value += (weight * softplus(logits) - pull * logits).sum(1)
            probability = logits.sigmoid()
            gradient.addmm_(weight * probability - pull, items)
            packed.addmm_(weight * probability * (1 - probability), _upper_products(items))
        hessian = torch.empty((num_users, dim, dim), device=vectors.device)
        first, second = self._upper
        hessian[:, first, second] = packed
        hessian[:, second, first] = packed
        hessian.diagonal(dim1=1, dim2=2).add_(2 * self.l2)
        return value, gradient, hessian

    def _weights(self, tile: slice) -> tuple[Tensor, Tensor]:
        """What the items of a tile weigh for each user, as touched and as drawn: (C, T) each."""
        bounds = torch.tensor([tile.start, tile.stop], device=self.place.device)
        low, high = torch.searchsorted(self.place, bounds).tolist()
        drawn = self.drawn[tile].float()
        mine = torch.zeros((len(self.degrees), len(drawn)), device=drawn.device)
        mine[self.row[low:high], self.place[low:high] - tile.start] = 1
        pull = mine / self.degrees
        return pull, self.negatives_each * (drawn * (1 - mine) if self.exclude else drawn)


def _upper_products(items: Tensor) -> Tensor:
    """``v_a v_b`` for all a <= b, by rows of the upper triangle: (T, D (D + 1) / 2)."""
    dim = items.shape[1]
    products = torch.empty((len(items), dim * (dim + 1) // 2), device=items.device)
    begin = 0
    for a in range(dim):
        torch.mul(items[:, a:], items[:, a : a + 1], out=products[:, begin : begin + dim - a])
        begin += dim - a
    return products


def _newton(objective: _Objective) -> Tensor:
    """The minimum of each user's f: (C, D)."""
    vectors = torch.zeros((len(objective.degrees), objective.items.shape[1]), device=objective.items.device)
    value, gradient, hessian = objective(vectors)
    for _ in range(_MOST_STEPS):
        step = torch.linalg.solve(hessian, gradient)
        slope = (step * gradient).sum(1)
        size = torch.ones_like(value)
        for _ in range(_MOST_HALVINGS):
            moved = vectors - size[:, None] * step
            moved_value, gradient, hessian = objective(moved)
            # Below rounding a step that changes nothing is as good as any.
            too_far = moved_value > value - 0.25 * size * slope + 1e-6 * value.abs()
            if not too_far.any():
                break
            size = torch.where(too_far, size / 2, size)
        vectors, value = moved, moved_value
        if float((step.norm(dim=1) / (1 + vectors.norm(dim=1))).max()) < _TOLERANCE:
            break
    return vectors
