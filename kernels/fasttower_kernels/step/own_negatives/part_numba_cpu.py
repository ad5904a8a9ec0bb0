"""A thread's part of a step with negatives of their own, compiled."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fasttower_kernels.compiled import OPTIONS, Array, njit, uint64
from fasttower_kernels.losses.numba_cpu import TILE
from fasttower_kernels.negatives.membership_numba_cpu import Membership, membership_of
from fasttower_kernels.negatives.numba_cpu import draw_negatives, tile_draws
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.philox import Key
from fasttower_kernels.settings import LossSettings
from fasttower_kernels.step.own_negatives.numba_cpu import CHUNK, Candidates, add_batch, candidates_of


class Inputs(NamedTuple):
    """What a part reads besides its positives: known positives, and the settings of the draws."""

    known: Membership
    candidates: Candidates


def inputs_of(negatives: Negatives, loss: LossSettings, key: Key, threads: int) -> Inputs:
    """The inputs of the parts of a step."""
    return Inputs(membership_of(negatives.known_positives)[0], candidates_of(negatives, loss, key))


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
        inputs.candidates,
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
    sampling, known = inputs.candidates.sampling, inputs.known
    positions, users, positives_of_part = part[0], part[1], part[2]
    num_drawn = uint64(sampling.count)
    draws = tile_draws(CHUNK)
    hits = np.empty((1 + CHUNK) * TILE, dtype=np.uint32)
    drawn = np.empty((1 + CHUNK) * TILE, dtype=np.uint32)
    for start in range(uint64(0), count, uint64(TILE)):
        here = min(uint64(TILE), count - start)
        for w in range(here):
            touched_users[users[start + w]] = 1
            touched_items[positives_of_part[start + w]] = 1
        for first in range(uint64(0), num_drawn, uint64(CHUNK)):
            chunk = min(uint64(CHUNK), num_drawn - first)
            draw_negatives(
                proposal,
                draws,
                hits,
                drawn,
                positions,
                users,
                start,
                here,
                first,
                chunk,
                sampling,
                step,
                known,
                exclude,
                exact,
            )
            for k in range(uint64(1), chunk + uint64(1)):
                for w in range(here):
                    touched_items[draws.items[k * uint64(TILE) + w]] = 1
