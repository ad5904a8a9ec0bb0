"""Gradients with shared negatives on the CPU beside their baselines: `python -m benchmarks.shared_negatives`.

The time for each positive of adding a batch's gradients, on one thread, without the optimiser: the shape is
MovieLens 1M's, or with --data ml-1m its rows themselves. The ways go in turns, one after another and again;
the best turn counts, in CPU time. A block has as many positives as its list has items. The ways:

    own 10         fasttower's numba backend with 10 negatives of its own for each positive, BCE
    in-batch ...   fasttower's numba backend, lists of the block's own items, known positives masked
    shared ...     the same with drawn lists
    ... plain      without known positives
    autograd ...   torch: gather, matmul, loss, backward; only the positive itself is masked
    matmuls        the three bare matrix products U V^T, G V, G^T U in torch, into buffers that are there
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import numba
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from benchmarks.shapes import Data, make_data, make_tables, read_data
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.settings import LossName, LossSettings, NegativeSettings, Proposal
from fasttower_kernels.step import add_gradients
from fasttower_kernels.tables import Interactions

BATCH = 4096
LENGTHS = (256, 512, 1024)
KEY = (1, 0)

Way = Callable[[], object]
"""Adds the gradients of a batch."""


def shuffled_batch(data: Data) -> Interactions:
    rows = torch.randperm(len(data.interactions), generator=torch.Generator().manual_seed(0))[:BATCH]
    return Interactions(data.interactions.user_index[rows], data.interactions.item_index[rows])


def fasttower_way(
    settings: NegativeSettings, loss: LossName, dim: int, data: Data, known: KnownPositives | None
) -> Way:
    tables = make_tables(dim, data, item_bias=True)
    gradients, batch = tables.zeros_like(), shuffled_batch(data)
    negatives = Negatives.of(settings, data.interactions, data.num_users, data.num_items, known)
    call = (tables, gradients, batch, negatives, LossSettings(loss))
    return lambda: add_gradients(*call, key=KEY, step=0, backend="numba")


def autograd_way(loss: str, length: int, dim: int, data: Data) -> Way:
    tables = make_tables(dim, data, item_bias=True)
    users, items, bias = (table.requires_grad_() for table in tables)
    batch = shuffled_batch(data)
    user_index, item_index = batch.user_index.long(), batch.item_index.long()
    log_q = torch.bincount(data.interactions.item_index, minlength=data.num_items).log()

    def run() -> None:
        for begin in range(0, BATCH, length):
            rows = slice(begin, begin + length)
            block = item_index[rows]
            u, v = F.embedding(user_index[rows], users), F.embedding(block, items)
            logits = torch.addmm(bias[block], u, v.T)
            own = torch.arange(length)
            if loss == "softmax":
                total = F.cross_entropy(logits - log_q[block], own, reduction="sum")
            else:
                signs = torch.ones_like(logits)
                signs[own, own] = -1
                total = F.softplus(logits * signs).sum()
            (total / BATCH).backward()

    return run


def matmul_way(length: int, dim: int) -> Way:
    u, v, g = torch.randn(length, dim), torch.randn(length, dim), torch.randn(length, length)
    s, du, dv = torch.empty(length, length), torch.empty(length, dim), torch.empty(length, dim)

    def run() -> None:
        for _ in range(BATCH // length):
            torch.mm(u, v.T, out=s)
            torch.mm(g, v, out=du)
            torch.mm(g.T, u, out=dv)

    return run


def best_ns(ways: dict[str, Way], repeats: int) -> dict[str, float]:
    """Nanoseconds per positive of each way's best turn."""
    best = dict.fromkeys(ways, float("inf"))
    for way in ways.values():
        way()
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.process_time_ns()
            way()
            best[name] = min(best[name], (time.process_time_ns() - start) / BATCH)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=25, help="turns of each way")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--data", help="a data set by name or path, instead of made-up rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = read_data(arguments.data) if arguments.data else make_data()
    known, dim = data.known_positives(), arguments.dim
    print(
        f"{platform.machine()}, torch {torch.__version__}, numba {numba.__version__}, 1 thread; "
        f"{data.num_users} users, {data.num_items} items, {len(data.interactions)} positives; dim {dim}, "
        f"batch {BATCH}; CPU time, best of {arguments.repeats}"
    )
    for length in LENGTHS:
        ways = {"own 10": fasttower_way(NegativeSettings(count=10), "bce", dim, data, known)}
        losses: tuple[LossName, ...] = ("softmax", "bce")
        proposals: tuple[Proposal, ...] = ("in-batch", "shared")
        for loss in losses:
            for proposal in proposals:
                settings = NegativeSettings(proposal, count=length, block_size=length)
                ways[f"{proposal} {loss}"] = fasttower_way(settings, loss, dim, data, known)
            plain = NegativeSettings("in-batch", block_size=length)
            ways[f"in-batch {loss} plain"] = fasttower_way(plain, loss, dim, data, None)
            ways[f"autograd {loss}"] = autograd_way(loss, length, dim, data)
        ways["matmuls"] = matmul_way(length, dim)
        best = best_ns(ways, arguments.repeats)
        print(f"\nM = {length}")
        for name, ns in best.items():
            print(
                f"  {name:24s} {ns:8.0f} ns per positive {ns / best['own 10']:6.2f} x own "
                f"{ns / best['matmuls']:6.2f} x matmuls"
            )


if __name__ == "__main__":
    main()
