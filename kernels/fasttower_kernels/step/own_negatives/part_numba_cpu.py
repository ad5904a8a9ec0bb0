"""A thread's part of a step with negatives of their own, compiled."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fasttower_kernels.compiled import OPTIONS, Array, njit, uint64
from fasttower_kernels.losses.numba_cpu import TILE
from fasttower_kernels.membership import known_arrays
from fasttower_kernels.negatives.numba_cpu import count_free, draw_tile, redraw_touched
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.philox import Key
from fasttower_kernels.settings import LossSettings
from fasttower_kernels.step.own_negatives.numba_cpu import CHUNK, Sampling, add_batch, sampling_of


class Inputs(NamedTuple):
    """What a part reads besides its positives: known positives, and the settings of the draws."""

    known: Any
    sampling: Sampling


def inputs_of(negatives: Negatives, loss: LossSettings, key: Key, threads: int) -> Inputs:
    """The inputs of the parts of a step."""
    return Inputs(known_arrays(negatives.known_positives), sampling_of(negatives, loss, key))


@njit(**OPTIONS)
def add_part(
    parameters: Any,
    gradients: Any,
    part: Array,
    count: int,
    positives: Array,
    batch_size: int,
    inputs: Any,
    thread: int,
    step: int,
    scales: Any,
    width: int,
    has_bias: bool,
    exclude: bool,
    exact: bool,
    has_l2: bool,
    similarity: str,
    proposal: str,
    loss: str,
    normalised: bool,
) -> float:
    """Add the gradients of a thread's positives; see `add_batch`."""
    return add_batch(
        parameters,
        gradients,
        part,
        count,
        inputs.known,
        inputs.sampling,
        step,
        scales,
        width,
        has_bias,
        exclude,
        exact,
        has_l2,
        similarity,
        proposal,
        loss,
        normalised,
        False,
    )


@njit(**OPTIONS)
def mark_part(
    part: Array,
    count: int,
    positives: Array,
    batch_size: int,
    inputs: Any,
    thread: int,
    threads: int,
    step: int,
    touched_users: Array,
    touched_items: Array,
    exclude: bool,
    exact: bool,
    proposal: str,
) -> None:
    """Mark the users, positives and negatives of a thread's positives: what `add_part` will read.

    The marks are those of `catch_up_rows`. Threads may mark at once: all of them write the same.
    """
    draws, known = inputs.sampling.draws, inputs.known
    positions, users, items_of_part = part[0], part[1], part[2]
    items = np.empty((1 + CHUNK + 3) * TILE, dtype=np.uint32)
    hits = np.empty((1 + CHUNK) * TILE, dtype=np.uint32)
    drawn = np.empty((1 + CHUNK) * TILE, dtype=np.uint32)
    free = np.empty(TILE, dtype=np.uint32)
    for start in range(uint64(0), count, uint64(TILE)):
        here = min(uint64(TILE), count - start)
        for w in range(here):
            touched_users[users[start + w]] = 1
            touched_items[items_of_part[start + w]] = 1
        if exclude:
            count_free(free, users, start, here, draws.num_items, known)
        for first in range(uint64(0), uint64(draws.count), uint64(CHUNK)):
            chunk = min(uint64(CHUNK), uint64(draws.count) - first)
            draw_tile(proposal)(items, positions, start, first, chunk, draws, step)
            if exclude:
                redraw_touched(
                    proposal,
                    items,
                    positions,
                    users,
                    free,
                    start,
                    here,
                    first,
                    chunk,
                    draws,
                    step,
                    known,
                    exact,
                    hits,
                    drawn,
                )
            for k in range(uint64(1), chunk + uint64(1)):
                for w in range(here):
                    touched_items[items[k * uint64(TILE) + w]] = 1
