"""The training step on the CPU beside its baselines: `python -m benchmarks.training_step`.

The shape is MovieLens 1M's with Zipf-distributed items, or with --data ml-1m the 669,182 rows that RePlay's
published protocol trains on. Each way trains in turns of some steps, one after
another and again; the best turn counts, in CPU time, so that a busy machine disturbs all of them alike.
The ways:

    numba               the fused backend with plain sampling, shuffle and gather included
    numba_exclusion     the same with known positives left out and an item bias
    torch               fasttower's plain torch reference, plain sampling
    torch_exclusion     the same with known positives left out and an item bias
    eager_mulsum        a well-written torch loop: autograd, fused Adam, dot products as (u * v).sum(-1)
    eager_bmm           the same with torch.bmm
    sparse_adam         eager_mulsum's loss with sparse embeddings and torch.optim.SparseAdam
    compile             eager_mulsum's loss through torch.compile (--compile)
    dataloader          a Dataset that draws negatives row by row, behind a DataLoader (--dataloader)
    c_limit             benchmarks/c_limit.c through gcc where it is there: no shuffle, no exclusion, no bias

SparseAdam is another optimiser and no fast version of Adam: a row that a batch does not touch keeps its
moments and stays where it is, where Adam decays the ones and moves the other. fasttower's lazy Adam pays for
touched rows alone too, and leaves what Adam leaves.

With --threads 1 2, numba, numba_exclusion and eager_mulsum alone, with each number of threads, in wall time;
that needs a machine that is otherwise idle.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.settings import NegativeSettings, StepSettings
from fasttower_kernels.step import Step, TrainState, steps_per_epoch
from fasttower_kernels.tables import Interactions, Tables

NUM_NEGATIVES = 10
LEARNING_RATE = 1e-3
SHAPES = ((16, 1024), (16, 8192), (64, 1024), (64, 8192))

Steps = Callable[[int], Any]
"""Trains that many steps."""


class Data(NamedTuple):
    """What is trained on."""

    interactions: Interactions
    num_users: int
    num_items: int

    def known_positives(self) -> KnownPositives:
        """Of all rows."""
        pairs = self.interactions.user_index, self.interactions.item_index
        return KnownPositives.from_pairs(*pairs, self.num_users, self.num_items)

    def batch(self, size: int) -> Interactions:
        """The first rows."""
        return Interactions(self.interactions.user_index[:size], self.interactions.item_index[:size])


def make_data(num_users: int = 6_040, num_items: int = 3_706, num_rows: int = 1_000_000) -> Data:
    rng = np.random.default_rng(0)
    weight = 1 / np.arange(1, num_items + 1) ** 0.9
    users = rng.integers(0, num_users, num_rows, dtype=np.int32)
    items = rng.choice(num_items, num_rows, p=weight / weight.sum()).astype(np.int32)
    return Data(Interactions(torch.from_numpy(users), torch.from_numpy(items)), num_users, num_items)


def read_data(name: str) -> Data:
    from fasttower.config import DataConfig
    from fasttower.data.preparation import prepare

    prepared = prepare(name, DataConfig(min_rating=3, valid_fraction=0))
    columns = (torch.tensor(prepared.fit[name].to_numpy()) for name in ("user_index", "item_index"))
    return Data(Interactions(*columns), prepared.users.height, prepared.items.height)


def make_tables(dim: int, data: Data, *, item_bias: bool = False) -> Tables:
    generator = torch.Generator().manual_seed(0)
    users, items = (
        torch.randn(rows, dim, generator=generator) * 0.1 / dim**0.5
        for rows in (data.num_users, data.num_items)
    )
    return Tables(users, items, torch.zeros(data.num_items) if item_bias else None)


def fasttower_way(
    backend: str, dim: int, batch_size: int, data: Data, known: KnownPositives | None = None
) -> Steps:
    state = TrainState.start(make_tables(dim, data, item_bias=known is not None))
    negatives = Negatives(NegativeSettings(count=NUM_NEGATIVES), data.num_users, data.num_items, known)
    settings = StepSettings(LEARNING_RATE, batch_size, seed=1, negatives=negatives.settings)
    step = Step(state, data.interactions, negatives, settings, backend=backend)
    per_epoch = steps_per_epoch(len(data.interactions), batch_size)
    done = 0

    def steps(count: int) -> None:
        nonlocal done
        if done % per_epoch + count > per_epoch:
            done += per_epoch - done % per_epoch
        step.run(done, count)
        done += count

    return steps


def loss_mulsum(users, items, user_index, item_index, labels):
    return F.binary_cross_entropy_with_logits(
        (users[user_index][:, None] * items[item_index]).sum(-1), labels
    )


def loss_bmm(users, items, user_index, item_index, labels):
    logits = torch.bmm(items[item_index], users[user_index][:, :, None])[:, :, 0]
    return F.binary_cross_entropy_with_logits(logits, labels)


def torch_way(loss_of: Callable[..., Any], dim: int, batch_size: int, data: Data) -> Steps:
    tables = make_tables(dim, data)
    parameters = [torch.nn.Parameter(tables.users), torch.nn.Parameter(tables.items)]
    optimiser = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
    return eager_steps(optimiser, partial(loss_of, *parameters), batch_size, data)


def eager_steps(
    optimiser: torch.optim.Optimizer, loss_of: Callable[..., Any], batch_size: int, data: Data
) -> Steps:
    """A torch loop over shuffled rows; the loss is of user index, item index and labels."""
    labels = torch.zeros(batch_size, 1 + NUM_NEGATIVES)
    labels[:, 0] = 1
    users, items = data.interactions.user_index.long(), data.interactions.item_index.long()
    num_rows = len(users)
    order = torch.randperm(num_rows)
    done = 0

    def steps(count: int) -> None:
        nonlocal done
        for _ in range(count):
            rows = order[done * batch_size % (num_rows - batch_size) :][:batch_size]
            done += 1
            negatives = torch.randint(data.num_items, (batch_size, NUM_NEGATIVES))
            item_index = torch.cat([items[rows][:, None], negatives], dim=1)
            optimiser.zero_grad(set_to_none=True)
            loss_of(users[rows], item_index, labels).backward()
            optimiser.step()

    return steps


def sparse_adam_way(dim: int, batch_size: int, data: Data) -> Steps:
    tables = make_tables(dim, data)
    embeddings = [
        torch.nn.Embedding.from_pretrained(table, freeze=False, sparse=True)
        for table in (tables.users, tables.items)
    ]
    optimiser = torch.optim.SparseAdam([embedding.weight for embedding in embeddings], lr=LEARNING_RATE)
    return eager_steps(optimiser, partial(loss_sparse, *embeddings), batch_size, data)


def loss_sparse(users, items, user_index, item_index, labels):
    return F.binary_cross_entropy_with_logits(
        (users(user_index)[:, None] * items(item_index)).sum(-1), labels
    )


class DrawnRows(torch.utils.data.Dataset):
    """A positive and its negatives a row, as notebooks draw them."""

    def __init__(self, data: Data) -> None:
        self.users, self.items = data.interactions.user_index.numpy(), data.interactions.item_index.numpy()
        self.num_items = data.num_items

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, row: int) -> tuple[int, Any, Any]:
        negatives = np.random.randint(0, self.num_items, NUM_NEGATIVES)
        return (
            int(self.users[row]),
            np.concatenate([[self.items[row]], negatives]),
            np.array([1.0] + [0.0] * NUM_NEGATIVES, dtype=np.float32),
        )


def dataloader_way(dim: int, batch_size: int, data: Data) -> Steps:
    tables = make_tables(dim, data)
    parameters = [torch.nn.Parameter(tables.users), torch.nn.Parameter(tables.items)]
    optimiser = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    loader = torch.utils.data.DataLoader(DrawnRows(data), batch_size=batch_size, shuffle=True)
    batches = iter(loader)

    def steps(count: int) -> None:
        nonlocal batches
        for _ in range(count):
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                batch = next(batches)
            users, items, labels = batch
            optimiser.zero_grad()
            loss_mulsum(*parameters, users, items, labels).backward()
            optimiser.step()

    return steps


def c_way(dim: int, batch_size: int, data: Data, folder: Path) -> Steps:
    library = folder / f"c_limit_{dim}.so"
    if not library.exists():
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-ffast-math", "-shared", "-fPIC"]
        source = Path(__file__).with_name("c_limit.c")
        macros = [f"-DD={dim}", f"-DN={NUM_NEGATIVES}"]
        subprocess.run(["gcc", *flags, *macros, source, "-o", library, "-lm"], check=True)
    run = ctypes.CDLL(str(library)).run_steps
    run.restype = ctypes.c_double
    state = TrainState.start(make_tables(dim, data))
    groups = (state.parameters, state.gradients, state.moments_1, state.moments_2)
    pointers = (ctypes.c_void_p * 8)(*(table.data_ptr() for group in groups for table in group))
    rows = (ctypes.c_int64 * 2)(data.num_users, data.num_items)
    done = 0

    def steps(count: int) -> None:
        nonlocal done
        assert state is not None  # its tables must outlive the pointers
        run(
            pointers,
            rows,
            ctypes.c_void_p(data.interactions.user_index.data_ptr()),
            ctypes.c_void_p(data.interactions.item_index.data_ptr()),
            ctypes.c_int64(len(data.interactions)),
            ctypes.c_int64(batch_size),
            ctypes.c_uint32(1),
            ctypes.c_uint32(0),
            ctypes.c_double(LEARNING_RATE),
            ctypes.c_int64(done),
            ctypes.c_int64(count),
        )
        done += count

    return steps


def best_ns(
    ways: dict[str, Steps], batch_size: int, repeats: int, clock: Callable[[], int] = time.process_time_ns
) -> dict[str, float]:
    """Nanoseconds a positive of each way's best turn, in turns; CPU time if no other clock is given."""
    best = dict.fromkeys(ways, float("inf"))
    for steps in ways.values():
        steps(2)
    for _ in range(repeats):
        for name, steps in ways.items():
            fused = name.startswith(("numba", "c_"))
            count = max(2, (65_536 if fused else 16_384) // batch_size)
            start = clock()
            steps(count)
            best[name] = min(best[name], (clock() - start) / (count * batch_size))
    return best


def compare_threads(counts: list[int], data: Data, repeats: int) -> None:
    """Print what each number of threads makes of a way."""
    known = data.known_positives()

    def with_threads(count: int, steps: Steps) -> Steps:
        def set_and_run(num_steps: int) -> None:
            torch.set_num_threads(count)
            steps(num_steps)

        return set_and_run

    for dim, batch_size in SHAPES:
        ways = {}
        for count in counts:
            made = {
                "numba": fasttower_way("numba", dim, batch_size, data),
                "numba_exclusion": fasttower_way("numba", dim, batch_size, data, known),
                "eager_mulsum": torch_way(loss_mulsum, dim, batch_size, data),
            }
            ways |= {f"{name} {count}": with_threads(count, steps) for name, steps in made.items()}
        best = best_ns(ways, batch_size, repeats, time.perf_counter_ns)
        print(f"\ndim {dim}, batch {batch_size}; ns a positive")
        for name in made:
            first = best[f"{name} {counts[0]}"]
            columns = (
                f"{count} threads {best[f'{name} {count}']:7.0f} ({first / best[f'{name} {count}']:.2f}x)"
                for count in counts
            )
            print(f"  {name:16s} " + "   ".join(columns))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15, help="turns of each way")
    parser.add_argument("--compile", action="store_true", help="torch.compile too: half a minute more")
    parser.add_argument("--dataloader", action="store_true", help="the DataLoader way too: slow")
    parser.add_argument("--threads", type=int, nargs="+", help="compare these numbers of threads, no more")
    parser.add_argument("--data", help="a data set by name or path, instead of made-up rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = read_data(arguments.data) if arguments.data else make_data()
    rows = len(data.interactions)
    threads = ", ".join(map(str, arguments.threads or [1]))
    print(
        f"{platform.machine()}, torch {torch.__version__}, numba {numba.__version__}, {threads} threads; "
        f"{data.num_users} users, {data.num_items} items, {rows} positives, {NUM_NEGATIVES} negatives; "
        f"{'wall' if arguments.threads else 'CPU'} time, best of {arguments.repeats}"
    )
    if arguments.threads:
        compare_threads(arguments.threads, data, arguments.repeats)
        return
    known = data.known_positives()
    with tempfile.TemporaryDirectory() as folder:
        for dim, batch_size in SHAPES:
            ways = {
                "numba": fasttower_way("numba", dim, batch_size, data),
                "numba_exclusion": fasttower_way("numba", dim, batch_size, data, known),
                "torch": fasttower_way("torch", dim, batch_size, data),
                "torch_exclusion": fasttower_way("torch", dim, batch_size, data, known),
                "eager_mulsum": torch_way(loss_mulsum, dim, batch_size, data),
                "eager_bmm": torch_way(loss_bmm, dim, batch_size, data),
                "sparse_adam": sparse_adam_way(dim, batch_size, data),
            }
            if arguments.compile:
                compiled = torch.compile(loss_mulsum, dynamic=False)
                ways["compile"] = torch_way(compiled, dim, batch_size, data)
            if arguments.dataloader:
                ways["dataloader"] = dataloader_way(dim, batch_size, data)
            if shutil.which("gcc"):
                ways["c_limit"] = c_way(dim, batch_size, data, Path(folder))
            best = best_ns(ways, batch_size, arguments.repeats)
            print(f"\ndim {dim}, batch {batch_size}")
            for name, ns in best.items():
                print(
                    f"  {name:16s} {ns:8.0f} ns a positive {ns * rows / 1e9:7.3f} s an epoch "
                    f"{ns / best['numba']:7.2f} x numba"
                )
            eager = min(best["eager_mulsum"], best["eager_bmm"])
            print(f"  best eager / numba {eager / best['numba']:.1f}", end="")
            print(f", numba_exclusion / numba {best['numba_exclusion'] / best['numba']:.2f}", end="")
            print(f", numba / c_limit {best['numba'] / best['c_limit']:.2f}" if "c_limit" in best else "")


if __name__ == "__main__":
    main()
