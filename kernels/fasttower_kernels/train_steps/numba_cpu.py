"""Many steps in one compiled call.

With T threads a step has three parts, each shared out among them, and between two of which they wait for each
other: the batch is gathered, a piece each; each thread takes the positives of its own users (user mod T) and
adds to the users' gradients, which nobody else touches, and to its own copy of the items' gradients; Adam
takes a piece of the tables each and first adds up the copies, in the threads' order. So a run repeats bit for
bit for a given number of threads.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttower_kernels.adam.numba_cpu import adam_range, decays, step_scales
from fasttower_kernels.compiled import (
    OPTIONS,
    SOURCES,
    Array,
    entry_point,
    flat_arrays,
    float32,
    njit,
    uint32,
    uint64,
)
from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives.membership_numba_cpu import membership_of
from fasttower_kernels.negatives.numba_cpu import TILE
from fasttower_kernels.philox import seed_key
from fasttower_kernels.sampled_bce.numba_cpu import Variant, add_batch, scales_of, variant_of
from fasttower_kernels.shuffle import epoch_key
from fasttower_kernels.shuffle.reference import round_keys
from fasttower_kernels.tables import Interactions
from fasttower_kernels.threads import run_in_threads, wait
from fasttower_kernels.train_steps.batch_numba_cpu import gather, take_own
from fasttower_kernels.train_steps.lazy_numba_cpu import compiled_lazy, row_arrays
from fasttower_kernels.train_steps.state import StepSettings, TrainState, steps_per_epoch

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
def _compiled(variant: Variant, sources: int = SOURCES) -> Any:
    width, has_bias, exclude, exact, has_l2 = variant

    def run(
        parameters: Any,
        gradients: Any,
        moments_1: Any,
        moments_2: Any,
        user_index: Array,
        item_index: Array,
        known: Any,
        shuffle: Any,
        negatives: Any,
        loss: Any,
        batch_size: int,
        first_batch: int,
        first_step: int,
        adam_scales: Array,
        users: Array,
        positives: Array,
        own: Array,
        sums: Array,
        counter: Array,
        thread: int,
    ) -> None:
        _ = sources
        threads = uint64(len(own))
        for i in range(uint64(len(adam_scales))):
            begin = (uint64(first_batch) + i) * uint64(batch_size)
            size = min(uint64(batch_size), uint64(len(user_index)) - begin)
            low, high = size * thread // threads, size * (thread + uint64(1)) // threads
            gather(user_index, item_index, begin + low, high - low, shuffle, users, positives, low)
            wait(counter, len(own))
            sums[thread] += add_batch(
                parameters,
                (gradients[0][0], gradients[1][thread], gradients[2][thread]),
                own[thread],
                take_own(users, positives, size, thread, threads, own[thread]),
                known,
                negatives,
                uint32(uint64(first_step) + i),
                scales_of(size, negatives[0], loss[0], loss[1]),
                width,
                has_bias,
                exclude,
                exact,
                has_l2,
                False,
            )
            wait(counter, len(own))
            for table in range(3):
                n = uint64(len(parameters[table]))
                update_piece(
                    parameters[table],
                    gradients[table],
                    moments_1[table],
                    moments_2[table],
                    n * thread // threads,
                    n * (thread + uint64(1)) // threads,
                    adam_scales[i, 0],
                    adam_scales[i, 1],
                )

    return entry_point(run)


def thread_count(batch_size: int) -> int:
    """T: the threads that torch may use, and no more than the batch has tiles."""
    return min(torch.get_num_threads(), math.ceil(batch_size / TILE))


def run_steps(
    state: TrainState,
    interactions: Interactions,
    known_positives: KnownPositives | None,
    settings: StepSettings,
    *,
    first_step: int,
    num_steps: int,
) -> Tensor:
    """See the operator's `run_steps`. Bit for bit the same for the same `thread_count`."""
    if settings.table_dtype != "float32":
        raise FastTowerError(
            f"table_dtype is {settings.table_dtype}, but on the CPU backend numba trains, which has float32 "
            "alone; choose table_dtype float32, a CUDA device, or backend torch."
        )
    num_rows, batch_size = len(interactions), settings.batch_size
    epoch, first_batch = divmod(first_step, steps_per_epoch(num_rows, batch_size))
    bits = (num_rows - 1).bit_length()
    keys = np.array(round_keys(epoch_key(settings.seed, epoch)), dtype=np.uint32)
    k0, k1 = seed_key(settings.seed)
    num_items = state.parameters.items.shape[0]
    variant = variant_of(state.parameters, known_positives, settings.loss)
    threads = thread_count(batch_size)
    user_gradient, item_gradient, bias_gradient = (array[None] for array in flat_arrays(state.gradients))
    if threads > 1:
        item_gradient = np.zeros((threads, item_gradient.shape[1]), dtype=np.float32)
        bias_gradient = np.zeros((threads, bias_gradient.shape[1]), dtype=np.float32)
    room = batch_size + 2 * TILE
    sums = np.zeros(threads)
    arguments = (
        flat_arrays(state.parameters),
        (user_gradient, item_gradient, bias_gradient),
        flat_arrays(state.moments_1),
        flat_arrays(state.moments_2),
        interactions.user_index.numpy(),
        interactions.item_index.numpy(),
        membership_of(known_positives)[0],
        (uint64(bits // 2), uint64(bits - bits // 2), keys),
        (settings.loss.num_negatives, uint64(num_items), uint32(k0), uint32(k1)),
        (settings.loss.pairs, float(settings.loss.l2)),
        batch_size,
        first_batch,
        first_step,
        step_scales(np.arange(first_step + 1, first_step + 1 + num_steps), settings.learning_rate),
        np.zeros(room, dtype=np.uint32),
        np.zeros(room, dtype=np.uint32),
        np.zeros((threads, 3, room), dtype=np.uint32),
        sums,
    )
    if settings.is_lazy(state.parameters):
        lazy = (*row_arrays(state.parameters), decays(num_steps))
        run_in_threads(compiled_lazy(variant), (*arguments, *lazy), threads)
    else:
        run_in_threads(_compiled(variant), arguments, threads)
    return torch.tensor(sums.sum(), dtype=torch.float64)
