"""What a thread does with the marked rows of its piece of the tables, for the lazy optimiser, compiled."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fasttower_kernels.adam.numba_cpu import ROWS_A_WORD, catch_up_rows, touched_rows, update_rows
from fasttower_kernels.compiled import OPTIONS, Array, njit, uint64
from fasttower_kernels.tables import Tables


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


def row_arrays(parameters: Tables) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Of the rows of users and items their marks; of users, items and item bias the updates that they saw."""
    users, items = len(parameters.users), len(parameters.items)
    marks = tuple(np.zeros(math.ceil(n / ROWS_A_WORD) * ROWS_A_WORD, dtype=np.uint8) for n in (users, items))
    biases = 0 if parameters.item_bias is None else items
    return marks, tuple(np.zeros(n, dtype=np.uint32) for n in (users, items, biases))
