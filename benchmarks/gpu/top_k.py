"""The 10 best items of every user at synthetic-20m's shape, beside the matmul alone and torch.topk.

    python -m benchmarks.gpu.top_k FOLDER

Rows go to FOLDER/top_k.json. ``top_k`` leaves seen items out and adds the bias, with each scoring; ``same``
is the share of its items that are float32's at their place. The baselines score 8,192 users at a time,
without bias and seen items: matmul, and matmul with torch.topk, in float32 and tf32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.data import Positives, draw
from benchmarks.gpu.results import Results
from benchmarks.gpu.timing import best_seconds, wait
from fasttower_kernels.topk import top_k

DATA, DIM, K = "synthetic-20m", 64, 10
USERS_PER_CHUNK = 8_192


def baseline(users: Tensor, items: Tensor, *, select: bool) -> Callable[[], None]:
    """Score all users, and take the best items of each where asked."""
    scores = torch.empty(min(USERS_PER_CHUNK, len(users)), len(items), device=users.device)

    def run() -> None:
        for chunk in users.split(USERS_PER_CHUNK):
            out = scores[: len(chunk)]
            torch.matmul(chunk, items.T, out=out)
            if select:
                out.topk(K)

    return run


def measure(results: Results, positives: Positives, dim: int) -> None:
    """Add the rows."""
    tables, known = positives.start_tables(dim), positives.known
    device = known.items.device
    bias = torch.randn(known.num_items, device=device, generator=torch.Generator(device).manual_seed(0))
    rows = torch.arange(known.num_users, device=device)
    shape = {"users": known.num_users, "items": known.num_items, "dim": dim, "k": K}

    def add(way: str, run: Callable[[], object], **more: object) -> None:
        run()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = best_seconds(run)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        results.add(
            way=way, **shape, seconds=seconds, users_per_s=known.num_users / seconds, peak_bytes=peak, **more
        )

    exact: Tensor | None = None
    for scoring in ("float32", "tf32", "bfloat16") if device.type == "cuda" else ("float32", "bfloat16"):

        def run(scoring: str = scoring) -> Tensor:
            best = top_k(
                tables.users, tables.items, k=K, item_bias=bias, seen=known, seen_users=rows, scoring=scoring
            )
            return best.items

        try:
            found = run()
            exact = found if exact is None else exact
            add(f"top_k {scoring}", run, same=float((found == exact).double().mean()))
        except Exception as error:  # the other rows are measured all the same
            results.add(way=f"top_k {scoring}", **shape, error=repr(error)[:2000])
            wait()  # raises, and ends the stage, where the device is lost
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        name = "float32" if precision == "highest" else "tf32"
        add(f"matmul {name}", baseline(tables.users, tables.items, select=False))
        add(f"matmul {name} and topk", baseline(tables.users, tables.items, select=True))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    results = Results(parser.parse_args().folder / "top_k.json")
    measure(results, draw(DATA, torch.device("cuda")), DIM)
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())
