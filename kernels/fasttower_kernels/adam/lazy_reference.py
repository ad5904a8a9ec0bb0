"""Dense Adam at the cost of the rows that have gradients, in plain torch.

Adam moves a row without a gradient too: its moments decay, and it drifts on along its first moment. That
motion depends on nothing but the row, so it can wait until the row is read again. With m and v the moments
of a row after update n, each of the next g updates without a gradient, k = 1 .. g, takes

    learning_rate / (1 - beta_1**(n + k)) * beta_1**k * m
        / (sqrt(v) * beta_2**(k / 2) / sqrt(1 - beta_2**(n + k)) + epsilon)

from the parameters, and leaves the moments at beta_1**g * m and beta_2**g * v. The terms fall like beta_1**k:
those after the 200th are below a float32's rounding, and left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttower_kernels.adam.reference import BETA_1, BETA_2, EPSILON, adam_step
from fasttower_kernels.tables import Tables

MOST_REPLAYED = 200
"""Updates without a gradient that move a row; 0.9**200 is 7e-10."""

# Of the sums that move rows, so many are held at a time.
_TERMS = 1 << 22


def catch_up(
    parameters: Tables,
    moments_1: Tables,
    moments_2: Tables,
    last: Sequence[Tensor],
    rows: Sequence[Tensor],
    *,
    count: int,
    learning_rate: float,
) -> None:
    """Bring rows to where dense Adam has them after update ``count``: they had no gradient since their last.

    Args:
        parameters: changed in place.
        moments_1: likewise.
        moments_2: likewise.
        last: int64, for each array of the tables and each of its rows the update that it has seen last;
            changed in place.
        rows: int64, for each array its rows to bring up to date, each once.
        count: of the last update, from 1; 0 before the first.
        learning_rate: the step size.
    """
    for p, m, v, seen, chosen in zip(parameters, moments_1, moments_2, last, rows, strict=True):
        waiting = chosen[seen[chosen] < count]
        columns = p[0].numel()
        for some in waiting.split(max(1, _TERMS // (MOST_REPLAYED * columns))) if len(waiting) else ():
            gap = (count - seen[some])[:, None].cpu().double()  # [R, 1]; not every device has float64
            first, root = (table[some].view(-1, 1, columns) for table in (m, v))  # [R, 1, P]
            root = root.sqrt()
            k = torch.arange(1, min(MOST_REPLAYED, int(gap.max())) + 1)
            n = (count - gap + k).clamp(max=count)  # [R, K]
            factor = torch.where(k <= gap, learning_rate * BETA_1**k / (1 - BETA_1**n), 0)
            spread = BETA_2 ** (k / 2) / (1 - BETA_2**n).sqrt()
            factor, spread = (scalars.to(p)[:, :, None] for scalars in (factor, spread))
            moved = (factor * first / (root * spread + EPSILON)).sum(1)  # [R, P]
            p[some] -= moved.view(p[some].shape)
            for table, beta in ((m, BETA_1), (v, BETA_2)):
                table[some] *= (beta**gap).to(p).view(-1, *(1,) * (p.ndim - 1))
        seen[chosen] = count


def lazy_adam_step(
    parameters: Tables,
    gradients: Tables,
    moments_1: Tables,
    moments_2: Tables,
    last: Sequence[Tensor],
    rows: Sequence[Tensor],
    *,
    count: int,
    learning_rate: float,
) -> None:
    """`adam_step` of some rows, those that have gradients.

    Args:
        parameters: changed in place.
        gradients: zero outside the rows; zeroed.
        moments_1: changed in place.
        moments_2: likewise.
        last: as in `catch_up`; of the rows it is ``count - 1``, and becomes ``count``.
        rows: as in `catch_up`.
        count: of this update, from 1.
        learning_rate: the step size.
    """
    whole = (parameters, gradients, moments_1, moments_2)
    taken = [Tables(*(a[chosen] for a, chosen in zip(tables, rows, strict=True))) for tables in whole]
    adam_step(*taken, count=count, learning_rate=learning_rate)
    for tables, updated in zip(whole, taken, strict=True):
        for array, chosen, values in zip(tables, rows, updated, strict=True):
            array[chosen] = values
    for seen, chosen in zip(last, rows, strict=True):
        seen[chosen] = count
