"""Top-K on the CPU: matmuls into tiles that stay in the cache, and a scan of each tile.

Threads share out the users. A worker multiplies, with torch's matmul on its one thread, and scans its own
tiles, so that workers wait for nobody and a tile stays in the cache of the core that made it.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Barrier, Lock
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from fasttower_kernels.compiled import Array, empty
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.topk.keys_numba_cpu import finish_rows, slots, unpack
from fasttower_kernels.topk.reference import TopK
from fasttower_kernels.topk.scan_numba_cpu import BLOCK, scan_tile
from fasttower_kernels.topk.tiles import Catalogue, Tile

_ROWS, _COLUMNS = 512, 1024
"""Of a tile, where memory and the number of users allow: 2 MiB, measured."""

_KEYS_BYTES = 2 << 20
"""Of all rows' keys: where K is large, a tile has fewer rows, and more columns."""

_LEAST_ROWS, _LEAST_COLUMNS = 4, 16
"""Of a matmul: with fewer, MKL takes other ways, which round otherwise."""


class _MatmulThreads:
    """Threads in each of which a matmul takes one core, kept for later calls.

    To set a thread's number sets that of threads which start later too. That is put back once, here, which
    calls that overlap could not do.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """As in a new process, which has none of them."""
        self._count = 0
        self._lock = Lock()

    def pool(self, count: int) -> ThreadPoolExecutor:
        """So many of them at least."""
        with self._lock:
            if count > self._count:
                before = torch.get_num_threads()
                self._pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
                all_started = Barrier(count)
                list(self._pool.map(lambda _: all_started.wait(), range(count)))
                torch.set_num_threads(before)
                self._count = count
            return self._pool


_matmul_threads = _MatmulThreads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_matmul_threads.forget)


class _Shape(NamedTuple):
    """Of a worker's tiles: users and items, keys a user, and the memory that goes with them."""

    rows: int
    columns: int
    slots: int
    num_bytes: int


def _shape(num_users: int, k: int, catalogue: Catalogue, threads: int, budget_bytes: int) -> _Shape:
    """The measured best, but a part for every thread, and smaller where the budget is."""
    dim = catalogue.vectors.shape[1]
    gathered = catalogue.index is not None
    keys_bytes = 8 * slots(k)

    def num_bytes(rows: int, columns: int) -> int:
        # Of a row its keys, their count, the threshold and two cursors; of a column its bias twice and its
        # mask, and of a gathered one its vector.
        padding = 4 * dim * (_LEAST_ROWS + _LEAST_COLUMNS)
        return 4 * rows * columns + (keys_bytes + 48) * rows + (16 + 4 * dim * gathered) * columns + padding

    rows = max(_LEAST_ROWS, min(_ROWS, math.ceil(num_users / threads), _KEYS_BYTES // keys_bytes))
    needed = BLOCK * math.ceil(len(catalogue) / BLOCK)
    columns = min(needed, _ROWS * _COLUMNS // rows // BLOCK * BLOCK)
    while num_bytes(rows, columns) > budget_bytes and (rows, columns) != (_LEAST_ROWS, BLOCK):
        if columns > max(rows, BLOCK) or rows == _LEAST_ROWS:
            columns = max(BLOCK, columns // 2 // BLOCK * BLOCK)
        else:
            rows = max(_LEAST_ROWS, rows // 2)
    return _Shape(rows, columns, slots(k), num_bytes(rows, columns))


class _Worker:
    """Buffers of one thread, and what it does with them."""

    def __init__(self, shape: _Shape) -> None:
        self._stride = shape.columns
        self._tile = torch.empty((shape.rows, shape.columns), dtype=torch.float32)
        self._bias = torch.zeros(shape.columns, dtype=torch.float32)
        self._keys = np.empty((shape.rows, shape.slots), dtype=np.uint64)
        self._counts = np.empty(shape.rows, dtype=np.int64)
        self._thresholds = np.empty(shape.rows, dtype=np.float32)

    def run(
        self,
        users: Tensor,
        catalogue: Catalogue,
        seen: KnownPositives | None,
        rows: Tensor | None,
        best: TopK,
    ) -> None:
        """All items for some users; ``best`` (C, K) has nothing yet."""
        num_rows, k = best.items.shape
        self._counts.fill(0)
        self._thresholds.fill(-np.inf)
        if seen is None or rows is None:
            cursors = ends = np.zeros(len(users), dtype=np.int64)
            seen_items = empty(np.int32)
        else:
            cursors, ends = seen.indptr[rows].numpy(), seen.indptr[rows + 1].numpy()
            seen_items = seen.items.numpy()
        users = _at_least(_LEAST_ROWS, users)
        for begin in range(0, len(catalogue), self._stride):
            tile = catalogue.tile(begin, begin + self._stride)
            vectors = _at_least(_LEAST_COLUMNS, tile.vectors)
            torch.mm(users, vectors.T, out=self._tile[: len(users), : len(vectors)])
            self._scan(tile, cursors, ends, seen_items, k)
        keys = self._keys[:num_rows]
        finish_rows()(keys, self._counts[:num_rows], k)
        keys[:, :k].sort(axis=1)
        unpack()(keys, best.items.numpy(), best.scores.numpy())

    def _scan(self, tile: Tile, cursors: Array, ends: Array, seen_items: Array, k: int) -> None:
        width = len(tile.vectors)
        if tile.bias is not None:
            self._bias[:width] = tile.bias
        scan_tile(tile.bias is not None, tile.item_index is not None)(
            self._tile.view(-1).numpy(),
            self._stride,
            width,
            self._bias.numpy(),
            tile.first,
            empty(np.int64) if tile.item_index is None else tile.item_index.numpy(),
            cursors,
            ends,
            seen_items,
            self._keys,
            self._counts,
            self._thresholds,
            k,
        )


def _at_least(count: int, vectors: Tensor) -> Tensor:
    """The vectors, with zeros after them where they are fewer."""
    missing = count - len(vectors)
    return F.pad(vectors, (0, 0, 0, missing)) if missing > 0 else vectors


def top_k_numba(
    user_vectors: Tensor,
    catalogue: Catalogue,
    *,
    k: int,
    seen: KnownPositives | None,
    seen_users: Tensor | None,
    budget_bytes: int,
) -> TopK:
    """On as many threads as torch has; see `fasttower_kernels.topk.top_k`, which checks the arguments."""
    found = TopK.empty(len(user_vectors), k, user_vectors.device)
    if not found.items.numel() or not len(catalogue):
        return found
    allowed = torch.get_num_threads()
    shape = _shape(len(user_vectors), k, catalogue, allowed, budget_bytes)
    starts = range(0, len(user_vectors), shape.rows)
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for _ in range(max(1, min(allowed, len(starts), budget_bytes // shape.num_bytes))):
        idle.put(_Worker(shape))

    @torch.inference_mode()  # the caller's modes are not those of other threads
    def run(start: int) -> None:
        some = slice(start, start + shape.rows)
        worker = idle.get()
        try:
            worker.run(
                user_vectors[some],
                catalogue,
                seen,
                None if seen_users is None else seen_users[some],
                TopK(found.items[some], found.scores[some]),
            )
        finally:
            idle.put(worker)

    # A single thread's matmul takes one core as it is.
    for _ in map(run, starts) if allowed == 1 else _matmul_threads.pool(allowed).map(run, starts):
        pass
    return found
