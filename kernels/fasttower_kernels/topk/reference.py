"""Top-K by chunked matmul and ``torch.topk``, with ties broken by the smaller item index, exactly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasttower_kernels.known_positives import KnownPositives

# One score of a chunk is 4 bytes; mending a tied row needs a copy, a running count and three masks beside it.
BYTES_PER_SCORE = 16


class TopK(NamedTuple):
    """The K best items of each user, best first."""

    items: Tensor
    """(R, K), int32: item indices; -1 where there are no more, always at the end of a row."""
    scores: Tensor
    """(R, K), float32: the items' scores, never increasing along a row; -inf where the item is -1."""


@torch.no_grad()
def top_k_torch(
    user_vectors: Tensor,
    item_vectors: Tensor,
    *,
    k: int,
    item_bias: Tensor | None,
    seen: KnownPositives | None,
    seen_users: Tensor | None,
    chunk_bytes: int,
) -> TopK:
    """Plain torch; see `fasttower_kernels.topk.top_k`, which checks the arguments."""
    num_users, num_items = len(user_vectors), len(item_vectors)
    device = user_vectors.device
    items = torch.full((num_users, k), -1, dtype=torch.int32, device=device)
    scores = torch.full((num_users, k), -torch.inf, dtype=torch.float32, device=device)
    if num_users == 0 or num_items == 0:
        return TopK(items, scores)

    rows_per_chunk = min(num_users, max(1, chunk_bytes // (BYTES_PER_SCORE * num_items)))
    buffer = torch.empty((rows_per_chunk, num_items), dtype=torch.float32, device=device)
    for start in range(0, num_users, rows_per_chunk):
        stop = min(start + rows_per_chunk, num_users)
        chunk = buffer[: stop - start]  # [C, I]
        if item_bias is None:
            torch.mm(user_vectors[start:stop], item_vectors.T, out=chunk)
        else:
            torch.addmm(item_bias, user_vectors[start:stop], item_vectors.T, out=chunk)
        if seen is not None and seen_users is not None:
            _leave_out_seen(chunk, seen, seen_users[start:stop])
        best, best_scores = _best_of_chunk(chunk, min(k, num_items))
        items[start:stop, : best.shape[1]] = best
        scores[start:stop, : best.shape[1]] = best_scores
    return TopK(items, scores)


def _leave_out_seen(chunk: Tensor, seen: KnownPositives, rows: Tensor) -> None:
    """Set the scores of each user's seen items to -inf, all CSR rows of the chunk at once."""
    begin = seen.indptr[rows]  # [C]
    degree = seen.indptr[rows + 1] - begin
    end = degree.cumsum(0)
    row = torch.repeat_interleave(degree)  # [nnz of the chunk]: 0 degree[0] times, 1 degree[1] times, ...
    entry = torch.arange(len(row), device=chunk.device) + (begin - end + degree)[row]
    chunk[row, seen.items[entry].long()] = -torch.inf


def _best_of_chunk(chunk: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of each row and their scores, by (score descending, column ascending)."""
    # One candidate more than asked for shows whether a tie crosses the boundary.
    candidates, columns = torch.topk(chunk, min(k + 1, chunk.shape[1]))
    kth = candidates[:, k - 1]
    columns = columns[:, :k]
    if candidates.shape[1] > k:
        tied = (kth == candidates[:, k]).nonzero().squeeze(1)
        if len(tied):
            columns[tied] = _mend(chunk[tied], kth[tied, None], k)

    columns = columns.sort(dim=1).values
    # Adding 0.0 makes -0.0 the same key as 0.0 for sorts that compare bits.
    scores, order = (chunk.gather(1, columns) + 0.0).sort(dim=1, descending=True, stable=True)
    items = columns.gather(1, order).int()
    return items.masked_fill_(scores == -torch.inf, -1), scores


def _mend(chunk: Tensor, kth: Tensor, k: int) -> Tensor:
    """Columns above the k-th score and, to fill up to k, the first of those that equal it; (C, k)."""
    above = chunk > kth
    level = chunk == kth
    places_left = k - above.sum(dim=1, keepdim=True, dtype=torch.int32)
    chosen = above.logical_or_(level.logical_and_(level.cumsum(1, dtype=torch.int32) <= places_left))
    return chosen.nonzero()[:, 1].view(-1, k)
