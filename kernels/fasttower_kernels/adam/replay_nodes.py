"""The updates that a row missed, summed with a few terms instead of up to `MOST_REPLAYED`.

With n the number of a row's last update, the g updates without a gradient after it take from its parameters

    sum over k = 1 .. g of  learning_rate * beta_1**k / (1 - beta_1**(n + k)) * m
        / (sqrt(v) / sqrt(beta_2**-k * (1 - beta_2**(n + k))) + epsilon)

(see `lazy_reference`), where beta_2**-k * (1 - beta_2**(n + k)) = (1 - beta_2**n) + (beta_2**-k - 1). From
n = `MOST_REPLAYED` on, 1 - beta_1**(n + k) is 1 to a float32's rounding. What is left beside the weights
beta_1**k hardly changes with k, since beta_2 is near 1: it is nearly a polynomial of low degree. The Gauss
rule of `NODES` nodes for these weights gives the sum of any polynomial of degree 2 * `NODES` - 1 exactly, and
this one with a relative error below 5e-9 (a test tries all g), a tenth of a float32's rounding.

Source: Golub and Welsch, "Calculation of Gauss quadrature rules" (Mathematics of Computation 23, 1969).
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from fasttower_kernels.adam.lazy_reference import MOST_REPLAYED
from fasttower_kernels.adam.reference import BETA_1, BETA_2

NODES = 3


@cache
def replay_nodes() -> Tensor:
    """The terms of the sums: (`MOST_REPLAYED` * (1 + `NODES`), 2), float32, on the CPU.

    A row is ``beta_2**-k - 1`` and the weight of that k. First come the terms themselves, k = 1 up to
    `MOST_REPLAYED` with the weight ``beta_1**k``, for rows whose last update was before number
    `MOST_REPLAYED`. Then for each g from 1 to `MOST_REPLAYED` the `NODES` nodes of the sum up to g; for a g
    below `NODES` they are its terms, and nodes of weight 0.
    """
    k = torch.arange(1, MOST_REPLAYED + 1, dtype=torch.float64)
    weights = BETA_1**k
    nodes, node_weights = [k], [weights]
    for g in range(1, MOST_REPLAYED + 1):
        if g < NODES:
            nodes.append(k[:NODES])
            node_weights.append(torch.where(k[:NODES] <= g, weights[:NODES], 0))
        else:
            for part, some in zip((nodes, node_weights), _gauss_rule(k[:g], weights[:g]), strict=True):
                part.append(some)
    growth = torch.expm1(torch.cat(nodes) * -math.log(BETA_2))
    return torch.stack([growth, torch.cat(node_weights)], dim=1).float()


def _gauss_rule(points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights whose sum is that of the weighted points for polynomials of degree 2 * NODES - 1."""
    diagonal, off_diagonal = [], []
    before, polynomial = torch.zeros_like(points), torch.ones_like(points)
    square_before = square = weights.sum()
    for degree in range(NODES):
        # The recurrence of the orthogonal polynomials of the weights.
        centre = (weights * points * polynomial**2).sum() / square
        diagonal.append(centre)
        if degree:
            off_diagonal.append((square / square_before).sqrt())
        ratio = square / square_before if degree else 0
        before, polynomial = polynomial, (points - centre) * polynomial - ratio * before
        square_before, square = square, (weights * polynomial**2).sum()
    sides = torch.stack(off_diagonal)
    jacobi = torch.diag(torch.stack(diagonal)) + torch.diag(sides, 1) + torch.diag(sides, -1)
    nodes, vectors = torch.linalg.eigh(jacobi)
    return nodes, weights.sum() * vectors[0] ** 2
