"""Top-K by tiled matmul and ``torch.topk``, with ties broken by the smaller item index, exactly."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.topk.precision import multiply
from fasttower_kernels.topk.tiles import Catalogue, Tile

# One score of a tile is 4 bytes; mending a tied row needs a copy, a running count and three masks beside it.
_BYTES_PER_SCORE = 16
# The bias of an item and its mask; a gathered vector comes on top.
_BYTES_PER_COLUMN = 16
# The K best of the tile and those so far, as scores and items, before and after they are sorted together.
BYTES_PER_BEST = 64
# Leaving out one seen item takes its number, its row, its column, and which of those are in the tile.
_BYTES_PER_SEEN = 48
_MOST_COLUMNS = 1 << 16
# Torch's CUDA kernels index in 32 bits up to here; beyond, ``topk`` has overflowed (pytorch/pytorch#176095).
_MOST_SCORES = (1 << 31) - 1
# However small the budget is: below, calls would be all that time goes to.
_FEWEST_COLUMNS = 256
_FEWEST_SEEN = 1024


class TopK(NamedTuple):
    """The K best items of each user, best first."""

    items: Tensor
    """(R, K), int32: item indices; -1 where there are no more, always at the end of a row."""
    scores: Tensor
    """(R, K), float32: the items' scores, never increasing along a row; -inf where the item is -1."""

    @staticmethod
    def empty(num_users: int, k: int, device: torch.device) -> TopK:
        """Nothing found yet."""
        return TopK(
            torch.full((num_users, k), -1, dtype=torch.int32, device=device),
            torch.full((num_users, k), -torch.inf, dtype=torch.float32, device=device),
        )


def top_k_torch(
    user_vectors: Tensor,
    catalogue: Catalogue,
    *,
    k: int,
    seen: KnownPositives | None,
    seen_users: Tensor | None,
    budget_bytes: int,
) -> TopK:
    """Plain torch on any device; see `fasttower_kernels.topk.top_k`, which checks the arguments.

    The K best of a tile of items join the K best of the tiles before it.
    """
    found = TopK.empty(len(user_vectors), k, user_vectors.device)
    rows, columns = tile_shape(catalogue, budget_bytes, per_row=BYTES_PER_BEST * k)
    buffer = torch.empty(min(rows, len(user_vectors)) * columns, device=user_vectors.device)
    for begin in range(0, len(user_vectors), rows):
        some = slice(begin, begin + rows)
        users = user_vectors[some]
        hidden = None if seen is None or seen_users is None else SeenEntries.of(seen, seen_users[some])
        best = TopK(found.items[some], found.scores[some])
        for first in range(0, len(catalogue), columns):
            tile = catalogue.tile(first, first + columns)
            shape = len(users), len(tile.vectors)
            scores = buffer[: math.prod(shape)].view(shape)  # [C, W]
            multiply(users, tile.vectors.T, "float32", out=scores)
            if tile.bias is not None:
                scores += tile.bias
            if hidden is not None:
                hidden.leave_out(scores, tile)
            join(best, tile, *_best_of_tile(scores, min(k, scores.shape[1])))
    return found


def tile_shape(
    catalogue: Catalogue, budget_bytes: int, *, per_row: int, per_column: int = 0
) -> tuple[int, int]:
    """Users and items of a tile: what a single user and the items take is at most half the budget.

    A tile has fewer than 2**31 scores, also where the budget, a part of a large GPU's memory, allows more.

    Args:
        catalogue: the items.
        budget_bytes: for the tile and what goes with it.
        per_row: bytes per user beside the scores.
        per_column: bytes per item beside the scores, its bias and, where gathered, its vector.
    """
    gathered = 0 if catalogue.index is None else 4 * catalogue.vectors.shape[1]
    per_column += _BYTES_PER_COLUMN + gathered
    fitting = budget_bytes // (2 * (_BYTES_PER_SCORE + per_column))
    columns = max(1, min(len(catalogue), _MOST_COLUMNS, max(_FEWEST_COLUMNS, fitting)))
    rows = (budget_bytes - per_column * columns) // (_BYTES_PER_SCORE * columns + per_row)
    return max(1, min(rows, _MOST_SCORES // columns)), columns


class SeenEntries(NamedTuple):
    """The seen items of some users, one user's after another's: entries 0 .. total - 1."""

    items: Tensor
    """(nnz,), int32: those of all users there are."""
    end: Tensor
    """(C,), int64: the entry after a user's last."""
    shift: Tensor
    """(C,), int64: from the number of a user's entry to its place in `items`."""
    total: int

    @staticmethod
    def of(seen: KnownPositives, users: Tensor) -> SeenEntries:
        """Of the rows (C,) of `seen`, once for all tiles: the total is a wait for the device."""
        begin = seen.indptr[users]
        degree = seen.indptr[users + 1] - begin
        end = degree.cumsum(0)
        return SeenEntries(seen.items, end, begin - end + degree, int(end[-1]))

    def leave_out(self, scores: Tensor, tile: Tile) -> None:
        """Set the scores (C, W) of each user's seen items to -inf."""
        width = len(tile.vectors)
        # As many together as fit into half of what the scores are allowed.
        most = max(_FEWEST_SEEN, scores.numel() * _BYTES_PER_SCORE // (2 * _BYTES_PER_SEEN))
        for first in range(0, self.total, most):
            entry = torch.arange(first, min(first + most, self.total), device=scores.device)
            row = torch.searchsorted(self.end, entry, right=True)
            item = self.items[entry + self.shift[row]].long()
            if tile.item_index is None:
                column = item - tile.first
                inside = (column >= 0) & (column < width)
            else:
                column = torch.searchsorted(tile.item_index, item).clamp_(max=width - 1)
                inside = tile.item_index[column] == item
            scores[row[inside], column[inside]] = -torch.inf


def _best_of_tile(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of each row and their scores, by (score descending, column ascending)."""
    # One candidate more than asked for shows whether a tie crosses the boundary.
    candidates, columns = torch.topk(scores, min(k + 1, scores.shape[1]))
    kth = candidates[:, k - 1]
    columns = columns[:, :k]
    if candidates.shape[1] > k:
        tied = (kth == candidates[:, k]).nonzero().squeeze(1)
        if len(tied):
            columns[tied] = _mend(scores[tied], kth[tied, None], k)

    columns = columns.sort(dim=1).values
    # Adding 0.0 makes -0.0 the same key as 0.0 for sorts that compare bits.
    best, order = (scores.gather(1, columns) + 0.0).sort(dim=1, descending=True, stable=True)
    return columns.gather(1, order), best


def _mend(scores: Tensor, kth: Tensor, k: int) -> Tensor:
    """Columns above the k-th score and, to fill up to k, the first of those that equal it; (C, k)."""
    above = scores > kth
    level = scores == kth
    places_left = k - above.sum(dim=1, keepdim=True, dtype=torch.int32)
    chosen = above.logical_or_(level.logical_and_(level.cumsum(1, dtype=torch.int32) <= places_left))
    return chosen.nonzero()[:, 1].view(-1, k)


def join(best: TopK, tile: Tile, columns: Tensor, scores: Tensor) -> None:
    """Keep the K best of those so far, whose items are the smaller ones, and those of the tile."""
    items = tile.items(columns).masked_fill_(scores == -torch.inf, -1)
    joined, order = torch.cat([best.scores, scores], dim=1).sort(dim=1, descending=True, stable=True)
    k = best.scores.shape[1]
    best.scores.copy_(joined[:, :k])
    best.items.copy_(torch.cat([best.items, items], dim=1).gather(1, order[:, :k]))
