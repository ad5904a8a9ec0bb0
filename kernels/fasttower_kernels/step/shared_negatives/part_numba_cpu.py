"""A thread's part of a step with shared negatives, compiled."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fasttower_kernels.compiled import OPTIONS, Array, njit, uint64
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.philox import Key
from fasttower_kernels.settings import LossSettings
from fasttower_kernels.step.shared_negatives.batch_numba_cpu import Lists, LossConstants, add_shared_batch
from fasttower_kernels.step.shared_negatives.block_list_numba_cpu import ListSampling, draw_items
from fasttower_kernels.step.shared_negatives.numba_cpu import (
    constants_of,
    known_rows,
    sampling_of,
)


class Inputs(NamedTuple):
    """What a part reads besides its positives.

    Attributes:
        known: indptr and items of the known positives.
        sampling: of the lists.
        constants: of the loss.
        flags: (T, I), uint8, zero: a row of scratch for each thread.
        heads: (T, I), uint32, likewise.
    """

    known: tuple[Array, Array]
    sampling: ListSampling
    constants: LossConstants
    flags: Array
    heads: Array


def inputs_of(negatives: Negatives, loss: LossSettings, key: Key, threads: int) -> Inputs:
    """The inputs of the parts of a step."""
    return Inputs(
        known_rows(negatives.known_positives),
        sampling_of(negatives, key),
        constants_of(negatives, loss),
        np.zeros((threads, negatives.num_items), dtype=np.uint8),
        np.empty((threads, negatives.num_items), dtype=np.uint32),
    )


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
    """Add the gradients of a thread's positives; see `add_shared_batch`."""
    return add_shared_batch(
        parameters,
        gradients,
        part,
        count,
        Lists(positives, batch_size, uint64(0), inputs.flags[thread], inputs.heads[thread]),
        inputs.known,
        inputs.sampling,
        inputs.constants,
        step,
        scales,
        width,
        has_bias,
        exclude,
        has_l2,
        similarity == "cosine",
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
    """Mark the users, positives and list items of a thread's positives: what `add_part` will read.

    Every thread reads the lists of all blocks and marks those of a share of them.
    """
    for b in range(count):
        touched_users[part[1, b]] = 1
        touched_items[part[2, b]] = 1
    sampling = inputs.sampling
    items = np.empty(sampling.drawn + uint64(3), dtype=np.uint32)
    blocks = (batch_size + sampling.block_size - uint64(1)) // sampling.block_size
    for block in range(thread, blocks, threads):
        draw_items(items, block, sampling, step)
        for m in range(sampling.drawn):
            touched_items[items[m]] = 1
