"""Top-K from scores of reduced precision, with a proof for each user that nothing better was overlooked.

The tiles' scores are matmuls of rounded factors. More than K items a user are kept by them and scored again
in float32, and the K best of these are the result where no other item can have a float32 score as large as
the K-th: where ``K-th float32 score > worst kept score + error``. Elsewhere the user is scored again in
float32 throughout. So the result is that of float32 up to float32's own rounding, always.

With u' and v' for the rounded factors, the error of an item's score u.v + b is at most

    |u - u'| |v| + |u'| |v - v'|            of the factors, by what rounding really dropped of them
    + a multiple of D 2^-24 (|u'| |v'| + |b|)   of sums in float32, for this score and for the float32 one
    + 2^-8 |score|, once or twice           of the score itself, where it is written in bfloat16

with the largest |v|, |v - v'| and |b| of the catalogue. Sums on tensor cores are not rounded to nearest but
cut off, term by term (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores", PeerJ CS 7:e330): the
multiple has room for that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.topk.precision import Scoring, multiply, rounded
from fasttower_kernels.topk.reference import (
    BYTES_PER_BEST,
    SeenEntries,
    TopK,
    join,
    tile_shape,
    top_k_torch,
)
from fasttower_kernels.topk.tiles import Catalogue

_FEWEST_SPARE = 32
"""Items kept beyond the K best, and half of K where that is more; measured."""

# Of a vector's value: its rounded form, that widened, and the difference between the two.
_BYTES_PER_FACTOR = 12

_BFLOAT16_UNIT = 2.0**-8


def top_k_certified(
    user_vectors: Tensor,
    catalogue: Catalogue,
    *,
    k: int,
    seen: KnownPositives | None,
    seen_users: Tensor | None,
    budget_bytes: int,
    scoring: Scoring,
) -> TopK:
    """Plain torch in reduced precision; see `fasttower_kernels.topk.top_k`, which checks the arguments."""
    kept = k + spare(k)
    if kept >= len(catalogue):  # all would be scored in float32
        return top_k_torch(
            user_vectors, catalogue, k=k, seen=seen, seen_users=seen_users, budget_bytes=budget_bytes
        )
    found = TopK.empty(len(user_vectors), k, user_vectors.device)
    dim = user_vectors.shape[1]
    rows, columns = tile_shape(
        catalogue,
        budget_bytes,
        per_row=(BYTES_PER_BEST + 4 * dim) * kept + _BYTES_PER_FACTOR * dim,
        per_column=_BYTES_PER_FACTOR * dim,
    )
    for begin in range(0, len(user_vectors), rows):
        some = slice(begin, begin + rows)
        users, whose = user_vectors[some], None if seen_users is None else seen_users[some]
        best = TopK(found.items[some], found.scores[some])
        rest = _search(users, catalogue, best, kept, seen, whose, columns, scoring)
        if len(rest):
            users = users[rest]
            best.items[rest], best.scores[rest] = top_k_torch(
                users,
                catalogue,
                k=k,
                seen=seen,
                seen_users=None if whose is None else whose[rest],
                budget_bytes=budget_bytes - users.nbytes,
            )
    return found


def spare(k: int) -> int:
    """How many items are kept beyond the K best."""
    return max(_FEWEST_SPARE, k // 2)


def _search(
    users: Tensor,
    catalogue: Catalogue,
    best: TopK,
    kept: int,
    seen: KnownPositives | None,
    seen_users: Tensor | None,
    columns: int,
    scoring: Scoring,
) -> Tensor:
    """Fill in ``best`` (C, K); returns the rows (n,), int64, for which it is not proved to be right."""
    hidden = None if seen is None or seen_users is None else SeenEntries.of(seen, seen_users)
    items, outside = _keep(users, catalogue, kept, hidden, columns, scoring)
    best.items[:], best.scores[:] = _score_again(users, catalogue, items, best.items.shape[1])
    # An item outside with the K-th's score might have the smaller index; a bound that is NaN proves nothing.
    proved = (best.scores[:, -1] > outside) | (outside == -torch.inf)
    return proved.logical_not_().nonzero().squeeze(1)


def _keep(
    users: Tensor, catalogue: Catalogue, kept: int, hidden: SeenEntries | None, columns: int, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """The items with the best scores in reduced precision, and what float32 may give the others.

    Args:
        users: (C, D), float32.
        catalogue: J items.
        kept: H, fewer than J.
        hidden: the seen items of these users.
        columns: of a tile.
        scoring: the precision.

    Returns:
        Items (C, H), int32, -1 where none is left; and (C,), float32, what the float32 score of any other
        item is at most: -inf where no other may be given, NaN where nothing is known.
    """
    factors = rounded(users, scoring)
    buffer = torch.empty(len(users) * columns, dtype=factors.dtype, device=users.device)
    best = TopK.empty(len(users), kept, users.device)
    longest, most_lost = users.new_zeros(2)
    for first in range(0, len(catalogue), columns):
        tile = catalogue.tile(first, first + columns)
        vectors = rounded(tile.vectors, scoring)
        shape = len(users), len(vectors)
        scores = buffer[: math.prod(shape)].view(shape)  # [C, W]
        multiply(factors, vectors.T, scoring, out=scores)
        if tile.bias is not None:
            scores += tile.bias
        if hidden is not None:
            hidden.leave_out(scores, tile)
        values, places = scores.topk(min(kept, len(vectors)), sorted=False)
        join(best, tile, places, values.float())
        length, lost = _lengths(tile.vectors, vectors)
        longest, most_lost = torch.maximum(longest, length.max()), torch.maximum(most_lost, lost.max())

    bias = users.new_zeros(())
    if catalogue.bias is not None:
        bias = torch.stack(catalogue.bias.aminmax()).abs().max()
    highest = best.scores[:, -1]
    if scoring == "bfloat16":
        highest = _before_rounding(highest)
        if catalogue.bias is not None:  # rounded before it was added, too
            highest = _before_rounding(highest) + _BFLOAT16_UNIT * bias
    return best.items, highest + _error(*_lengths(users, factors), longest, most_lost, bias, users.shape[1])


def _lengths(vectors: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Upper bounds of the vectors' lengths |v| and of what rounding dropped, |v - v'|; both (n,)."""
    dim = vectors.shape[1]
    # The one term is the rounding of the sum of squares, the other what squares and hardware that takes
    # subnormal factors for zeros may lose.
    relative, absolute = 1 + (dim + 8) * 2.0**-23, math.sqrt(dim) * 2.0**-62
    length, lost = (torch.linalg.vector_norm(x, dim=1) for x in (vectors, vectors - factors.float()))
    return length * relative + absolute, lost * relative + absolute


def _error(
    length: Tensor, lost: Tensor, longest: Tensor, most_lost: Tensor, bias: Tensor, dim: int
) -> Tensor:
    """What the score in reduced precision, before it is written, may lack to the float32 score; (C,).

    Args:
        length: (C,): |u|.
        lost: (C,): |u - u'|.
        longest: the largest |v|.
        most_lost: the largest |v - v'|.
        bias: the largest |b|.
        dim: D.
    """
    of_factors = lost * longest + (length + lost) * most_lost
    # Infinite where a sum may overflow; nothing is certified then.
    reach = 2 * ((length + lost) * (longest + most_lost) + bias)
    return of_factors + reach * ((dim + 8) * 2.0**-22) + dim * 2.0**-120


def _before_rounding(scores: Tensor) -> Tensor:
    """The largest value that bfloat16 may have rounded to each score or less."""
    return torch.maximum(scores * (1 + _BFLOAT16_UNIT), scores * (1 - _BFLOAT16_UNIT))


def _score_again(users: Tensor, catalogue: Catalogue, items: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The K best of each user's items (C, H), by (float32 score descending, item ascending), with scores.

    The products are summed without a matmul, whose precision is a setting.
    """
    items = items.sort(dim=1).values
    index = items.clamp(min=0).long()
    scores = catalogue.vectors[index].mul_(users[:, None]).sum(-1)  # [C, H, D] -> [C, H]
    if catalogue.bias is not None:
        scores += catalogue.bias[index]
    # Adding 0.0 makes 0.0 of -0.0.
    scores = (scores + 0.0).masked_fill_(items < 0, -torch.inf)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return items.gather(1, order[:, :k]), scores[:, :k]
