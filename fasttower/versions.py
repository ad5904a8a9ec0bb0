"""The versions that a run's figures depend on."""

from __future__ import annotations

import importlib.metadata
import platform


def versions() -> dict[str, str]:
    """The versions that a run's figures depend on."""
    names = ("fasttower", "torch", "numpy", "polars", "numba", "triton", "replay-rec")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
