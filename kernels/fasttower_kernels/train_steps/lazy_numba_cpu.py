"""Many steps with the lazy optimiser in one compiled call.

Beside the parts of a dense step, each thread draws the negatives of its users a first time, to mark the rows
that the batch will read, and brings a piece of the marked rows up to date. Adam then takes the marked rows
alone. All rows are brought up to date when the steps are done.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from fasttower_kernels.adam.numba_cpu import ROWS_A_WORD, catch_up_rows, touched_rows, update_rows
from fasttower_kernels.compiled import OPTIONS, SOURCES, Array, entry_point, njit, uint32, uint64
from fasttower_kernels.negatives.numba_cpu import TILE, draw_negatives, tile_draws
from fasttower_kernels.sampled_bce.numba_cpu import CHUNK, Variant, add_batch, scales_of
from fasttower_kernels.tables import Tables
from fasttower_kernels.threads import wait
from fasttower_kernels.train_steps.batch_numba_cpu import gather, take_own


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
    num_negatives = uint64(sampling[0])
    positions, users, positives = batch[0], batch[1], batch[2]
    draws = tile_draws(CHUNK)
    hits = np.empty((1 + CHUNK) * TILE, dtype=np.uint32)
    words = np.empty((1 + CHUNK) * TILE, dtype=np.uint32)
    for start in range(uint64(0), size, uint64(TILE)):
        here = min(uint64(TILE), size - start)
        for w in range(here):
            touched_users[users[start + w]] = 1
            touched_items[positives[start + w]] = 1
        for first in range(uint64(0), num_negatives, uint64(CHUNK)):
            count = min(uint64(CHUNK), num_negatives - first)
            draw_negatives(
                draws,
                hits,
                words,
                positions,
                users,
                start,
                here,
                first,
                count,
                sampling,
                step,
                known,
                exclude,
                exact,
            )
            for k in range(uint64(1), count + uint64(1)):
                for w in range(here):
                    touched_items[draws.items[k * uint64(TILE) + w]] = 1


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
def compiled_lazy(variant: Variant, sources: int = SOURCES) -> Any:
    """The compiled call for a variant: a dense call's arguments, then marks, updates seen and decays."""
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
        counter: Array,
        thread: int,
    ) -> None:
        _ = sources
        threads = uint64(len(own))
        num_steps = uint64(len(adam_scales))
        for i in range(num_steps + uint64(1)):
            count = uint64(0)
            begin = (uint64(first_batch) + i) * uint64(batch_size)
            size = min(uint64(batch_size), uint64(len(user_index)) - begin)
            if i < num_steps:
                low, high = size * thread // threads, size * (thread + uint64(1)) // threads
                gather(user_index, item_index, begin + low, high - low, shuffle, users, positives, low)
                wait(counter, len(own))
                count = take_own(users, positives, size, thread, threads, own[thread])
                mark_rows(
                    own[thread],
                    count,
                    known,
                    negatives,
                    uint32(uint64(first_step) + i),
                    touched[0],
                    touched[1],
                    exclude,
                    exact,
                )
                wait(counter, len(own))
            else:  # the steps are done: every row
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
            if i == num_steps:
                break
            wait(counter, len(own))
            sums[thread] += add_batch(
                parameters,
                (gradients[0][0], gradients[1][thread], gradients[2][thread]),
                own[thread],
                count,
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

    return entry_point(run)


def row_arrays(parameters: Tables) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Of the rows of users and items their marks; of users, items and item bias the updates that they saw."""
    users, items = len(parameters.users), len(parameters.items)
    marks = tuple(np.zeros(math.ceil(n / ROWS_A_WORD) * ROWS_A_WORD, dtype=np.uint8) for n in (users, items))
    biases = 0 if parameters.item_bias is None else items
    return marks, tuple(np.zeros(n, dtype=np.uint32) for n in (users, items, biases))
