"""Many steps on a GPU: two launches a step, and no word from the host inside a call.

A step is the fused kernel and Adam: of a table all rows, or, lazily, those that the next batch reads, and
all of them at the end of a call. Each finds its step in counters in device memory, derives the batch and
its length from it, and so may be replayed by a CUDA graph at any step, the short last batch included. The
host sends the keys of the epoch's order and Adam's step sizes before the first step, and gets the loss
after the last one.

With bfloat16 tables the loss reads a rounded copy of users and items, which each launch that updates a row
writes beside it, and a call begins with making it anew. Of a vector the fused kernel then reads half the
bytes, 8 per thread up to 128 dimensions, so that a thread has the elements whose gradients it adds, and 16
from 129 on (where the padded width is a multiple of 8). Adam moves 34 bytes per parameter instead of 32.

Deterministic mode (``torch.use_deterministic_algorithms(True)``) puts a sort and a reduction in a fixed
order in the place of the atomics. It is slower, and holds the (B, N + 1) items and coefficients of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fasttower_kernels.adam.triton_gpu import adam_launch, step_rates
from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives.triton_gpu import exclusion_bytes
from fasttower_kernels.philox import seed_key
from fasttower_kernels.sampled_bce.triton_gpu import (
    Output,
    PairBuffers,
    add_pair_gradients,
    bce_launch,
    num_programs,
)
from fasttower_kernels.sampled_bce.triton_segments import CHUNK
from fasttower_kernels.shuffle import epoch_key
from fasttower_kernels.shuffle.triton_gpu import signed_round_keys
from fasttower_kernels.tables import Interactions, Tables
from fasttower_kernels.train_steps.device_memory import listed, resident_bytes
from fasttower_kernels.train_steps.lazy_triton_gpu import lazy_launches
from fasttower_kernels.train_steps.state import StepSettings, TrainState, steps_per_epoch
from fasttower_kernels.triton_launch import device_scope, signed_word
from fasttower_kernels.triton_tiles import warp_lanes

STEPS_PER_GRAPH = 32
"""Steps captured together; what is left over is replayed one by one."""


def run_steps(
    state: TrainState,
    interactions: Interactions,
    known_positives: KnownPositives | None,
    settings: StepSettings,
    *,
    first_step: int,
    num_steps: int,
    graphs: bool = True,
) -> Tensor:
    """See the operator's `run_steps`.

    Args:
        state: on a CUDA device (under Triton's interpreter: on the CPU).
        interactions: on the same device, like the known positives.
        known_positives: or None.
        settings: of the steps.
        first_step: t of the first step.
        num_steps: how many.
        graphs: replay CUDA graphs; otherwise each step is launched from the host.

    Returns:
        float64 scalar on the state's device; reading it waits for the steps.

    Raises:
        FastTowerError: the device has too little memory for what the steps need besides their arguments.
    """
    device = state.parameters.users.device
    with device_scope(device):
        try:
            plan = _plan(state, interactions, known_positives, settings)
            return plan.run(first_step, num_steps, graphs=graphs and device.type == "cuda")
        except torch.OutOfMemoryError as error:
            raise FastTowerError(_no_room(state, interactions, known_positives, settings)) from error


def _no_room(
    state: TrainState,
    interactions: Interactions,
    known_positives: KnownPositives | None,
    settings: StepSettings,
) -> str:
    num_users, width = state.parameters.users.shape
    sizes = resident_bytes(
        num_users=num_users,
        num_items=len(state.parameters.items),
        width=width,
        num_rows=len(interactions),
        num_known=0 if known_positives is None else len(known_positives.items),
        bits=0 if known_positives is None else exclusion_bytes(known_positives),
        table_dtype=settings.table_dtype,
    )
    if torch.are_deterministic_algorithms_enabled():
        pairs = settings.batch_size * (1 + settings.loss.num_negatives)
        # Items and coefficients, what the sort makes of them (keys, order and as much to work in), and the
        # partial sums.
        sizes["pairs of the deterministic mode"] = (4 + 4 + 2 * (4 + 8) + 4 * width // CHUNK) * pairs
    return (
        f"{state.parameters.users.device} ran out of memory; training needs {listed(sizes)}: "
        "choose a smaller batch_size or embedding_dim, or device cpu."
    )


@dataclass(frozen=True)
class _Inputs:
    """What a plan was made for. Identity, not value: the kernels hold the addresses."""

    interactions: Interactions
    known_positives: KnownPositives | None
    settings: StepSettings
    deterministic: bool

    def same(self, other: _Inputs) -> bool:
        return (
            self.interactions is other.interactions
            and self.known_positives is other.known_positives
            and self.settings == other.settings
            and self.deterministic == other.deterministic
        )


def _plan(
    state: TrainState,
    interactions: Interactions,
    known_positives: KnownPositives | None,
    settings: StepSettings,
) -> _Plan:
    """The plan of these arguments: made anew when they change, forgotten with the state."""
    inputs = _Inputs(interactions, known_positives, settings, torch.are_deterministic_algorithms_enabled())
    plan: _Plan | None = state.prepared.get(__name__)
    if plan is None or not plan.inputs.same(inputs):
        plan = state.prepared[__name__] = _Plan(state, inputs)
    return plan


class _Plan:
    """The launches of a step, the buffers that they share, and the graphs made of them.

    It keeps the arrays of the state and never the state itself, so that both can be forgotten.
    """

    def __init__(self, state: TrainState, inputs: _Inputs) -> None:
        settings, device = inputs.settings, state.parameters.users.device
        batch_size = min(settings.batch_size, len(inputs.interactions))
        self.inputs = inputs
        self.batch_size = batch_size
        self.parameters = state.parameters
        self.gradients = state.gradients
        self.rounded = _rounded(state.parameters) if settings.table_dtype == "bfloat16" else None
        self.read = self.rounded or self.parameters
        self.steps = steps_per_epoch(len(inputs.interactions), settings.batch_size)
        self.words = torch.empty(10, dtype=torch.int32, device=device)
        self.counters = torch.empty(2, dtype=torch.int64, device=device)
        self.rates = torch.empty((self.steps, 2), dtype=torch.float32, device=device)
        self.losses = torch.empty(
            num_programs(batch_size, state.parameters.users.shape[1], warp_lanes()),
            dtype=torch.float64,
            device=device,
        )
        self.pairs = (
            PairBuffers.empty(batch_size, settings.loss.num_negatives, device)
            if inputs.deterministic
            else None
        )
        self.bce = bce_launch(
            self.read,
            state.gradients,
            inputs.interactions,
            inputs.known_positives,
            settings.loss,
            words=self.words,
            counters=self.counters,
            losses=self.losses,
            output=Output.PAIRS if inputs.deterministic else Output.GRADIENTS,
            batch_size=batch_size,
            shuffle=True,
            pair_buffers=self.pairs,
        )
        lazy = settings.lazy_tables(state.parameters)
        self.lazy = (
            lazy_launches(state, self.bce, self.rates, lazy, rounded=self.rounded) if any(lazy) else None
        )
        self.update = (
            self.lazy.update
            if self.lazy is not None
            else adam_launch(
                state.parameters,
                state.gradients,
                state.moments_1,
                state.moments_2,
                rates=self.rates,
                counters=self.counters,
                rounded=self.rounded,
            )
        )
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def run(self, first_step: int, num_steps: int, *, graphs: bool) -> Tensor:
        """Run the steps and return the sum of their losses."""
        self._send(first_step, num_steps)
        if self.pairs is not None:
            for step in range(first_step, first_step + num_steps):
                self._step(step % self.steps)
        elif not graphs:
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

    def _send(self, first_step: int, num_steps: int) -> None:
        """Set the buffers for the steps. From pinned memory: the host need not wait for earlier steps."""
        settings = self.inputs.settings
        epoch, first_batch = divmod(first_step, self.steps)
        order = epoch_key(settings.seed, epoch)
        words = [*map(signed_word, seed_key(settings.seed)), *signed_round_keys(order)]
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
        self.bce()
        if self.pairs is not None and batch is not None:
            loss = self.inputs.settings.loss
            length = min(self.batch_size, len(self.inputs.interactions) - batch * self.batch_size)
            pairs = self.pairs.first(length, loss.num_negatives)
            add_pair_gradients(self.read, self.gradients, pairs, loss)
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
