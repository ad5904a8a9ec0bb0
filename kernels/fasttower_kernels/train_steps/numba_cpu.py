"""Many steps in one compiled call.

With T threads a step has three parts, each shared out among them: the batch is gathered, a piece each; each
thread takes the positives of its own users (user mod T) and adds to the users' gradients, which nobody else
touches, and to its own copy of the items' gradients; Adam takes a piece of the tables each and first adds up
the copies, in the threads' order. So a run repeats bit for bit for a given number of threads.

With the lazy optimiser two parts come in between: each thread draws the negatives of its users a first time,
to mark the rows that the batch will read, and brings a piece of the marked rows up to date. Adam then takes
the marked rows alone. All rows are brought up to date when the steps are done.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from fasttower_kernels.adam.numba_cpu import (
    ROWS_A_WORD,
    adam_range,
    catch_up_rows,
    decays,
    step_scales,
    touched_rows,
    update_rows,
)
from fasttower_kernels.compiled import (
    OPTIONS,
    SOURCES,
    Array,
    entry_point,
    float32,
    njit,
    prange,
    uint32,
    uint64,
)
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.membership import known_arrays
from fasttower_kernels.negatives.numba_cpu import TILE, count_free, draw_tile, redraw_touched
from fasttower_kernels.philox import seed_key
from fasttower_kernels.sampled_bce.numba_cpu import CHUNK, Variant, add_batch, flat_arrays, variant_of
from fasttower_kernels.shuffle import epoch_key
from fasttower_kernels.shuffle.numba_cpu import shuffle_tile
from fasttower_kernels.shuffle.reference import round_keys
from fasttower_kernels.tables import Interactions, Tables
from fasttower_kernels.train_steps.state import StepSettings, TrainState, steps_per_epoch
from fasttower_kernels.vector_rows import prefetch

# Elements whose copies are added up before Adam takes them, so that they are still in the cache.
_REDUCED_TOGETHER = 4096


@njit(**OPTIONS)
def gather(
    user_index: Array,
    item_index: Array,
    begin: int,
    size: int,
    shuffle: Any,
    users: Array,
    positives: Array,
    to: int,
) -> None:
    """Write the users and items at positions begin .. begin + size - 1 of the epoch's order.

    Args:
        user_index: (n,), int32, in the data's order.
        item_index: (n,), int32.
        begin: uint64.
        size: uint64.
        shuffle: bits of the left and the right part as uint64, the round keys (8,), uint32.
        users: (B,) or longer, uint32, out.
        positives: the same.
        to: uint64: where in both to write the first.
    """
    left_bits, right_bits, words = shuffle
    keys = words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]
    tile = uint64(TILE)
    rows = np.empty(TILE, dtype=np.uint64)
    ahead = np.empty(TILE, dtype=np.uint64)
    outside = np.empty(TILE, dtype=np.uint64)
    # While the interactions of a tile come from memory, the rows of the next one are computed.
    for start in range(uint64(0), size + tile, tile):
        if start < size:
            here = min(tile, size - start)
            shuffle_tile(begin + start, here, len(user_index), left_bits, right_bits, keys, ahead, outside)
            for w in range(here):
                prefetch(user_index, ahead[w], 1)
                prefetch(item_index, ahead[w], 1)
        if start > uint64(0):
            before = start - tile
            for w in range(min(tile, size - before)):
                users[to + before + w] = user_index[rows[w]]
                positives[to + before + w] = item_index[rows[w]]
        rows, ahead = ahead, rows


@njit(**OPTIONS)
def scales_of(size: int, num_negatives: int, pairs: int, l2: float) -> tuple[float, float, float]:
    """1 / divisor of a batch, and the L2 gradient's factors of a user's and an item's row, float32."""
    divisor = size * pairs
    return float32(1 / divisor), float32(2 * l2 / divisor), float32(4 * l2 / (1 + num_negatives) / divisor)


@njit(**OPTIONS)
def take_own(users: Array, positives: Array, size: int, thread: int, threads: int, own: Array) -> int:
    """Copy a thread's positions, users and positives to its rows of ``own``, (3, B); returns how many."""
    positions, own_users, own_positives = own[0], own[1], own[2]
    count = uint64(0)
    for b in range(size):
        positions[count] = b
        own_users[count] = users[b]
        own_positives[count] = positives[b]
        count += uint64(uint32(users[b]) % uint32(threads) == uint32(thread))
    return count


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
def _compiled(variant: Variant, threaded: bool, sources: int = SOURCES) -> Any:
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
    ) -> None:
        _ = sources, threaded
        threads = uint64(len(own))
        for part in range(3 * len(adam_scales)):
            for worker in prange(len(own)):
                thread = uint64(worker)
                i = uint64(part // 3)
                begin = (uint64(first_batch) + i) * uint64(batch_size)
                size = min(uint64(batch_size), uint64(len(user_index)) - begin)
                if part % 3 == 0:
                    low, high = size * thread // threads, size * (thread + uint64(1)) // threads
                    gather(user_index, item_index, begin + low, high - low, shuffle, users, positives, low)
                elif part % 3 == 1:
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
                        True,
                    )
                else:
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

    return entry_point(run, parallel=threaded)


@njit(**OPTIONS)
def mark_rows(
    batch: Array,
    size: int,
    known: Any,
    sampling: Any,
    step: int,
    touched_users: Array,
    touched_items: Array,
    exclude: bool,
    exact: bool,
) -> None:
    """Mark the users, positives and negatives of some positives: what `add_batch` will read.

    The arguments are those of `add_batch`, and the marks of `catch_up_rows`. Threads may mark at once: all
    of them write the same.
    """
    num_negatives, num_items, k0, k1 = sampling
    positions, users, positives = batch[0], batch[1], batch[2]
    items = np.empty((1 + CHUNK + 3) * TILE, dtype=np.uint32)
    hits = np.empty((1 + CHUNK) * TILE, dtype=np.uint32)
    drawn = np.empty((1 + CHUNK) * TILE, dtype=np.uint32)
    free = np.empty(TILE, dtype=np.uint32)
    for start in range(uint64(0), size, uint64(TILE)):
        here = min(uint64(TILE), size - start)
        for w in range(here):
            touched_users[users[start + w]] = 1
            touched_items[positives[start + w]] = 1
        if exclude:
            count_free(free, users, start, here, num_items, known[2])
        for first in range(uint64(0), uint64(num_negatives), uint64(CHUNK)):
            count = min(uint64(CHUNK), uint64(num_negatives) - first)
            draw_tile(items, positions, start, first, count, num_items, k0, k1, step)
            if exclude:
                redraw_touched(
                    items,
                    positions,
                    users,
                    free,
                    start,
                    here,
                    first,
                    count,
                    num_items,
                    k0,
                    k1,
                    step,
                    known,
                    exact,
                    hits,
                    drawn,
                )
            for k in range(uint64(1), count + uint64(1)):
                for w in range(here):
                    touched_items[items[k * uint64(TILE) + w]] = 1


@njit(**OPTIONS)
def piece_of_words(marks: Array, thread: int, threads: int) -> tuple[int, int]:
    """The words of the marks that a thread takes: begin and end, uint64."""
    words = uint64(len(marks) // ROWS_A_WORD)
    return words * thread // threads, words * (thread + uint64(1)) // threads


@njit(**OPTIONS)
def mark_piece(marks: Array, thread: int, threads: int, value: int) -> None:
    """Set a thread's piece of the marks."""
    low, high = piece_of_words(marks, thread, threads)
    marks[low * uint64(ROWS_A_WORD) : high * uint64(ROWS_A_WORD)] = value


@njit(**OPTIONS)
def catch_up_piece(
    parameters: Any,
    moments_1: Any,
    moments_2: Any,
    last: Any,
    touched: Any,
    thread: int,
    threads: int,
    now: int,
    scales: Array,
    decay: Array,
    width: int,
    has_bias: bool,
) -> None:
    """Bring the marked rows of a thread's piece up to date, of users, items and item bias."""
    p, m, v = parameters, moments_1, moments_2
    low, high = piece_of_words(touched[0], thread, threads)
    users = touched_rows(touched[0], low, high, uint64(len(last[0])))
    catch_up_rows(p[0], m[0], v[0], last[0], users, now, scales, decay, width)
    low, high = piece_of_words(touched[1], thread, threads)
    items = touched_rows(touched[1], low, high, uint64(len(last[1])))
    catch_up_rows(p[1], m[1], v[1], last[1], items, now, scales, decay, width)
    if has_bias:
        catch_up_rows(p[2], m[2], v[2], last[2], items, now, scales, decay, 1)


@njit(**OPTIONS)
def update_touched_piece(
    parameters: Any,
    gradients: Any,
    moments_1: Any,
    moments_2: Any,
    last: Any,
    touched: Any,
    thread: int,
    threads: int,
    now: int,
    scales: Array,
    width: int,
    has_bias: bool,
) -> None:
    """Adam on the marked rows of a thread's piece, of users, items and item bias; takes the marks off."""
    p, g, m, v = parameters, gradients, moments_1, moments_2
    low, high = piece_of_words(touched[0], thread, threads)
    users = touched_rows(touched[0], low, high, uint64(len(last[0])))
    update_rows(p[0], g[0], m[0], v[0], last[0], users, now, scales, width)
    low, high = piece_of_words(touched[1], thread, threads)
    items = touched_rows(touched[1], low, high, uint64(len(last[1])))
    update_rows(p[1], g[1], m[1], v[1], last[1], items, now, scales, width)
    if has_bias:
        update_rows(p[2], g[2], m[2], v[2], last[2], items, now, scales, 1)
    mark_piece(touched[0], thread, threads, 0)
    mark_piece(touched[1], thread, threads, 0)


@lru_cache
def _compiled_lazy(variant: Variant, threaded: bool, sources: int = SOURCES) -> Any:
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
        touched: Any,
        last: Any,
        decay: Array,
    ) -> None:
        _ = sources, threaded
        threads = uint64(len(own))
        counts = np.zeros(len(own), dtype=np.uint64)
        for part in range(5 * len(adam_scales) + 1):
            for worker in prange(len(own)):
                thread = uint64(worker)
                i = uint64(part // 5)
                begin = (uint64(first_batch) + i) * uint64(batch_size)
                size = min(uint64(batch_size), uint64(len(user_index)) - begin)
                if i == uint64(len(adam_scales)) or part % 5 == 2:
                    if part % 5 == 0:  # the steps are done: every row
                        mark_piece(touched[0], thread, threads, 1)
                        mark_piece(touched[1], thread, threads, 1)
                    catch_up_piece(
                        parameters,
                        moments_1,
                        moments_2,
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
                elif part % 5 == 0:
                    low, high = size * thread // threads, size * (thread + uint64(1)) // threads
                    gather(user_index, item_index, begin + low, high - low, shuffle, users, positives, low)
                elif part % 5 == 1:
                    counts[thread] = take_own(users, positives, size, thread, threads, own[thread])
                    mark_rows(
                        own[thread],
                        counts[thread],
                        known,
                        negatives,
                        uint32(uint64(first_step) + i),
                        touched[0],
                        touched[1],
                        exclude,
                        exact,
                    )
                elif part % 5 == 3:
                    sums[thread] += add_batch(
                        parameters,
                        (gradients[0][0], gradients[1][thread], gradients[2][thread]),
                        own[thread],
                        counts[thread],
                        known,
                        negatives,
                        uint32(uint64(first_step) + i),
                        scales_of(size, negatives[0], loss[0], loss[1]),
                        width,
                        has_bias,
                        exclude,
                        exact,
                        has_l2,
                        True,
                    )
                else:
                    update_touched_piece(
                        parameters,
                        gradients,
                        moments_1,
                        moments_2,
                        last,
                        touched,
                        thread,
                        threads,
                        i,
                        adam_scales,
                        width,
                        has_bias,
                    )

    return entry_point(run, parallel=threaded)


def thread_count(batch_size: int) -> int:
    """T: the threads that torch and numba may both use, and no more than the batch has tiles."""
    allowed = torch.get_num_threads()
    threads = min(allowed, math.ceil(batch_size / TILE))
    if threads > 1:
        threads = min(threads, numba.get_num_threads())
        # The call above starts numba's threads, which sets OpenMP's number of threads for torch too.
        torch.set_num_threads(allowed)
    return threads


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
        known_arrays(known_positives),
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
        _compiled_lazy(variant, threads > 1)(*arguments, *_row_arrays(state.parameters), decays(num_steps))
    else:
        _compiled(variant, threads > 1)(*arguments)
    return torch.tensor(sums.sum(), dtype=torch.float64)


def _row_arrays(parameters: Tables) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Of the rows of users and items their marks; of users, items and item bias the updates that they saw."""
    users, items = len(parameters.users), len(parameters.items)
    marks = tuple(np.zeros(math.ceil(n / ROWS_A_WORD) * ROWS_A_WORD, dtype=np.uint8) for n in (users, items))
    biases = 0 if parameters.item_bias is None else items
    return marks, tuple(np.zeros(n, dtype=np.uint32) for n in (users, items, biases))
