"""Recommenders to compare with: EASE, ItemKNN, and implicit's ALS and BPR.

Each is a function of a training matrix and its settings, and returns a `Ranker`, which gives users their best
items. `PEERS` says where the search for each one's settings begins; `benchmarks.selection` searches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.topk import top_k

Floats: TypeAlias = NDArray[np.float32]

MOST_DENSE_ITEMS = 8_000
"""Items up to which EASE inverts their Gram matrix; of more, it solves for the users that are asked for."""

MOST_FACTORS = 256
"""Of a model of implicit's: twice as many as fasttower has by default, and no more."""

BLOCK = 128
"""Right-hand sides that are solved for together, and users that are scored together."""


class Ranker(Protocol):
    """What ranks the catalogue for users."""

    def top(self, users: torch.Tensor, k: int, seen: KnownPositives) -> torch.Tensor:
        """The K best items of each user, seen ones left out.

        Returns:
            (R, K), best first, the smaller index where scores are equal; -1 where there are no more.
        """


class Factors(NamedTuple):
    """A model of dot products. BPR's item bias is a column of the factors.

    Attributes:
        users: (U, D), float32.
        items: (I, D), float32.
    """

    users: torch.Tensor
    items: torch.Tensor

    @staticmethod
    def of(model: Any) -> Factors:
        """Views of the arrays of a model of implicit's."""
        return Factors(torch.from_numpy(model.user_factors), torch.from_numpy(model.item_factors))

    def top(self, users: torch.Tensor, k: int, seen: KnownPositives) -> torch.Tensor:
        """See `Ranker.top`."""
        return top_k(self.users[users], self.items, k=k, seen=seen, seen_users=users).items


class Scores(NamedTuple):
    """A model that scores every item of a user; -inf for items that it does not recommend.

    Attributes:
        of: users (R,) to scores (R, I), float32, which may be overwritten.
    """

    of: Callable[[NDArray[np.int64]], Floats]

    def top(self, users: torch.Tensor, k: int, seen: KnownPositives) -> torch.Tensor:
        """See `Ranker.top`."""
        return torch.cat([self._top(block, k, seen) for block in users.split(BLOCK)])

    def _top(self, users: torch.Tensor, k: int, seen: KnownPositives) -> torch.Tensor:
        scores = torch.from_numpy(self.of(users.numpy()))
        for row, user in enumerate(users.tolist()):
            scores[row, seen.items[seen.indptr[user] : seen.indptr[user + 1]]] = -torch.inf
        # Keys without ties: the bits of the score, in its order, before the bits of the item.
        bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
        items = torch.arange(scores.shape[1])
        best = (ordered * 2**32 - items).topk(min(k, scores.shape[1])).indices
        return torch.where(scores.gather(1, best) > -torch.inf, best, -1)


def ease(matrix: csr_matrix, *, l2: float) -> Ranker:
    """Scores ``X (I - P / diag(P))`` with ``P = (X'X + l2)^-1``, X the users' rows.

    Of a large catalogue P is never made: its diagonal and the users' ``X P`` are found by conjugate
    gradients, with relative errors of 1e-4 and 1e-3.

    Source: Steck, "Embarrassingly Shallow Autoencoders for Sparse Data" (WWW 2019), equation 8.
    """
    transposed = matrix.T.tocsr()
    num_items = matrix.shape[1]
    if num_items <= MOST_DENSE_ITEMS:
        gram = (transposed @ matrix).toarray().astype(np.float64)
        gram[np.diag_indices(num_items)] += l2
        inverse = scipy.linalg.inv(gram, overwrite_a=True, assume_a="pos")
        weights = (-inverse / np.diag(inverse)).astype(np.float32)
        weights[np.diag_indices(num_items)] = 0
        return Scores(lambda users: matrix[users] @ weights)

    diagonal = np.empty(num_items, np.float32)
    for first in range(0, num_items, BLOCK):
        items = np.arange(first, min(first + BLOCK, num_items))
        units = np.zeros((num_items, len(items)), np.float32)
        units[items, items - first] = 1
        # The error of a diagonal element is of the order of the residual's square.
        diagonal[items] = solve(matrix, transposed, l2, units, 1e-2)[items, items - first]

    def of(users: NDArray[np.int64]) -> Floats:
        rows = matrix[users].toarray()
        return rows - solve(matrix, transposed, l2, np.ascontiguousarray(rows.T), 1e-3).T / diagonal

    return Scores(of)


def solve(matrix: csr_matrix, transposed: csr_matrix, l2: float, right: Floats, tolerance: float) -> Floats:
    """``(X'X + l2)^-1 right`` by conjugate gradients, (I, C), each column to a relative residual.

    Source: Saad, "Iterative Methods for Sparse Linear Systems" (2003), algorithm 6.18.
    """
    solution, residual, direction = np.zeros_like(right), right.copy(), right.copy()
    square = np.einsum("ic,ic->c", residual, residual)
    enough = np.maximum(tolerance**2 * square, np.finfo(np.float32).tiny)
    while (square > enough).any():
        image = transposed @ (matrix @ direction)
        image += l2 * direction
        curvature = np.maximum(np.einsum("ic,ic->c", direction, image), np.finfo(np.float32).tiny)
        step = square / curvature
        solution += step * direction
        residual -= step * image
        before, square = square, np.einsum("ic,ic->c", residual, residual)
        direction *= square / np.maximum(before, np.finfo(np.float32).tiny)
        direction += residual
    return solution


def item_knn(matrix: csr_matrix, *, neighbours: int, shrink: float) -> Ranker:
    """Scores an item by the similarity of its nearest neighbours among the user's items.

    The similarity of items with n and m users, c of them in common, is ``c / (sqrt(n m) + shrink)``; of each
    item the nearest others are kept. An item without any of the user's items among them is not recommended.

    Source: Ferrari Dacrema et al., "Are We Really Making Much Progress?" (RecSys 2019), section 3.1, with the
        shrink term of Bell and Koren (ICDM 2007).
    """
    common = (matrix.T.tocsr() @ matrix).tocsr()
    sizes = common.diagonal()
    common.setdiag(0)
    common.eliminate_zeros()
    common.sort_indices()
    rows = np.repeat(np.arange(common.shape[0]), np.diff(common.indptr))
    common.data /= np.sqrt(sizes[rows] * sizes[common.indices]) + np.float32(shrink)
    kept = np.zeros(common.nnz, dtype=bool)
    for begin, end in zip(common.indptr[:-1], common.indptr[1:], strict=True):
        nearest = np.argsort(-common.data[begin:end], kind="stable")[:neighbours]
        kept[begin + nearest] = True
    pairs = rows[kept], common.indices[kept]
    similarities = csr_matrix((common.data[kept], pairs), shape=common.shape).T.tocsr()

    def of(users: NDArray[np.int64]) -> Floats:
        scores = (matrix[users] @ similarities).toarray()
        scores[scores == 0] = -np.inf
        return scores

    return Scores(of)


After: TypeAlias = Callable[[int, Ranker], bool]
"""Told the number of iterations done and the model as it is; True ends the training."""


def als(
    matrix: csr_matrix, *, iterations: int, seed: int, after: After | None = None, **settings: Any
) -> Ranker:
    """Alternating least squares, by implicit on one thread.

    Source: Hu, Koren and Volinsky, "Collaborative Filtering for Implicit Feedback Datasets" (ICDM 2008).
    """
    from implicit.cpu.als import AlternatingLeastSquares

    model = AlternatingLeastSquares(**settings, iterations=iterations, num_threads=1, random_state=seed)
    return _trained(model, matrix, after)


def bpr(
    matrix: csr_matrix, *, iterations: int, seed: int, after: After | None = None, **settings: Any
) -> Ranker:
    """Bayesian personalised ranking, by implicit on one thread.

    Source: Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback" (UAI 2009).
    """
    from implicit.cpu.bpr import BayesianPersonalizedRanking

    model = BayesianPersonalizedRanking(**settings, iterations=iterations, num_threads=1, random_state=seed)
    return _trained(model, matrix, after)


class _Enough(Exception):  # noqa: N818 - it is not an error
    """Ends the training of a model of implicit's."""


def _trained(model: Any, matrix: csr_matrix, after: After | None) -> Factors:
    def callback(iteration: int, *_: Any) -> None:
        if after is not None and after(iteration + 1, Factors.of(model)):
            raise _Enough

    with contextlib.suppress(_Enough):
        model.fit(matrix, show_progress=False, callback=callback)
    return Factors.of(model)


@dataclass(frozen=True)
class Peer:
    """A recommender and what of it is searched for.

    Attributes:
        fit: makes a `Ranker` of a matrix and settings.
        grid: coarse values of each setting, with which the search begins.
        most: the largest values of settings that have one.
        most_iterations: up to which it is trained, and after which it may be scored; None for a model that is
            found in one go, which takes no seed either.
    """

    fit: Callable[..., Ranker]
    grid: Mapping[str, Sequence[float]]
    most: Mapping[str, float] = field(default_factory=dict)
    most_iterations: int | None = None


PEERS = {
    "EASE": Peer(ease, {"l2": (256.0,)}),
    "ItemKNN": Peer(item_knn, {"neighbours": (16, 256), "shrink": (4.0, 64.0)}),
    "implicit ALS": Peer(
        als,
        {"factors": (16, 64), "regularization": (1.0, 16.0, 128.0), "alpha": (1.0, 4.0, 16.0)},
        {"factors": MOST_FACTORS},
        16,
    ),
    "implicit BPR": Peer(
        bpr,
        {"factors": (8, 32), "regularization": (1 / 32, 1 / 8), "learning_rate": (1 / 128, 1 / 32)},
        {"factors": MOST_FACTORS},
        96,
    ),
}
