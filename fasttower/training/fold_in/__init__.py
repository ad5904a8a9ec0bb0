"""Vectors of users who were not there at training, from what they touched and the items as they are.

With the items fixed, a user's part of the training loss is a small convex problem of its own once the
negatives are replaced by their expectation: each loss has its file here. The user's L2 term is added; with
cosine similarity the vector stays on the sphere of radius 1 / temperature, on which L2 has no say. Newton's
method gets there in a handful of steps, all users of a chunk at once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fasttower.errors import FastTowerError
from fasttower.training.fold_in.bce import BCE
from fasttower.training.fold_in.bpr import BPR
from fasttower.training.fold_in.items import ChunkItems
from fasttower.training.fold_in.newton import Objective, minimise
from fasttower.training.fold_in.softmax import Softmax
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.settings import LossName, LossSettings

_PROBLEMS: dict[LossName, type[BCE] | type[BPR] | type[Softmax]] = {
    "bce": BCE,
    "gbce": BCE,
    "bpr": BPR,
    "softmax": Softmax,
}

_CHUNK_USERS = 1024  # share the outer products of the items' vectors
_LEAST_L2 = 1e-4  # without any, a user whose items the vectors can tell apart would have no finite optimum


@torch.no_grad()
def fold_in(
    touched: KnownPositives,
    item_vectors: Tensor,
    item_bias: Tensor | None,
    loss: LossSettings,
    negatives: Negatives,
) -> Tensor:
    """The vectors that the training loss is least for, on the mean over the negatives, with the items fixed.

    Takes D^2 / 2 multiplications for each user, item and step of some six (BPR: for each touched item too);
    its memory is bounded.

    Args:
        touched: the items of each of the R users.
        item_vectors: (I, D), float32, as the logit reads them: normalised with cosine similarity.
        item_bias: (I,), float32, or None.
        loss: that the item vectors were trained with; a user L2 below 1e-4 counts as 1e-4.
        negatives: that they were trained with. Where known positives are left out there, a new user's touched
            items are here. Of more than 65,536 items, a fixed sample of this size stands for those that may
            be negatives.

    Returns:
        (R, D), float32, on the items' device, as the logit reads them. A user who touched nothing gets zeros,
        which leave the bias.

    Raises:
        FastTowerError: the negatives were hard ones, whose expectation depends on the vector.
    """
    if negatives.settings.pool:
        raise FastTowerError(
            "the run was trained with hard negatives (a pool of "
            f"{negatives.settings.pool}), under which a new user's problem has no closed form: update the "
            "run with the user's rows, or train without a pool."
        )
    device = item_vectors.device
    bias = torch.zeros(len(item_vectors), device=device) if item_bias is None else item_bias
    vectors = torch.zeros((touched.num_users, item_vectors.shape[1]), device=device)
    for begin in range(0, touched.num_users, _CHUNK_USERS):
        users = torch.arange(begin, min(begin + _CHUNK_USERS, touched.num_users), device=device)
        users = users[touched.degrees[users] > 0]
        if not len(users):
            continue
        items = ChunkItems(touched, users, item_vectors, bias, negatives)
        problem = _PROBLEMS[loss.name](items, loss, negatives)
        if loss.is_cosine:
            start = vectors[users].index_add_(0, items.row, items.vectors[items.place])
            start = normalize(start + 1e-6, dim=1) / loss.temperature  # no user at 0
            vectors[users] = minimise(problem, start, on_sphere=True)
        else:
            vectors[users] = minimise(_with_l2(problem, loss.user_l2), vectors[users], on_sphere=False)
    return vectors


def _with_l2(problem: Objective, l2: float) -> Objective:
    """A problem with the user's L2 term."""
    weight = max(l2, _LEAST_L2)

    def objective(users: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, gradient, hessian = problem(users)
        hessian.diagonal(dim1=1, dim2=2).add_(2 * weight)
        return value + weight * users.square().sum(1), gradient + 2 * weight * users, hessian

    return objective
