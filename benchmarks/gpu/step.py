"""The training step on a GPU, beside plain torch and torch.compile in the same run.

    python -m benchmarks.gpu.step FOLDER                                      synthetic-20m, 64 dimensions
    python -m benchmarks.gpu.step FOLDER --data synthetic-1m --dims 64 16     other shapes

One row per variant and shape goes to FOLDER/step.json as soon as it is measured. A row holds the fastest of
up to three runs, of a whole epoch or, where ``steps`` is fewer than ``epoch_steps``, of these steps, from
which the epoch follows. Every fused variant has an item bias, L2 and CUDA graphs, and but for the softmax
ones BCE with 10 negatives of each positive's own:

    auto                 the optimiser that the sizes choose
    dense                Adam over whole tables; negatives leave known positives out by bitmaps
    lazy                 Adam only for the rows in use; all rows at the end of the run
    dense bf16           the same with bfloat16 user and item vectors under float32 tables
    lazy bf16            likewise
    softmax              dense, with the sampled softmax of 10 negatives of each positive's own
    softmax in-batch     dense, blocks of 512 positives scored against the block's own 512 items
    dense launched       without graphs
    dense filters        known positives left out by hashed filters and searches instead of bitmaps
    dense catalogue      negatives from the whole catalogue
    dense deterministic  without floating-point atomics
    eager                torch: permutation, randint, embedding, bmm, BCE with logits, fused dense Adam
    compiled             the same with the loss through torch.compile

Eager and compiled draw from the whole catalogue and have no L2, and so do less.

``share`` is a step's traffic over its time, over the bandwidth of a large copy (bytes read and written).
Traffic counts what the step must read and write if nothing stayed in a cache: 12 bytes per float of each user
and item vector (read, and read and written to add its gradient) and of each item's bias, 8 bytes per
positive, a sector of 32 bytes per negative for the bitmaps, and Adam's 32 bytes per parameter; with bfloat16
vectors 10 bytes per float of a vector, and 34 per parameter. Where the tables fit in L2 it may pass 1. Only
dense variants with BCE and bitmaps have one.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from benchmarks.gpu.data import Positives, draw
from benchmarks.gpu.results import Results
from benchmarks.gpu.timing import best_seconds, copy_bytes_per_s, wait
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.negatives import triton_gpu as negatives_triton
from fasttower_kernels.settings import LossSettings, NegativeSettings, Optimiser, StepSettings, TableDtype
from fasttower_kernels.step import TrainState, steps_per_epoch, triton_gpu
from fasttower_kernels.tables import padded

BATCH_SIZES = (65_536, 8_192, 1_024)
NUM_NEGATIVES = 10
BCE = LossSettings(user_l2=0.01, item_l2=0.01)
SOFTMAX = replace(BCE, name="softmax")
OWN = NegativeSettings(count=NUM_NEGATIVES)
IN_BATCH = NegativeSettings("in-batch", block_size=512)
LEARNING_RATE = 1e-3
PARTIAL_POSITIVES = 400_000  # trained in one run of the variants that do not run a whole epoch

Steps = Callable[[int], object]
"""Trains that many steps, from the first step of an epoch."""


@dataclass(frozen=True)
class Fused:
    """A variant of the Triton backend; see the module."""

    optimiser: Optimiser = "adam"
    table_dtype: TableDtype = "float32"
    exclusion: str | None = "bitmaps"
    graphs: bool = True
    deterministic: bool = False
    loss: LossSettings = BCE
    negatives: NegativeSettings = OWN

    @property
    def whole_epoch(self) -> bool:
        """Whether a run is an epoch."""
        return self.graphs and not self.deterministic

    def steps(self, positives: Positives, dim: int, batch_size: int) -> Steps:
        """A new model, and what trains it."""
        settings = StepSettings(
            LEARNING_RATE,
            batch_size,
            0,
            self.loss,
            self.negatives,
            self.optimiser,
            self.table_dtype,
            self.deterministic,
        )
        state = TrainState.start(positives.start_tables(dim))
        known, interactions = positives.known, positives.interactions
        if self.exclusion == "filters":
            # A copy, without the bitmaps that the other one has.
            known = KnownPositives(known.indptr, known.items, known.num_items)
        excluded = known if self.exclusion else None
        negatives = Negatives.of(self.negatives, interactions, known.num_users, known.num_items, excluded)
        with _largest_bitmap(0) if self.exclusion == "filters" else contextlib.nullcontext():
            steps = triton_gpu.Steps(state, interactions, negatives, settings, graphs=self.graphs)
        return lambda num_steps: steps.run(0, num_steps)

    def traffic_bytes(self, positives: Positives, dim: int, batch_size: int) -> int | None:
        """What a step moves; see the module."""
        if self != Fused(table_dtype=self.table_dtype, graphs=self.graphs):
            return None
        rounded, width, pairs = self.table_dtype == "bfloat16", padded(dim), 1 + NUM_NEGATIVES
        vectors = (10 if rounded else 12) * width * (1 + pairs) * batch_size
        table_parameters = (positives.known.num_users + positives.known.num_items) * width
        adam = 32 * (table_parameters + positives.known.num_items) + 2 * rounded * table_parameters
        return vectors + (12 * pairs + 8 + 32 * NUM_NEGATIVES) * batch_size + adam


@dataclass(frozen=True)
class Plain:
    """A variant in plain torch."""

    compiled: bool = False

    whole_epoch = False

    def steps(self, positives: Positives, dim: int, batch_size: int) -> Steps:
        """A new model, and what trains it, in an order drawn before."""
        device, num_items = positives.known.items.device, positives.known.num_items
        parameters = [table.requires_grad_() for table in positives.start_tables(dim)]
        optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
        labels = torch.zeros(batch_size, 1 + NUM_NEGATIVES, device=device)
        labels[:, 0] = 1
        user_index, item_index = positives.interactions.user_index, positives.interactions.item_index
        order = torch.randperm(len(positives.interactions), device=device)
        if self.compiled:
            torch.compiler.reset()
        loss_of = torch.compile(batch_loss, dynamic=False) if self.compiled else batch_loss

        def run(num_steps: int) -> None:
            for rows in order[: num_steps * batch_size].split(batch_size):
                user, item = user_index[rows], item_index[rows]
                negatives = torch.randint(
                    num_items, (len(rows), NUM_NEGATIVES), device=device, dtype=item.dtype
                )
                drawn = torch.cat([item[:, None], negatives], 1)
                loss_of(*parameters, user, drawn, labels[: len(rows)]).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return run

    def traffic_bytes(self, *_: Any) -> None:
        """Not counted."""


def batch_loss(
    users: Tensor, items: Tensor, bias: Tensor, user: Tensor, item: Tensor, labels: Tensor
) -> Tensor:
    """The mean BCE of a batch: user (B,), item and labels (B, 1 + N)."""
    vectors = F.embedding(item, items)  # [B, 1 + N, D]
    logits = torch.bmm(vectors, F.embedding(user, users)[:, :, None])[:, :, 0]
    logits = logits + F.embedding(item, bias[:, None])[:, :, 0]
    return F.binary_cross_entropy_with_logits(logits, labels)


@contextlib.contextmanager
def _largest_bitmap(size: int):
    before = negatives_triton.BITMAP_LIMIT_BYTES
    negatives_triton.BITMAP_LIMIT_BYTES = size
    try:
        yield
    finally:
        negatives_triton.BITMAP_LIMIT_BYTES = before


# What matters most comes first; each group is measured at every batch size before the next one.
GROUPS: tuple[dict[str, Fused | Plain], ...] = (
    {
        "dense": Fused(),
        "lazy": Fused("lazy_adam"),
        "auto": Fused("auto"),
        "dense bf16": Fused(table_dtype="bfloat16"),
        "lazy bf16": Fused("lazy_adam", "bfloat16"),
    },
    {
        "softmax": Fused(loss=SOFTMAX),
        "softmax in-batch": Fused(loss=SOFTMAX, negatives=IN_BATCH),
    },
    {"eager": Plain()},
    {"compiled": Plain(compiled=True)},
    {
        "dense launched": Fused(graphs=False),
        "dense filters": Fused(exclusion="filters"),
        "dense catalogue": Fused(exclusion=None),
        "dense deterministic": Fused(deterministic=True),
    },
)


def measure(
    positives: Positives, dim: int, batch_size: int, variant: Fused | Plain, copy_rate: float
) -> dict[str, float | int | None]:
    """The figures of one variant at one shape."""
    num_rows, device = len(positives.interactions), positives.known.items.device
    epoch_steps = steps_per_epoch(num_rows, batch_size)
    # Otherwise whole batches only, so that a step is a step.
    partial = min(max(1, num_rows // batch_size), max(20, PARTIAL_POSITIVES // batch_size))
    steps = epoch_steps if variant.whole_epoch else partial
    run = variant.steps(positives, dim, batch_size)
    run(min(steps, 40))  # compiles, and captures graphs
    peak = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    seconds = best_seconds(lambda: run(steps))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before
    traffic = variant.traffic_bytes(positives, dim, batch_size)
    epoch_s = seconds / steps * epoch_steps
    return {
        "epoch_s": epoch_s,
        "step_us": seconds / steps * 1e6,
        "steps": steps,
        "epoch_steps": epoch_steps,
        "positives_per_s": num_rows / epoch_s,
        "share": None if traffic is None else traffic / (seconds / steps) / copy_rate,
        "peak_bytes": peak,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", default="synthetic-20m")
    parser.add_argument("--dims", nargs="+", type=int, default=[64])
    asked = parser.parse_args()
    device = torch.device("cuda")
    results = Results(asked.folder / "step.json")
    copy_rate = copy_bytes_per_s(device)
    results.add(data="none", variant="copy", bytes_per_s=copy_rate)
    positives = draw(asked.data, device)
    for dim in asked.dims:
        for group in GROUPS:
            for batch_size in BATCH_SIZES:
                for name, variant in group.items():
                    shape = {"data": asked.data, "dim": dim, "batch_size": batch_size, "variant": name}
                    try:
                        figures = measure(positives, dim, batch_size, variant, copy_rate)
                    except Exception as error:  # the other rows are measured all the same
                        results.add(**shape, error=repr(error)[:2000])
                        wait()  # raises, and ends the stage, where the device is lost
                    else:
                        results.add(**shape, **figures)
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())
