"""Top-K over a whole catalogue beside its baselines: `python -m benchmarks.top_k`.

The shape is MovieLens 20M's: 138,493 users, 26,744 items, 64 dimensions, the 10 best, about 144 seen items a
user; --k asks for more. Each way serves a sample of the users in turns, one way after another and again; the
best turn counts, in CPU time and scaled to all users, so that a busy machine disturbs all of them alike. A
way's result is checked before its time is taken. The ways:

    bare_rows           torch.mm alone, some users by all items into a buffer; the best of some chunk sizes
    bare_tiles          torch.mm alone, into a buffer of some users by some items; the best of some shapes
    fasttower           the engine with nothing left out
    fasttower_seen      the same with seen items left out
    fasttower_bias      the same with an item bias, too
    fasttower_torch     the plain torch backend with seen items left out
    torch_topk          chunks of torch.mm, -inf where seen, torch.topk
    argpartition        chunks of numpy's matmul, -inf where seen, argpartition
    implicit            implicit's topk with nothing left out
    implicit_seen       the same with seen items left out
    faiss               faiss' IndexFlatIP with nothing left out

implicit and faiss take part where they are installed. With --memory all users are served, once for each of
some budgets in a process of its own, and the peak of the resident memory is reported above what was resident
before, the result's 11 MB included.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when numpy is imported

import numba
import numpy as np
import torch
from torch import Tensor

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.topk import top_k

USERS, ITEMS, DIM, K, SEEN = 138_493, 26_744, 64, 10, 144
ROW_CHUNKS = (16, 64, 256, 1024)
TILES = ((256, 1024), (512, 1024), (1024, 512), (1024, 1024))
CHUNK = 256
BUDGETS_MB = (64, 500, 4000)

Serve = Callable[[], Any]
"""Serves the sample once; returns items (R, K), or None where there are none."""


class Data(NamedTuple):
    """Vectors, and what was seen."""

    users: Tensor
    items: Tensor
    bias: Tensor
    seen: KnownPositives
    k: int

    @property
    def rows(self) -> Tensor:
        """(R,), int64: each user's row of seen, which is the user's own."""
        return torch.arange(len(self.users))

    @property
    def degrees(self) -> Tensor:
        """(R,), int64: how many items each user has seen."""
        return self.seen.indptr[1:] - self.seen.indptr[:-1]


def make_data(num_users: int, k: int = K) -> Data:
    """Normal vectors, and items seen as often as a Zipf law has it."""
    generator = torch.Generator().manual_seed(0)
    users, items = (torch.randn(rows, DIM, generator=generator) for rows in (num_users, ITEMS))
    bias = torch.randn(ITEMS, generator=generator)
    rng = np.random.default_rng(0)
    weight = 1 / np.arange(1, ITEMS + 1) ** 0.9
    # Repeats are dropped: 180 draws leave about 144 items.
    drawn = torch.from_numpy(rng.choice(ITEMS, 180 * num_users, p=weight / weight.sum()))
    rows = torch.arange(num_users).repeat_interleave(180)
    return Data(users, items, bias, KnownPositives.from_pairs(rows, drawn, num_users, ITEMS), k)


def bare_rows(data: Data, chunk: int) -> Serve:
    buffer = torch.empty(chunk, ITEMS)

    def serve() -> None:
        for begin in range(0, len(data.users), chunk):
            some = data.users[begin : begin + chunk]
            torch.mm(some, data.items.T, out=buffer[: len(some)])

    return serve


def bare_tiles(data: Data, chunk: int, width: int) -> Serve:
    buffer = torch.empty(chunk, width)

    def serve() -> None:
        for begin in range(0, len(data.users), chunk):
            some = data.users[begin : begin + chunk]
            for first in range(0, ITEMS, width):
                tile = data.items[first : first + width]
                torch.mm(some, tile.T, out=buffer[: len(some), : len(tile)])

    return serve


def fasttower_way(data: Data, *, seen: bool = True, **options: Any) -> Serve:
    if seen:
        options |= {"seen": data.seen, "seen_users": data.rows}
    return lambda: top_k(data.users, data.items, k=data.k, **options).items


def torch_way(data: Data) -> Serve:
    # Where the seen items are is found before the clock runs.
    rows, columns = torch.repeat_interleave(data.rows, data.degrees), data.seen.items.long()
    buffer = torch.empty(CHUNK, ITEMS)

    def serve() -> Tensor:
        found = []
        for begin in range(0, len(data.users), CHUNK):
            some = data.users[begin : begin + CHUNK]
            scores = torch.mm(some, data.items.T, out=buffer[: len(some)])
            entries = slice(int(data.seen.indptr[begin]), int(data.seen.indptr[begin + len(some)]))
            scores[rows[entries] - begin, columns[entries]] = -torch.inf
            found.append(torch.topk(scores, data.k).indices)
        return torch.cat(found)

    return serve


def argpartition_way(data: Data) -> Serve:
    users, items = data.users.numpy(), data.items.numpy()
    rows, columns = np.repeat(np.arange(len(users)), data.degrees), data.seen.items.numpy()

    def serve() -> Tensor:
        found = []
        for begin in range(0, len(users), CHUNK):
            scores = users[begin : begin + CHUNK] @ items.T
            entries = slice(int(data.seen.indptr[begin]), int(data.seen.indptr[begin + len(scores)]))
            scores[rows[entries] - begin, columns[entries]] = -np.inf
            best = np.argpartition(scores, -data.k, axis=1)[:, -data.k :]
            order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
            found.append(np.take_along_axis(best, order, axis=1))
        return torch.from_numpy(np.concatenate(found))

    return serve


def implicit_way(data: Data, *, seen: bool) -> Serve:
    import scipy.sparse
    from implicit.cpu.topk import topk

    users, items = data.users.numpy(), data.items.numpy()
    filtered = None
    if seen:
        values = np.ones(len(data.seen.items), dtype=np.float32)
        indptr = data.seen.indptr.numpy().astype(np.int32)
        filtered = scipy.sparse.csr_matrix((values, data.seen.items.numpy(), indptr), (len(users), ITEMS))
    return lambda: torch.from_numpy(topk(items, users, data.k, filter_query_items=filtered, num_threads=1)[0])


def faiss_way(data: Data) -> Serve:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(DIM)
    index.add(data.items.numpy())
    users = data.users.numpy()
    return lambda: torch.from_numpy(index.search(users, data.k)[1])


def ways_of(data: Data) -> dict[str, Serve]:
    ways = {f"bare_rows {chunk}": bare_rows(data, chunk) for chunk in ROW_CHUNKS}
    ways |= {f"bare_tiles {chunk}x{width}": bare_tiles(data, chunk, width) for chunk, width in TILES}
    ways |= {
        "fasttower": fasttower_way(data, seen=False),
        "fasttower_seen": fasttower_way(data),
        "fasttower_bias": fasttower_way(data, item_bias=data.bias),
        "fasttower_torch": fasttower_way(data, backend="torch"),
        "torch_topk": torch_way(data),
        "argpartition": argpartition_way(data),
    }
    if importlib.util.find_spec("implicit"):
        ways |= {"implicit": implicit_way(data, seen=False), "implicit_seen": implicit_way(data, seen=True)}
    if importlib.util.find_spec("faiss"):
        ways["faiss"] = faiss_way(data)
    return ways


def check(name: str, found: Tensor | None, right: dict[str, Tensor]) -> None:
    """Items whose scores are equal but for rounding may change places."""
    if found is None:
        return
    kind = next((word for word in ("bias", "seen", "torch", "argpartition") if word in name), "plain")
    expected = right[{"torch": "seen", "argpartition": "seen"}.get(kind, kind)]
    share = (found.long() == expected).double().mean()
    assert share > 0.999, f"{name} finds {share:.4f} of the right items"


def right_items(data: Data) -> dict[str, Tensor]:
    scores = data.users @ data.items.T
    right = {"plain": scores.topk(data.k).indices}
    scores[torch.repeat_interleave(data.rows, data.degrees), data.seen.items.long()] = -torch.inf
    return right | {"seen": scores.topk(data.k).indices, "bias": scores.add_(data.bias).topk(data.k).indices}


def best_seconds(data: Data, repeats: int) -> dict[str, float]:
    """CPU seconds for all users of each way's best turn, in turns."""
    ways = ways_of(data)
    right = right_items(data)
    for name, serve in ways.items():
        check(name, serve(), right)
    del right
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, serve in ways.items():
            start = time.process_time()
            serve()
            best[name] = min(best[name], (time.process_time() - start) * USERS / len(data.users))
    return best


def resident(name: str) -> int:
    """A figure of this process in bytes: VmRSS, what is resident now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def report_memory(budget_mb: int) -> None:
    data = make_data(USERS)
    rows = data.rows
    few = slice(16)
    # What is compiled and what libraries keep comes first.
    top_k(data.users[few], data.items, k=K, seen=data.seen, seen_users=rows[few])
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.process_time()
    top_k(data.users, data.items, k=K, seen=data.seen, seen_users=rows, memory_budget_bytes=budget_mb * 10**6)
    seconds, peak = time.process_time() - start, resident("VmHWM") - before
    print(
        f"  budget {budget_mb:5d} MB: peak {peak / 1e6:6.1f} MB above the tables, {seconds:5.1f} s",
        flush=True,
    )


def report_speed(sample: int, repeats: int, k: int) -> None:
    best = best_seconds(make_data(sample, k), repeats)
    for name, seconds in best.items():
        print(f"  {name:20s} {seconds:7.2f} s {seconds / best['fasttower_seen']:6.2f} x fasttower_seen")
    rows = min(seconds for name, seconds in best.items() if name.startswith("bare_rows"))
    tiles = min(seconds for name, seconds in best.items() if name.startswith("bare_tiles"))
    seen = best["fasttower_seen"]
    print(f"  fasttower_seen / bare_rows {seen / rows:.2f}, / bare_tiles {seen / tiles:.2f}", end="")
    if "implicit" in best:
        print(f", implicit_seen / fasttower_seen {best['implicit_seen'] / seen:.2f}", end="")
    if "faiss" in best:
        print(f", fasttower / faiss {best['fasttower'] / best['faiss']:.2f}", end="")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=2048, help="users served a turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way")
    parser.add_argument("--k", type=int, default=K, help="items wanted a user")
    parser.add_argument("--memory", action="store_true", help="the peak memory of serving all users")
    parser.add_argument("--budget-mb", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.budget_mb:
        report_memory(arguments.budget_mb)
        return
    print(
        f"{platform.machine()}, torch {torch.__version__}, numba {numba.__version__}, 1 thread; "
        f"{USERS} users, {ITEMS} items, dim {DIM}, K {arguments.k}, about {SEEN} seen items a user; CPU time",
        flush=True,
    )
    if arguments.memory:
        for budget in BUDGETS_MB:
            command = [sys.executable, "-m", "benchmarks.top_k", "--budget-mb", str(budget)]
            subprocess.run(command, check=True)
        return
    print(f"{arguments.sample} users, scaled to all; best of {arguments.repeats} turns", flush=True)
    report_speed(arguments.sample, arguments.repeats, arguments.k)


if __name__ == "__main__":
    main()
