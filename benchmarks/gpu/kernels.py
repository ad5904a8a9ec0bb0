"""Where the time of a training step goes, by kernel, at synthetic-20m's shape.

    python -m benchmarks.gpu.kernels FOLDER        torch.profiler over replays of graphs; FOLDER/kernels.json
    python -m benchmarks.gpu.kernels --launched    a few launched steps, for Nsight Compute to watch

A row holds the wall time per step without the profiler, and per kernel its launches and microseconds per
step. What is missing between their sum and the wall time is the device waiting between kernels.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.data import draw
from benchmarks.gpu.results import Results
from benchmarks.gpu.step import BATCH_SIZES, Fused, Steps
from benchmarks.gpu.timing import best_seconds, wait
from fasttower_kernels.step import steps_per_epoch

DATA, DIM = "synthetic-20m", 64
MOST_STEPS = 320  # a graph of steps ten times
LAUNCHED_STEPS = 3  # from the second one on, lazy Adam finds rows that wait


def time_by_kernel(run: Steps, steps: int) -> dict[str, dict[str, float]]:
    """Launches and microseconds per step of each kernel and copy, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run(steps)
        wait()
    kernels = [event for event in profiled.key_averages() if event.self_device_time_total > 0]
    return {
        event.key[:120]: {
            "us_per_step": event.self_device_time_total / steps,
            "launches_per_step": event.count / steps,
        }
        for event in sorted(kernels, key=lambda event: -event.self_device_time_total)
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--launched", action="store_true")
    asked = parser.parse_args()
    positives = draw(DATA, torch.device("cuda"))
    kinds = [Fused(*kind) for kind in itertools.product(("adam", "lazy_adam"), ("float32", "bfloat16"))]
    if asked.launched:
        for batch_size, kind in itertools.product(BATCH_SIZES, kinds[::2]):
            run = replace(kind, graphs=False).steps(positives, DIM, batch_size)
            run(LAUNCHED_STEPS)
            wait()
            torch.cuda.profiler.start()
            run(LAUNCHED_STEPS)
            wait()
            torch.cuda.profiler.stop()
        return 0
    results = Results(asked.folder / "kernels.json")
    for batch_size, kind in itertools.product(BATCH_SIZES, kinds):
        steps = min(MOST_STEPS, steps_per_epoch(len(positives.interactions), batch_size))
        run = kind.steps(positives, DIM, batch_size)
        run(40)
        step_us = best_seconds(lambda: run(steps)) / steps * 1e6  # noqa: B023 - it is called here
        results.add(
            data=DATA,
            dim=DIM,
            batch_size=batch_size,
            optimiser=kind.optimiser,
            table_dtype=kind.table_dtype,
            steps=steps,
            step_us=step_us,
            kernels=time_by_kernel(run, steps),
        )
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())
