"""Where a run trains."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from fasttower.errors import FastTowerError, quoted, shown
from fasttower_kernels.backends import choose_backend


def choose_device(requested: str, *, strict: bool = False) -> tuple[torch.device, str | None]:
    """The device to use, and a line for the user where it is not the one asked for.

    Args:
        requested: "auto" (CUDA, then MPS, then the CPU), "cpu", "cuda" or "mps".
        strict: fail where CUDA was asked for and is not there, instead of taking the CPU.

    Raises:
        FastTowerError: MPS, or with ``strict`` CUDA, was asked for and is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if requested == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if there[name])), None
    requested = str(requested)
    if requested not in there:
        raise FastTowerError(f"the device is {quoted(requested)}; expected one of auto, {', '.join(there)}.")
    if there[requested]:
        return torch.device(requested), None
    reason = f"--device {requested} was asked for, but {_why_not(requested)}"
    if requested == "cuda" and not strict:
        return torch.device("cpu"), f"{reason}; going on on the CPU (--strict-device makes this an error)."
    raise FastTowerError(f"{reason}; use --device auto or cpu.")


def _why_not(name: str) -> str:
    if name == "mps":
        return "torch finds no Metal device"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable GPU"


def fallback_note(device: str, backend: str, why: str) -> str | None:
    """A line for the user where `choose_backend` took plain torch for want of a fused backend.

    Args:
        device: where it runs.
        backend: of `choose_backend`.
        why: likewise.
    """
    if backend != "torch" or why == choose_backend("torch", torch.device(device))[1]:
        return None
    return f"training on {device} in plain torch, which is slow: {why}."


def cpu_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def memory_of(device: torch.device, advice: str) -> Iterator[None]:
    """Say what to do where the memory of a device, or of the process, runs out inside the block.

    Args:
        device: where it computes.
        advice: what makes it need less, as the end of "choose ...".

    Raises:
        FastTowerError: it did.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = ". ".join(str(error).split(". ")[:2])  # what happened, and how much was asked for
        raise FastTowerError(
            f"{device} ran out of memory ({asked}); choose {advice}, free what others hold there, or use "
            f"--device cpu."
        ) from error
    except (MemoryError, RuntimeError) as error:
        asked = str(error).partition("DefaultCPUAllocator: ")[2]
        if not asked and not isinstance(error, MemoryError):
            raise
        why = f" ({shown(found, 100)})" if (found := asked or str(error)) else ""
        raise FastTowerError(
            f"the process ran out of memory{why}; choose {advice}, or give it more."
        ) from error


def check_repeatable(backend: str, device: torch.device) -> None:
    """Check that a backend has a mode that repeats bit for bit on a device.

    Args:
        backend: of `choose_backend`.
        device: where it runs.

    Raises:
        FastTowerError: it has none.
    """
    if device.type != "cpu" and backend != "triton":
        raise FastTowerError(
            f"--deterministic was asked for, but backend {backend} does not repeat bit for bit on {device}; "
            f"use --backend triton on CUDA, or --device cpu."
        )


@contextlib.contextmanager
def cpu_threads(threads: int | None) -> Iterator[int]:
    """Use that many CPU threads, or every core, inside the block; yields the number.

    Raises:
        FastTowerError: more threads than this machine has cores.
    """
    cores = cpu_cores()
    if threads is not None and threads > cores:
        raise FastTowerError(f"--threads is {threads}; this machine has {cores} cores.")
    wanted = threads or cores
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        yield wanted
    finally:
        torch.set_num_threads(before)
