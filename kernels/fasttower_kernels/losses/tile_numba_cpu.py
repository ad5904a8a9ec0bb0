"""What a loss reads and writes, for a tile of positives, and the sweep that three of the losses are made of.

The logits of a tile lie row by row: row 0 of ``x`` those of its positives, the next rows their negatives, so
that ``x[k * TILE + w]`` is the logit of row k and positive w. Negatives come in chunks of any size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fasttower_kernels.compiled import FAST, OPTIONS, Array, float32, njit, uint64
from fasttower_kernels.negatives.numba_cpu import TILE
from fasttower_kernels.vector_math import exp_negative, log1p_positive

_LOGARITHM = 64
"""Rows whose logarithms are taken at once: a product of so many numbers from 1 to 2 is far from overflow."""


class LossTile(NamedTuple):
    """Arrays (TILE,), float32, of what a loss knows of each positive besides its logits.

    Attributes:
        weight: what slopes are multiplied by; 0 where the positive doesn't count.
        beta: weight of the positive's term, for gbce.
        maximum: the largest logit up to now.
        total: bpr: the sum of the negatives' slopes up to now. softmax: the sum of ``exp(x - maximum)`` over
            the negatives up to now.
        value: the loss of this chunk, not multiplied by the weight.
        product: scratch.
    """

    weight: Array
    beta: Array
    maximum: Array
    total: Array
    value: Array
    product: Array


@njit(**OPTIONS)
def new_tile() -> Any:
    """A tile whose positives all have beta 1."""
    return LossTile(
        np.empty(TILE, dtype=np.float32),
        np.ones(TILE, dtype=np.float32),
        np.empty(TILE, dtype=np.float32),
        np.empty(TILE, dtype=np.float32),
        np.empty(TILE, dtype=np.float32),
        np.empty(TILE, dtype=np.float32),
    )


@njit(**OPTIONS)
def begin_tile(x: Array, tile: Any) -> None:
    """Forget the last tile; call it when row 0 has its logits and before the first chunk."""
    for w in range(uint64(TILE)):
        tile.maximum[w] = x[w]
        tile.total[w] = float32(0)


@njit(fastmath=FAST, **OPTIONS)
def softplus_rows(x: Array, begin: int, end: int, tile: Any) -> None:
    """Replace z in rows begin .. end - 1 by ``weight * sigmoid(z)``; write the sum of ``softplus(z)``.

    softplus(z) = max(z, 0) + log(1 + e**-|z|). The logarithms of a positive are taken at once, of the product
    of its 1 + e**-|z|.
    """
    weight, value, product = tile.weight, tile.value, tile.product
    size = uint64(TILE)
    for w in range(size):
        value[w] = float32(0)
    for first in range(begin, end, uint64(_LOGARITHM)):
        for w in range(size):
            product[w] = float32(0)  # less 1
        for k in range(first, min(end, first + uint64(_LOGARITHM))):
            for w in range(size):
                z = x[k * size + w]
                e = exp_negative(-abs(z))
                value[w] += float32(0) if z < float32(0) else z
                product[w] += e + e * product[w]
                r = weight[w] / (float32(1) + e)
                x[k * size + w] = e * r if z < float32(0) else r
        for w in range(size):
            value[w] += log1p_positive(product[w])
