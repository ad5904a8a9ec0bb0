"""Which implementation of an operator runs.

`auto` takes the best that the tensors' device allows: numba on a CPU and Triton on a CUDA device where the
package is there, plain torch everywhere else. An explicit choice that cannot be met is an error.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch

from fasttower_kernels.errors import FastTowerError, quoted
from fasttower_kernels.settings import Backend

# The device that a backend runs on, and the package that it needs.
_NEEDS = {"numba": ("cpu", "numba"), "triton": ("cuda", "triton")}

OLDEST_TRITON = (3, 3)
"""Kernels hold the negatives of a quad in tuples, which Triton compiles from this version on."""

# The file of an operator that holds a backend.
_MODULES = {"numba": "numba_cpu", "triton": "triton_gpu", "torch": "reference"}


def choose_backend(backend: Backend, device: torch.device) -> tuple[str, str]:
    """The backend to use on a device, and why.

    Args:
        backend: what was asked for.
        device: where the tensors are.

    Returns:
        The backend's name, never "auto", and a few words for the user.

    Raises:
        FastTowerError: the backend that was asked for cannot run here.
    """
    if backend == "torch":
        return "torch", "asked for"
    if backend == "auto":
        for name, (needed_device, _) in _NEEDS.items():
            if device.type == needed_device:
                if lack := _lack(name):
                    return "torch", f"no fused backend for {device.type} here: {name} {lack}"
                return name, f"the fastest on {device.type}"
        return "torch", f"no fused backend for {device.type}"
    if backend not in _NEEDS:
        raise FastTowerError(
            f"backend is {quoted(backend)}; this version has auto, torch and {', '.join(_NEEDS)}."
        )
    needed_device, _ = _NEEDS[backend]
    if device.type != needed_device:
        raise FastTowerError(
            f"backend {backend} runs on {needed_device}, not {device.type}; choose auto or torch."
        )
    if lack := _lack(backend):
        raise FastTowerError(f"backend {backend} {lack}; choose auto or torch.")
    return backend, "asked for"


def _lack(name: str) -> str | None:
    """What keeps a backend from running on its device."""
    package = _NEEDS[name][1]
    if not importlib.util.find_spec(package):
        return f"needs the package {package}, which is not installed"
    if package == "numba" and importlib.import_module("numba").config.DISABLE_JIT:
        return "cannot compile, for NUMBA_DISABLE_JIT is set"
    if package == "triton":
        version: str = importlib.import_module(package).__version__
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
            oldest = ".".join(map(str, OLDEST_TRITON))
            return f"needs Triton {oldest}, which comes with torch 2.7 for CUDA, or newer; found {version}"
    return None


def implementation(operator: str, backend: Backend, device: torch.device) -> ModuleType:
    """The module of an operator that holds a backend, imported when it is first asked for.

    Args:
        operator: the operator's package.
        backend: what was asked for.
        device: where the tensors are.

    Raises:
        FastTowerError: the backend that was asked for cannot run here.
    """
    name, _ = choose_backend(backend, device)
    return importlib.import_module(f"{operator}.{_MODULES[name]}")
