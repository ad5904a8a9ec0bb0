"""Many steps on a GPU: two launches per step, and no word from the host inside a call.

A step is the fused kernel and Adam: of a table all rows, or, lazily, those that the next batch reads, and
all of them at the end of a call. Each finds its step in counters in device memory, derives the batch and
its length from it, and so may be replayed by a CUDA graph at any step, the short last batch included. The
host sends the keys of the epoch's order and Adam's step sizes before the first step, and gets the loss
after the last one.

With bfloat16 tables the loss reads a rounded copy of users and items, which each launch that updates a row
writes beside it, and a call begins with making it anew. Of a vector the fused kernel then reads half the
bytes, 8 per thread up to 128 dimensions, so that a thread has the elements whose gradients it adds, and 16
from 129 on (where the padded width is a multiple of 8). Adam moves 34 bytes per parameter instead of 32.

Hard negatives are chosen in a launch before the fused kernel, which writes (B, N) item numbers.

Deterministic steps put a sort and a reduction in a fixed order in the place of the atomics. They are slower,
and hold the (B, N + 1) items and coefficients of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttower_kernels.adam.triton_gpu import adam_launch, step_rates
from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.negatives.reference import list_key
from fasttower_kernels.negatives.triton_gpu import exclusion_bytes
from fasttower_kernels.philox import seed_key
from fasttower_kernels.settings import StepSettings, check_on_gpu
from fasttower_kernels.shuffle import epoch_key
from fasttower_kernels.shuffle.triton_gpu import signed_round_keys
from fasttower_kernels.step.device_memory import listed, resident_bytes
from fasttower_kernels.step.lazy_triton_gpu import LazyLaunches, lazy_launches
from fasttower_kernels.step.own_negatives import triton_gpu as own_negatives
from fasttower_kernels.step.own_negatives.pairs_triton_gpu import PairBuffers, add_pair_gradients
from fasttower_kernels.step.own_negatives.triton_gpu import Output
from fasttower_kernels.step.segments_triton_gpu import CHUNK
from fasttower_kernels.step.shared_negatives import triton_gpu as shared_negatives
from fasttower_kernels.step.state import TrainState, steps_per_epoch
from fasttower_kernels.tables import Interactions, Tables
from fasttower_kernels.triton_launch import device_scope, signed_word
from fasttower_kernels.triton_tiles import warp_lanes

STEPS_PER_GRAPH = 32
"""Steps captured together; what is left over is replayed one by one."""


class Steps:
    """See `Step`: the launches of a step, the buffers that they share, and the graphs made of them.

    It keeps the arrays of the state, whose addresses the launches hold.

    Args:
        state: on a CUDA device (under Triton's interpreter: on the CPU).
        interactions: on the same device, like the negatives.
        negatives: of the same part.
        settings: of the steps.
        graphs: replay CUDA graphs; otherwise each step is launched from the host.

    Raises:
        FastTowerError: the device has too little memory for what the steps need besides their arguments, or
            the settings ask for what the kernels cannot do.
    """

    def __init__(
        self,
        state: TrainState,
        interactions: Interactions,
        negatives: Negatives,
        settings: StepSettings,
        *,
        graphs: bool = True,
    ) -> None:
        check_on_gpu(
            settings.loss, settings.negatives, settings.optimiser, deterministic=settings.deterministic
        )
        self.negatives = negatives
        self.settings = settings
        self.interactions = interactions
        self.parameters = state.parameters
        self.gradients = state.gradients
        self.device = state.parameters.users.device
        self.batch_size = min(settings.batch_size, len(interactions))
        self.steps = steps_per_epoch(len(interactions), settings.batch_size)
        self.with_graphs = graphs and self.device.type == "cuda" and not settings.deterministic
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        with device_scope(self.device):
            try:
                self._prepare(state)
            except torch.OutOfMemoryError as error:
                raise FastTowerError(self._no_room()) from error

    def _prepare(self, state: TrainState) -> None:
        settings, loss = self.settings, self.settings.loss
        num_users, width = self.parameters.users.shape
        self.rounded = _rounded(self.parameters) if settings.table_dtype == "bfloat16" else None
        self.read = self.rounded or self.parameters
        self.words = torch.empty(10, dtype=torch.int32, device=self.device)
        self.counters = torch.empty(2, dtype=torch.int64, device=self.device)
        self.rates = torch.empty((self.steps, 2), dtype=torch.float32, device=self.device)
        count = settings.negatives.count
        self.pairs = (
            PairBuffers.empty(self.batch_size, count, self.device) if settings.deterministic else None
        )
        self.lazy: LazyLaunches | None = None
        self.batch: own_negatives.OwnLaunches | shared_negatives.SharedLaunches
        shared: dict[str, Any] = {
            "words": self.words,
            "counters": self.counters,
            "batch_size": self.batch_size,
            "shuffle": True,
        }
        arrays = self.read, self.gradients, self.interactions, self.negatives, loss
        if settings.negatives.is_shared:
            block_size = settings.negatives.block_size
            programs = shared_negatives.num_programs(self.read.users, self.batch_size, block_size)
            self.losses = torch.empty(programs, dtype=torch.float64, device=self.device)
            self.batch = shared_negatives.shared_launches(*arrays, losses=self.losses, **shared)
        else:
            programs = own_negatives.num_programs(self.batch_size, width, warp_lanes())
            self.losses = torch.empty(programs, dtype=torch.float64, device=self.device)
            own = own_negatives.own_launches(
                *arrays,
                losses=self.losses,
                output=Output.PAIRS if settings.deterministic else Output.GRADIENTS,
                pair_buffers=self.pairs,
                **shared,
            )
            self.batch = own
            lazy = settings.lazy_tables(num_users, len(self.parameters.items), width)
            if any(lazy):
                self.lazy = lazy_launches(state, own.step, self.rates, lazy, rounded=self.rounded)
        if self.lazy is not None:
            self.update = self.lazy.update
        else:
            self.update = adam_launch(
                state.parameters,
                state.gradients,
                state.moments_1,
                state.moments_2,
                rates=self.rates,
                counters=self.counters,
                rounded=self.rounded,
            )

    def run(self, first_step: int, num_steps: int) -> Tensor:
        """See `Step.run`; reading the result waits for the steps."""
        with device_scope(self.device):
            try:
                return self._run(first_step, num_steps)
            except torch.OutOfMemoryError as error:
                raise FastTowerError(self._no_room()) from error

    def _run(self, first_step: int, num_steps: int) -> Tensor:
        self._send(first_step, num_steps)
        if self.pairs is not None:
            for step in range(first_step, first_step + num_steps):
                self._step(step % self.steps)
        elif not self.with_graphs:
            self._steps(num_steps)
        else:
            if not self.graphs:
                # The first step is launched: it compiles and loads the kernels, which a capture may not do.
                self._steps(1)
                num_steps -= 1
                self.graphs = {size: self._capture(size) for size in (STEPS_PER_GRAPH, 1)}
            for size, graph in self.graphs.items():
                for _ in range(num_steps // size):
                    graph.replay()
                num_steps %= size
        if self.lazy is not None:
            self.lazy.at_the_end()
        return self.losses.sum()

    def _no_room(self) -> str:
        """What to say where the device's memory runs out."""
        known, settings = self.negatives.known_positives, self.settings
        num_users, width = self.parameters.users.shape
        sizes = resident_bytes(
            num_users=num_users,
            num_items=len(self.parameters.items),
            width=width,
            num_rows=len(self.interactions),
            num_known=0 if known is None else len(known.items),
            bits=0 if known is None else exclusion_bytes(known),
            table_dtype=settings.table_dtype,
        )
        if settings.negatives.pool:
            sizes["hard negatives of a batch"] = 4 * settings.batch_size * settings.negatives.count
        if settings.deterministic:
            pairs = settings.batch_size * (1 + settings.negatives.count)
            # Items and coefficients, what the sort makes of them (keys, order and as much to work in), and
            # the partial sums.
            sizes["pairs of the deterministic mode"] = (4 + 4 + 2 * (4 + 8) + 4 * width // CHUNK) * pairs
        return (
            f"{self.device} ran out of memory; training needs {listed(sizes)}: "
            "choose a smaller batch_size or embedding_dim, or device cpu."
        )

    def _send(self, first_step: int, num_steps: int) -> None:
        """Set the buffers for the steps. From pinned memory: the host need not wait for earlier steps."""
        settings = self.settings
        epoch, first_batch = divmod(first_step, self.steps)
        order = epoch_key(settings.seed, epoch)
        key = seed_key(settings.seed)
        key = list_key(key) if settings.negatives.is_shared else key
        words = [*map(signed_word, key), *signed_round_keys(order)]
        _send(torch.tensor(words, dtype=torch.int32), self.words)
        _send(torch.tensor([first_step, first_step], dtype=torch.int64), self.counters)
        _send(
            step_rates(first_step + 1, num_steps, settings.learning_rate),
            self.rates[first_batch : first_batch + num_steps],
        )
        self.losses.zero_()
        if self.rounded is not None:
            self.rounded.users.copy_(self.parameters.users)
            self.rounded.items.copy_(self.parameters.items)
        if self.lazy is not None:
            for stamps in self.lazy.stamps:
                stamps.fill_(first_batch)

    def _steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._step()

    def _step(self, batch: int | None = None) -> None:
        """One step. Without floating-point atomics the host must know which batch it is, for its length."""
        self.batch()
        if self.pairs is not None and batch is not None:
            count = self.settings.negatives.count
            length = min(self.batch_size, len(self.interactions) - batch * self.batch_size)
            pairs = self.pairs.first(length, count)
            add_pair_gradients(self.read, self.gradients, pairs, self.settings.loss, count)
        self.update()

    def _capture(self, num_steps: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Its default stream is of the device that was current at the process's first capture, and another
        # thread's allocation would break a capture that takes everybody's calls for its own.
        stream = torch.cuda.Stream(self.words.device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._steps(num_steps)
        return graph


def _rounded(parameters: Tables) -> Tables:
    """Room for the tables as the loss reads them: users and items in bfloat16, the item bias itself."""
    users, items = (
        torch.empty_like(table, dtype=torch.bfloat16) for table in (parameters.users, parameters.items)
    )
    return Tables(users, items, parameters.item_bias)


def _send(source: Tensor, target: Tensor) -> None:
    if target.is_cuda:
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)
