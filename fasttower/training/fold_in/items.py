"""What the items are to users who are folded in: touched, expected as negatives, and their vectors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives

TILE_BYTES = 1 << 25

MOST_ITEMS = 1 << 16
"""Of a larger catalogue, a fixed sample of so many stands for the items that may be negatives."""


class ChunkItems:
    """The items that matter to C users: those that one of them touched, and those that may be negatives.

    Attributes:
        vectors: (S, D), as the logit reads them.
        bias: (S,).
        row: (nnz,): the user, from 0 to C - 1, of each touched item, sorted by
        place: (nnz,): the item, from 0 to S - 1.
        degrees: (C, 1): how many items each user touched.
        free: (C, 1): how many each may have as negatives.
    """

    def __init__(
        self, touched: KnownPositives, users: Tensor, vectors: Tensor, bias: Tensor, negatives: Negatives
    ) -> None:
        device, num_items = vectors.device, len(vectors)
        degrees = touched.degrees[users]
        row = torch.repeat_interleave(degrees)
        begins = touched.indptr[users] - (degrees.cumsum(0) - degrees)
        item = touched.items[begins[row] + torch.arange(len(row), device=device)].long()
        drawn = _sample(num_items, device)
        there = drawn.clone()
        there[item] = True
        place, order = (there.cumsum(0) - 1)[item].sort(stable=True)
        self.vectors, self.bias = vectors[there], bias[there]
        self.row, self.place = row[order], place
        self.degrees = degrees[:, None].float()
        self._excludes = negatives.known_positives is not None
        rates = negatives.item_rates.to(device)
        self._rates = (rates * drawn)[there]
        self._drawn = drawn[there].float()
        taken = torch.zeros((len(users), 2), device=device)
        if self._excludes:
            of_place = torch.stack([self._rates, self._drawn], dim=1)[self.place]
            taken = taken.index_add_(0, self.row, of_place)
        self.free = (
            num_items - degrees[:, None] if self._excludes else torch.full_like(taken[:, :1], num_items)
        ).float()
        # The sample stands for all; where known items are drawn again, the rest has the rate of all.
        rest = self._rates.sum() - taken[:, :1] * negatives.redraws
        self._rate_each = rates.sum() / rest.clamp(min=1e-12)
        self._share = num_items / self._drawn.sum()
        dim = vectors.shape[1]
        self._tile = max(1, TILE_BYTES // (4 * max(len(users), dim * (dim + 1) // 2)))

    def tiles(self) -> Iterator[slice]:
        """Pieces of the items whose memory is bounded."""
        for begin in range(0, len(self.vectors), self._tile):
            yield slice(begin, begin + self._tile)

    def touched(self, tile: slice) -> Tensor:
        """1 where the user touched the item of a tile, else 0: (C, T)."""
        bounds = torch.tensor([tile.start, tile.stop], device=self.place.device)
        low, high = torch.searchsorted(self.place, bounds).tolist()
        mine = torch.zeros((len(self.degrees), len(self.bias[tile])), device=self.bias.device)
        mine[self.row[low:high], self.place[low:high] - tile.start] = 1
        return mine

    def expected(self, tile: slice, mine: Tensor) -> Tensor:
        """How often an item is expected among the negatives of one positive: (C, T)."""
        rates = self._rates[tile]
        return self._rate_each * (rates * (1 - mine) if self._excludes else rates)

    def counts(self, tile: slice, mine: Tensor) -> Tensor:
        """How many items each item of a tile stands for as a possible negative: (C, T)."""
        drawn = self._share * self._drawn[tile]
        return drawn * (1 - mine) if self._excludes else drawn.expand_as(mine)

    def logits(self, tile: slice, users: Tensor) -> Tensor:
        """Of users (C, D) and the items of a tile: (C, T)."""
        return torch.addmm(self.bias[tile], users, self.vectors[tile].T)


def _sample(num_items: int, device: torch.device) -> Tensor:
    """Which items may stand for the negatives: (I,), bool."""
    if num_items <= MOST_ITEMS:
        return torch.ones(num_items, dtype=torch.bool, device=device)
    order = torch.randperm(num_items, generator=torch.Generator().manual_seed(0))
    drawn = torch.zeros(num_items, dtype=torch.bool, device=device)
    drawn[order[:MOST_ITEMS].to(device)] = True
    return drawn


class Symmetric:
    """Sums of weighted outer products, of which only the upper triangle is computed."""

    def __init__(self, num_users: int, dim: int, device: torch.device) -> None:
        self._dim = dim
        self._packed = torch.zeros((num_users, dim * (dim + 1) // 2), device=device)

    def add(self, weights: Tensor, vectors: Tensor) -> None:
        """Add ``sum_t weights[c, t] v_t v_t^T`` to each user's sum; weights (C, T), vectors (T, D)."""
        products = torch.empty((len(vectors), self._packed.shape[1]), device=vectors.device)
        begin = 0
        for a in range(self._dim):
            end = begin + self._dim - a
            torch.mul(vectors[:, a:], vectors[:, a : a + 1], out=products[:, begin:end])
            begin = end
        self._packed.addmm_(weights, products)

    def full(self) -> Tensor:
        """The matrices: (C, D, D)."""
        first, second = torch.triu_indices(self._dim, self._dim, device=self._packed.device)
        matrices = torch.empty((len(self._packed), self._dim, self._dim), device=self._packed.device)
        matrices[:, first, second] = self._packed
        matrices[:, second, first] = self._packed
        return matrices
