"""Top-K by tiled matmul and ``torch.topk``, with ties broken by the smaller item index, exactly."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.topk.tiles import Catalogue, Tile

# One score of a tile is 4 bytes; mending a tied row needs a copy, a running count and three masks beside it.
_BYTES_PER_SCORE = 16
# The bias of an item and its mask; a gathered vector comes on top.
_BYTES_PER_COLUMN = 16
# The K best of the tile and those so far, as scores and items, before and after they are sorted together.
_BYTES_PER_BEST = 64
# Leaving out one seen item takes its number, its row, its column, and which of those are in the tile.
_BYTES_PER_SEEN = 48
_MOST_COLUMNS = 1 << 16
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
    rows, columns = _tile_shape(catalogue, k, budget_bytes)
    buffer = torch.empty(min(rows, len(user_vectors)) * columns, device=user_vectors.device)
    for begin in range(0, len(user_vectors), rows):
        some = slice(begin, begin + rows)
        users = user_vectors[some]
        best = TopK(found.items[some], found.scores[some])
        for first in range(0, len(catalogue), columns):
            tile = catalogue.tile(first, first + columns)
            shape = len(users), len(tile.vectors)
            scores = torch.mm(users, tile.vectors.T, out=buffer[: math.prod(shape)].view(shape))  # [C, W]
            if tile.bias is not None:
                scores += tile.bias
            if seen is not None and seen_users is not None:
                most = max(_FEWEST_SEEN, scores.numel() * _BYTES_PER_SCORE // (2 * _BYTES_PER_SEEN))
                _leave_out_seen(scores, tile, seen, seen_users[some], most)
            _join(best, tile, *_best_of_tile(scores, min(k, scores.shape[1])))
    return found


def _tile_shape(catalogue: Catalogue, k: int, budget_bytes: int) -> tuple[int, int]:
    """Users and items of a tile; what one user and the items alone take is half the budget at most."""
    gathered = 0 if catalogue.index is None else 4 * catalogue.vectors.shape[1]
    per_column = _BYTES_PER_COLUMN + gathered
    fitting = budget_bytes // (2 * (_BYTES_PER_SCORE + per_column))
    columns = max(1, min(len(catalogue), _MOST_COLUMNS, max(_FEWEST_COLUMNS, fitting)))
    rows = (budget_bytes - per_column * columns) // (_BYTES_PER_SCORE * columns + _BYTES_PER_BEST * k)
    return max(1, rows), columns


def _leave_out_seen(scores: Tensor, tile: Tile, seen: KnownPositives, users: Tensor, most: int) -> None:
    """Set the scores of each user's seen items to -inf; so many seen items at most are looked at together."""
    begin = seen.indptr[users]  # [C]
    degree = seen.indptr[users + 1] - begin
    end = degree.cumsum(0)
    shift = begin - end + degree  # from the number of an entry among those of all users to its place
    total = int(end[-1])
    width = len(tile.vectors)
    for first in range(0, total, most):
        entry = torch.arange(first, min(first + most, total), device=scores.device)
        row = torch.searchsorted(end, entry, right=True)
        item = seen.items[entry + shift[row]].long()
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


def _join(best: TopK, tile: Tile, columns: Tensor, scores: Tensor) -> None:
    """Keep the K best of those so far, whose items are the smaller ones, and those of the tile."""
    items = tile.items(columns).masked_fill_(scores == -torch.inf, -1)
    joined, order = torch.cat([best.scores, scores], dim=1).sort(dim=1, descending=True, stable=True)
    k = best.scores.shape[1]
    best.scores.copy_(joined[:, :k])
    best.items.copy_(torch.cat([best.items, items], dim=1).gather(1, order[:, :k]))
