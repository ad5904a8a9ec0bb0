"""Many steps in one compiled call.

With T threads a step has three parts, each shared out among them, and between two of which they wait for each
other: the batch is gathered, a piece each; each thread takes the positives of its own users (user mod T) and
adds to the users' gradients, which nobody else touches, and to its own copy of the items' gradients; Adam
takes a piece of the tables each and first adds up the copies, in the threads' order. So a run repeats bit for
bit for a given number of threads.

With the lazy optimiser each thread first marks the rows that its positives will read, and brings a piece of
the marked rows up to date; Adam then takes only the marked rows. All rows are brought up to date when the
steps are done.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttower_kernels.adam.numba_cpu import adam_range, decays, step_scales
from fasttower_kernels.compiled import (
    OPTIONS,
    SOURCES,
    Array,
    chosen,
    entry_point,
    flat_arrays,
    float32,
    njit,
    uint32,
    uint64,
)
from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.losses.numba_cpu import NORMALISED, TILE
from fasttower_kernels.losses.scales_numba_cpu import factors_of, scales_of
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.philox import seed_key
from fasttower_kernels.settings import StepSettings
from fasttower_kernels.shuffle import epoch_key
from fasttower_kernels.shuffle.reference import round_keys
from fasttower_kernels.step.batch_numba_cpu import gather, take_own
from fasttower_kernels.step.lazy_pieces_numba_cpu import (
    catch_up_piece,
    mark_piece,
    row_arrays,
    update_touched_piece,
)
from fasttower_kernels.step.own_negatives import part_numba_cpu as own_negatives
from fasttower_kernels.step.shared_negatives import part_numba_cpu as shared_negatives
from fasttower_kernels.step.state import TrainState, steps_per_epoch
from fasttower_kernels.step.variant_numba_cpu import Variant, variant_of
from fasttower_kernels.tables import Interactions
from fasttower_kernels.threads import run_in_threads, wait

_DATAFLOWS = {"own": own_negatives, "shared": shared_negatives}


class Arrays(NamedTuple):
    """The tables that steps update, flat, users, items and bias each; of item gradients a copy per thread."""

    parameters: Any
    gradients: Any
    moments_1: Any
    moments_2: Any


class Batches(NamedTuple):
    """Where batches come from.

    Attributes:
        user_index: (n,), int32.
        item_index: (n,), int32.
        shuffle: of the epoch; see `gather`.
        batch_size: B.
        first_batch: of the call, in its epoch.
        first_step: t of the call.
    """

    user_index: Array
    item_index: Array
    shuffle: Any
    batch_size: int
    first_batch: int
    first_step: int


class Buffers(NamedTuple):
    """What the threads share.

    Attributes:
        users: (B,) and room, uint32: of the batch.
        positives: (B,) and room, uint32.
        own: (T, 3, B and room), uint32: positions, users and positives of each thread.
        sums: (T,), float64: of the losses.
    """

    users: Array
    positives: Array
    own: Array
    sums: Array


class LazyArrays(NamedTuple):
    """What the lazy optimiser keeps during a call; see `row_arrays`."""

    touched: Any
    last: Any
    decay: Array


def add_part(dataflow: str) -> Callable[..., float]:
    """Of a literal name, the function of that name of its dataflow."""
    raise NotImplementedError  # compiled code only


def mark_part(dataflow: str) -> Callable[..., None]:
    """Of a literal name, the function of that name of its dataflow."""
    raise NotImplementedError  # compiled code only


chosen(add_part, lambda dataflow: _DATAFLOWS[dataflow].add_part)
chosen(mark_part, lambda dataflow: _DATAFLOWS[dataflow].mark_part)

# Elements whose copies are added up before Adam takes them, so that they are still in the cache.
_REDUCED_TOGETHER = 4096


@njit(**OPTIONS)
def update_piece(
    parameters: Array,
    copies: Array,
    moments_1: Array,
    moments_2: Array,
    begin: int,
    end: int,
    step_size: float,
    inverse_root: float,
) -> None:
    """Adam on elements begin .. end - 1; the gradient is the sum of the rows of ``copies``, (T, n)."""
    total = copies[0]
    for start in range(begin, end, uint64(_REDUCED_TOGETHER)):
        stop = min(end, start + uint64(_REDUCED_TOGETHER))
        for t in range(1, len(copies)):
            copy = copies[t]
            for i in range(start, stop):
                total[i] += copy[i]
                copy[i] = float32(0)
        adam_range(parameters, total, moments_1, moments_2, start, stop, step_size, inverse_root)


@lru_cache
def _compiled(variant: Variant, dataflow: str, lazy: bool, sources: int = SOURCES) -> Any:
    width, has_bias, exclude, exact, has_l2, similarity, proposal, loss = variant
    normalised = loss in NORMALISED

    def dense_steps(
        arrays: Any,
        batches: Any,
        buffers: Any,
        inputs: Any,
        factors: Any,
        adam_scales: Array,
        counter: Array,
        thread: int,
    ) -> None:
        _ = sources
        users, positives, own, sums = buffers
        threads, room = uint64(len(own)), uint64(batches.batch_size)
        for i in range(uint64(len(adam_scales))):
            begin = (uint64(batches.first_batch) + i) * room
            size = min(room, uint64(len(batches.user_index)) - begin)
            low, high = size * thread // threads, size * (thread + uint64(1)) // threads
            gather(
                batches.user_index,
                batches.item_index,
                begin + low,
                high - low,
                batches.shuffle,
                users,
                positives,
                low,
            )
            wait(counter, len(own))
            gradients = arrays.gradients
            sums[thread] += add_part(dataflow)(
                arrays.parameters,
                (gradients[0][0], gradients[1][thread], gradients[2][thread]),
                own[thread],
                take_own(users, positives, size, thread, threads, own[thread]),
                positives,
                size,
                inputs,
                thread,
                uint32(uint64(batches.first_step) + i),
                scales_of(size, factors),
                width,
                has_bias,
                exclude,
                exact,
                has_l2,
                similarity,
                proposal,
                loss,
                normalised,
            )
            wait(counter, len(own))
            for table in range(3):
                n = uint64(len(arrays.parameters[table]))
                update_piece(
                    arrays.parameters[table],
                    gradients[table],
                    arrays.moments_1[table],
                    arrays.moments_2[table],
                    n * thread // threads,
                    n * (thread + uint64(1)) // threads,
                    adam_scales[i, 0],
                    adam_scales[i, 1],
                )

    def lazy_steps(
        arrays: Any,
        batches: Any,
        buffers: Any,
        inputs: Any,
        factors: Any,
        adam_scales: Array,
        rows: Any,
        counter: Array,
        thread: int,
    ) -> None:
        _ = sources
        users, positives, own, sums = buffers
        touched, last, decay = rows
        threads, room = uint64(len(own)), uint64(batches.batch_size)
        num_steps = uint64(len(adam_scales))
        for i in range(num_steps + uint64(1)):
            count = uint64(0)
            begin = (uint64(batches.first_batch) + i) * room
            size = min(room, uint64(len(batches.user_index)) - begin)
            step = uint32(uint64(batches.first_step) + i)
            if i < num_steps:
                low, high = size * thread // threads, size * (thread + uint64(1)) // threads
                gather(
                    batches.user_index,
                    batches.item_index,
                    begin + low,
                    high - low,
                    batches.shuffle,
                    users,
                    positives,
                    low,
                )
                wait(counter, len(own))
                count = take_own(users, positives, size, thread, threads, own[thread])
                mark_part(dataflow)(
                    own[thread],
                    count,
                    positives,
                    size,
                    inputs,
                    thread,
                    threads,
                    step,
                    touched[0],
                    touched[1],
                    exclude,
                    exact,
                    proposal,
                )
                wait(counter, len(own))
            else:  # the steps are done: every row
                mark_piece(touched[0], thread, threads, 1)
                mark_piece(touched[1], thread, threads, 1)
            catch_up_piece(
                arrays.parameters,
                arrays.moments_1,
                arrays.moments_2,
                last,
                touched,
                thread,
                threads,
                i,
                adam_scales,
                decay,
                width,
                has_bias,
            )
            if i == num_steps:
                break
            wait(counter, len(own))
            gradients = arrays.gradients
            sums[thread] += add_part(dataflow)(
                arrays.parameters,
                (gradients[0][0], gradients[1][thread], gradients[2][thread]),
                own[thread],
                count,
                positives,
                size,
                inputs,
                thread,
                step,
                scales_of(size, factors),
                width,
                has_bias,
                exclude,
                exact,
                has_l2,
                similarity,
                proposal,
                loss,
                normalised,
            )
            wait(counter, len(own))
            update_touched_piece(
                arrays.parameters,
                gradients,
                arrays.moments_1,
                arrays.moments_2,
                last,
                touched,
                thread,
                threads,
                i,
                adam_scales,
                width,
                has_bias,
            )

    return entry_point(lazy_steps if lazy else dense_steps)


def thread_count(batch_size: int) -> int:
    """T: the threads that torch may use, and no more than the batch has tiles."""
    return min(torch.get_num_threads(), math.ceil(batch_size / TILE))


class Steps:
    """See `Step`. Bit for bit the same for the same `thread_count`."""

    def __init__(
        self, state: TrainState, interactions: Interactions, negatives: Negatives, settings: StepSettings
    ) -> None:
        if settings.table_dtype != "float32":
            raise FastTowerError(
                f"table_dtype is {settings.table_dtype}, but on the CPU backend numba trains, which has only "
                "float32; choose table_dtype float32, a CUDA device, or backend torch."
            )
        self._state = state
        self._interactions = interactions
        self._negatives = negatives
        self._settings = settings
        self._lazy = settings.is_lazy(len(state.parameters.users), len(state.parameters.items))
        self._dataflow = "shared" if negatives.settings.is_shared else "own"

    def run(self, first_step: int, num_steps: int) -> Tensor:
        """See `Step.run`."""
        state, settings, interactions = self._state, self._settings, self._interactions
        num_rows, batch_size = len(interactions), settings.batch_size
        epoch, first_batch = divmod(first_step, steps_per_epoch(num_rows, batch_size))
        bits = (num_rows - 1).bit_length()
        keys = np.array(round_keys(epoch_key(settings.seed, epoch)), dtype=np.uint32)
        threads = thread_count(batch_size)
        user_gradient, item_gradient, bias_gradient = (array[None] for array in flat_arrays(state.gradients))
        if threads > 1:
            item_gradient = np.zeros((threads, item_gradient.shape[1]), dtype=np.float32)
            bias_gradient = np.zeros((threads, bias_gradient.shape[1]), dtype=np.float32)
        room = batch_size + 2 * TILE
        sums = np.zeros(threads)
        inputs = _DATAFLOWS[self._dataflow].inputs_of(
            self._negatives, settings.loss, seed_key(settings.seed), threads
        )
        arguments: tuple[Any, ...] = (
            Arrays(
                flat_arrays(state.parameters),
                (user_gradient, item_gradient, bias_gradient),
                flat_arrays(state.moments_1),
                flat_arrays(state.moments_2),
            ),
            Batches(
                interactions.user_index.numpy(),
                interactions.item_index.numpy(),
                (uint64(bits // 2), uint64(bits - bits // 2), keys),
                batch_size,
                first_batch,
                first_step,
            ),
            Buffers(
                np.zeros(room, dtype=np.uint32),
                np.zeros(room, dtype=np.uint32),
                np.zeros((threads, 3, room), dtype=np.uint32),
                sums,
            ),
            inputs,
            factors_of(settings.loss, settings.negatives.scored),
            step_scales(np.arange(first_step + 1, first_step + 1 + num_steps), settings.learning_rate),
        )
        if self._lazy:
            arguments = (*arguments, LazyArrays(*row_arrays(state.parameters), decays(num_steps)))
        variant = variant_of(state.parameters, self._negatives, settings.loss)
        run_in_threads(_compiled(variant, self._dataflow, self._lazy), arguments, threads)
        return torch.tensor(sums.sum(), dtype=torch.float64)
