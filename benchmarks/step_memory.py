"""Memory that a training step takes beyond the tables: `python -m benchmarks.step_memory`.

Batches of 65,536, 64 dimensions, MovieLens 1M's shape; fasttower's numba backend with 10 and with 1,000
negatives a positive, known positives left out, and a plain torch loop (autograd, fused Adam) with 10. Each
case is a process of its own: it trains with batches of 256 and few negatives until everything is compiled and
every lasting array is there, gives freed memory back to the system, and takes one step of the full size.
Reported is by how much the highest resident memory of that step (VmHWM, set back before it) exceeds what was
resident before (VmRSS). Buffers of the step count; tables, moments, interactions and code do not. getrusage's
ru_maxrss would begin with the parent's. Only Linux with glibc has all of this.

A torch loop with 1,000 negatives holds the gathered item vectors, 65,536 x 1,001 x 64 floats or 16.8 GB, and
as much again for their gradient: it is not run.

Exits with 1 where 1,000 negatives take over 8 MB more than 10 do.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import subprocess
import sys
from pathlib import Path

DIM, BATCH_SIZE, WARM_UP = 64, 65_536, 256
CASES = (("numba", 10), ("numba", 1000), ("torch loop", 10))
LIMIT_MB = 8


def resident_mb(field: str) -> float:
    """VmRSS or VmHWM of this process."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def step_mb(way: str, num_negatives: int, threads: int) -> float:
    """What one step takes in this process."""
    import torch

    from benchmarks.shapes import make_data, make_tables
    from benchmarks.torch_baselines import loss_mulsum, torch_way
    from fasttower_kernels.negatives import Negatives
    from fasttower_kernels.settings import LossSettings, NegativeSettings, StepSettings
    from fasttower_kernels.step import Step, TrainState

    torch.set_num_threads(threads)
    data = make_data()
    if way == "numba":
        known = data.known_positives()
        state = TrainState.start(make_tables(DIM, data, item_bias=True))

        def step(batch_size: int) -> None:
            few = min(num_negatives, 10) if batch_size < BATCH_SIZE else num_negatives
            negatives = Negatives(NegativeSettings(count=few), data.num_users, data.num_items, known)
            loss = LossSettings(user_l2=0.06, item_l2=0.06)
            settings = StepSettings(0.01, batch_size, 0, loss, negatives.settings, "adam")
            Step(state, data.interactions, negatives, settings, backend="numba").run(0, 1)
    else:
        tables = torch_way(loss_mulsum, DIM, BATCH_SIZE, data)
        small = torch_way(loss_mulsum, DIM, WARM_UP, data)

        def step(batch_size: int) -> None:
            (tables if batch_size == BATCH_SIZE else small)(1)

    step(WARM_UP)
    step(WARM_UP)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    before = resident_mb("VmRSS")
    step(BATCH_SIZE)
    return resident_mb("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--here", choices=[way for way, _ in CASES], help="one case in this process")
    parser.add_argument("--num-negatives", type=int, help="of that case")
    arguments = parser.parse_args()
    if arguments.here:
        print(step_mb(arguments.here, arguments.num_negatives, arguments.threads))
        return
    print(f"dim {DIM}, batch {BATCH_SIZE:,}, {arguments.threads} threads; MB above what was resident before")
    taken = {}
    for way, num_negatives in CASES:
        command = [sys.executable, "-m", "benchmarks.step_memory", "--threads", str(arguments.threads)]
        command += ["--here", way, "--num-negatives", str(num_negatives)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        taken[way, num_negatives] = float(done.stdout)
        print(f"  {way:10s} N = {num_negatives:5,d} {taken[way, num_negatives]:10.1f} MB", flush=True)
    print(
        "  torch loop N = 1,000    not run: its gathered vectors alone are 16.8 GB, and their gradient again"
    )
    more = taken["numba", 1000] - taken["numba", 10]
    print(f"N = 1,000 takes {more:+.1f} MB against N = 10 with numba; the limit is {LIMIT_MB} MB")
    sys.exit(more > LIMIT_MB)


if __name__ == "__main__":
    main()
