"""The training step on a GPU, beside plain torch and torch.compile in the same run.

    python -m benchmarks.gpu_training_step                       every shape; a table and a JSON
    python -m benchmarks.gpu_training_step --prepare FOLDER      only generate the data, into that folder
    python -m benchmarks.gpu_training_step --prepared FOLDER     read them from there

Each variant trains some steps of an epoch, three times; the fastest counts, and the epoch is that time a step
by its steps. Variants:

    fused             two launches a step, exact exclusion of known positives, item bias, L2, dense Adam;
                      CUDA graphs
    fused, launched   the same without graphs
    fused, lazy       the same with graphs, Adam for the rows in use alone; all rows at the end of the steps
    fused, bf16       fused with bfloat16 user and item vectors under float32 tables; at large shapes
    lazy, bf16        the same of fused, lazy
    fused, plain      the same with graphs, negatives drawn from the whole catalogue
    eager             torch: permutation, randint, embedding, bmm, BCE with logits, fused dense Adam
    compiled          the same with the loss through torch.compile

Eager and compiled draw from the whole catalogue, have no L2, and so do less.

`share` is a step's traffic over its time, over the bandwidth of a large copy (bytes read and written).
Traffic counts what the step must read and write if nothing stayed in a cache: 12 bytes a float of each user
and item vector (read, and read and written to add its gradient) and of each item's bias, 8 bytes a
positive, a sector of 32 bytes a negative for the exclusion, and Adam's 32 bytes a parameter; with bfloat16
vectors 10 bytes a float of a vector, and 34 a parameter. Where the
tables fit in L2 it may pass 1. Lazy Adam has none: its traffic is that of the rows that batches share.

Without a CUDA device it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.sampled_bce import LossSettings
from fasttower_kernels.tables import Interactions, Tables, padded
from fasttower_kernels.train_steps import Optimiser, StepSettings, TableDtype, TrainState, steps_per_epoch

DATA = ("synthetic-1m", "synthetic-20m")
DIMS = (64, 16, 128)
BATCH_SIZES = (65_536, 8_192, 1_024)
NUM_NEGATIVES = 10
LEARNING_RATE = 1e-3
REPEATS = 3
FUSED_POSITIVES, TORCH_POSITIVES = 2_000_000, 400_000  # trained in one timing, about
PREPARE_LIMIT_S = 240
BFLOAT16_DATA, BFLOAT16_DIM = "synthetic-20m", 64  # from this dimension on: to keep the suite short
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One variant at one shape.

    Attributes:
        data: its name.
        dim: D.
        batch_size: B.
        variant: see the module.
        steps: measured in one timing.
        epoch_s: seconds for all steps of an epoch.
        positives_per_s: positives trained a second.
        pairs_per_s: scored pairs a second, 1 + N a positive.
        share: of the copy bandwidth; None for lazy Adam and for torch, which move other bytes.
        peak_bytes: allocated during the steps, above what was there before.
    """

    data: str
    dim: int
    batch_size: int
    variant: str
    steps: int
    epoch_s: float
    positives_per_s: float
    pairs_per_s: float
    share: float | None
    peak_bytes: int


@dataclass(frozen=True)
class Positives:
    """A data set on the device."""

    name: str
    interactions: Interactions
    known: KnownPositives
    num_users: int
    num_items: int


def generate(name: str) -> tuple[np.ndarray, np.ndarray]:
    """User and item indices of a synthetic data set."""
    from fasttower.data.synthetic import generate as generate_ratings

    ratings = generate_ratings(name, seed=0)
    return ratings.user_id - 1, ratings.item_id - 1


def awaited(file: Path) -> Path:
    """The file, once it is there."""
    end = time.monotonic() + PREPARE_LIMIT_S
    while not file.exists():
        if time.monotonic() > end:
            raise SystemExit(f"{file} is not there after {PREPARE_LIMIT_S} s; run --prepare with its folder.")
        time.sleep(0.2)
    return file


def load(name: str, prepared: Path | None, device: torch.device) -> Positives:
    """A data set, newly generated, or from a file that another process prepares."""
    pairs = np.stack(generate(name)) if prepared is None else np.load(awaited(prepared / f"{name}.npy"))
    users, items = torch.from_numpy(pairs.astype(np.int32))
    num_users, num_items = int(users.max()) + 1, int(items.max()) + 1
    known = KnownPositives.from_pairs(users, items, num_users, num_items).to(device)
    return Positives(name, Interactions(users.to(device), items.to(device)), known, num_users, num_items)


def start_tables(positives: Positives, dim: int, device: torch.device) -> Tables:
    generator = torch.Generator(device).manual_seed(0)
    users, items = (
        torch.randn(n, padded(dim), generator=generator, device=device).mul_(0.1 / dim**0.5)
        for n in (positives.num_users, positives.num_items)
    )
    return Tables(users, items, torch.zeros(positives.num_items, device=device))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes read and written a second by a device-to-device copy."""
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(seconds(lambda: target.copy_(source), device) for _ in range(10))


def traffic(
    positives: Positives, batch_size: int, width: int, *, exclude: bool, bfloat16: bool = False
) -> int:
    """Bytes a step moves; see the module."""
    pairs = 1 + NUM_NEGATIVES
    vectors = (10 if bfloat16 else 12) * width * (1 + pairs) * batch_size
    table_parameters = (positives.num_users + positives.num_items) * width
    adam = 32 * (table_parameters + positives.num_items) + 2 * bfloat16 * table_parameters
    sectors = 32 * NUM_NEGATIVES * batch_size if exclude else 0
    return vectors + 12 * pairs * batch_size + 8 * batch_size + sectors + adam


def fused(
    positives: Positives,
    dim: int,
    batch_size: int,
    steps: int,
    *,
    exclude: bool = True,
    graphs: bool = True,
    optimiser: Optimiser = "adam",
    table_dtype: TableDtype = "float32",
):
    """A function that trains the first steps of an epoch with the Triton backend."""
    from fasttower_kernels.train_steps import triton_gpu

    loss = LossSettings(NUM_NEGATIVES, l2=0.01)
    settings = StepSettings(
        loss, LEARNING_RATE, batch_size, seed=0, optimiser=optimiser, table_dtype=table_dtype
    )
    state = TrainState.start(start_tables(positives, dim, positives.interactions.user_index.device))

    def run() -> Tensor:
        return triton_gpu.run_steps(
            state,
            positives.interactions,
            positives.known if exclude else None,
            settings,
            first_step=0,
            num_steps=steps,
            graphs=graphs,
        )

    return run


def batch_loss(
    users: Tensor, items: Tensor, bias: Tensor, user: Tensor, item: Tensor, labels: Tensor
) -> Tensor:
    """The mean BCE of a batch: user (B,), item and labels (B, 1 + N)."""
    vectors = F.embedding(item, items)  # [B, 1 + N, D]
    logits = torch.bmm(vectors, F.embedding(user, users)[:, :, None])[:, :, 0]
    logits = logits + F.embedding(item, bias[:, None])[:, :, 0]
    return F.binary_cross_entropy_with_logits(logits, labels)


def plain_torch(positives: Positives, dim: int, batch_size: int, steps: int, loss_of: Callable[..., Tensor]):
    """A function that trains the first steps of an epoch, whose order is drawn before, with torch alone."""
    device = positives.interactions.user_index.device
    parameters = [table.requires_grad_() for table in start_tables(positives, dim, device)]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
    labels = torch.zeros(batch_size, 1 + NUM_NEGATIVES, device=device)
    labels[:, 0] = 1
    user_index, item_index = positives.interactions.user_index, positives.interactions.item_index
    order = torch.randperm(len(positives.interactions), device=device)[: steps * batch_size]

    def run() -> None:
        for rows in order.split(batch_size):
            user, item = user_index[rows], item_index[rows]
            negatives = torch.randint(
                positives.num_items, (len(rows), NUM_NEGATIVES), device=device, dtype=item.dtype
            )
            loss = loss_of(*parameters, user, torch.cat([item[:, None], negatives], 1), labels[: len(rows)])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def measure(
    positives: Positives, dim: int, batch_size: int, variant: str, run, steps: int, bandwidth: float
) -> Row:
    """Warm up, time, and put the figures together."""
    device = positives.interactions.user_index.device
    run()
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    step_s = min(seconds(run, device) for _ in range(REPEATS)) / steps
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    num_rows = len(positives.interactions)
    batch = min(batch_size, num_rows)
    share = None
    if variant.startswith("fused") and "lazy" not in variant:
        moved = traffic(
            positives, batch, padded(dim), exclude="plain" not in variant, bfloat16="bf16" in variant
        )
        share = moved / step_s / bandwidth
    return Row(
        positives.name,
        dim,
        batch_size,
        variant,
        steps,
        epoch_s=step_s * steps_per_epoch(num_rows, batch_size),
        positives_per_s=batch / step_s,
        pairs_per_s=batch / step_s * (1 + NUM_NEGATIVES),
        share=share,
        peak_bytes=peak,
    )


def measure_shape(
    positives: Positives, dim: int, batch_size: int, bandwidth: float, *, compile_too: bool
) -> list[Row]:
    """All variants at one shape."""
    # Whole batches only, so that a step is a step.
    whole = max(1, len(positives.interactions) // batch_size)
    fused_steps = min(whole, max(20, FUSED_POSITIVES // batch_size))
    torch_steps = min(whole, max(5, TORCH_POSITIVES // batch_size))
    variants = {
        "fused": (fused_steps, lambda n: fused(positives, dim, batch_size, n)),
        "fused, launched": (fused_steps, lambda n: fused(positives, dim, batch_size, n, graphs=False)),
        "fused, lazy": (
            fused_steps,
            lambda n: fused(positives, dim, batch_size, n, optimiser="lazy_adam"),
        ),
        "fused, plain": (fused_steps, lambda n: fused(positives, dim, batch_size, n, exclude=False)),
        "eager": (torch_steps, lambda n: plain_torch(positives, dim, batch_size, n, batch_loss)),
    }
    if positives.name == BFLOAT16_DATA and dim >= BFLOAT16_DIM:
        for variant, optimiser in (("fused, bf16", "adam"), ("lazy, bf16", "lazy_adam")):
            variants[variant] = (
                fused_steps,
                lambda n, optimiser=optimiser: fused(
                    positives, dim, batch_size, n, optimiser=optimiser, table_dtype="bfloat16"
                ),
            )
    if compile_too:
        torch.compiler.reset()
        loss = torch.compile(batch_loss, dynamic=False)
        variants["compiled"] = (torch_steps, lambda n: plain_torch(positives, dim, batch_size, n, loss))
    return [
        measure(positives, dim, batch_size, variant, make(steps), steps, bandwidth)
        for variant, (steps, make) in variants.items()
    ]


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table; the ratio is that of the epoch to the fused one's of the same shape."""
    lines = [
        "| data | dim | batch | variant | epoch s | positives/s | pairs/s | share | peak MB | times fused |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    fused_epoch = {(r.data, r.dim, r.batch_size): r.epoch_s for r in rows if r.variant == "fused"}
    for row in rows:
        ratio = row.epoch_s / fused_epoch[row.data, row.dim, row.batch_size]
        share = "" if row.share is None else f"{row.share:.2f}"
        lines.append(
            f"| {row.data} | {row.dim} | {row.batch_size:,} | {row.variant} | {row.epoch_s:.4f} "
            f"| {row.positives_per_s:.3g} | {row.pairs_per_s:.3g} | {share} | {row.peak_bytes / 1e6:.0f} "
            f"| {ratio:.2f} |"
        )
    return "\n".join(lines)


def about(device: torch.device, bandwidth: float) -> dict[str, object]:
    """What the figures were measured on."""
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "copy_bytes_per_s": bandwidth,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": np.__version__,
        "python": sys.version.split()[0],
        "num_negatives": NUM_NEGATIVES,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prepare", type=Path, help="only generate the data, into this folder")
    parser.add_argument("--prepared", type=Path, help="folder that --prepare filled")
    parser.add_argument("--data", nargs="+", default=DATA)
    parser.add_argument("--dims", nargs="+", type=int, default=DIMS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=BATCH_SIZES)
    parser.add_argument("--compile-s", type=float, default=90, help="start no torch.compile after so long")
    parser.add_argument("--limit-s", type=float, default=300, help="start no shape after so long")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_training_step.json")
    asked = parser.parse_args()
    if asked.prepare:
        asked.prepare.mkdir(parents=True, exist_ok=True)
        for name in asked.data:
            unfinished = asked.prepare / f"unfinished-{name}.npy"
            np.save(unfinished, np.stack(generate(name)))
            unfinished.rename(asked.prepare / f"{name}.npy")
        return 0
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; nothing was measured", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    bandwidth = copy_bandwidth(device)
    rows: list[Row] = []
    left_out: list[str] = []
    start = time.perf_counter()
    compile_spent = 0.0
    for name in asked.data:
        positives = load(name, asked.prepared, device)
        for dim in asked.dims:
            for batch_size in asked.batch_sizes:
                shape = f"{name}, dim {dim}, batch {batch_size}"
                if time.perf_counter() - start > asked.limit_s:
                    left_out.append(shape)
                    continue
                compile_too = compile_spent < asked.compile_s
                if not compile_too:
                    left_out.append(f"{shape}: compiled")
                began = time.perf_counter()
                rows += measure_shape(positives, dim, batch_size, bandwidth, compile_too=compile_too)
                compile_spent += (time.perf_counter() - began) * compile_too
                print(f"{shape}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    facts = about(device, bandwidth)
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text(
        json.dumps({"about": facts, "rows": [asdict(row) for row in rows], "left_out": left_out}, indent=1)
        + "\n"
    )
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"\n{table(rows)}")
    if left_out:
        print(f"\nleft out, for want of time: {'; '.join(left_out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
