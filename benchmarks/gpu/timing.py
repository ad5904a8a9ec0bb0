"""Wall time of work on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds(run: Callable[[], object]) -> float:
    """Seconds from a device that has nothing to do until the work is done."""
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def best_seconds(run: Callable[[], object], *, repeats: int = 3, enough_s: float = 2.0) -> float:
    """The fastest of some runs; no further run begins once they took `enough_s` together."""
    times: list[float] = []
    while len(times) < repeats and sum(times) < enough_s:
        times.append(seconds(run))
    return min(times)


def wait() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copy_bytes_per_s(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes read and written per second by a copy on the device."""
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), repeats=10)
