"""Figures in a JSON file, and what they were measured on."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Results:
    """Rows of figures in a JSON file, written again with each row: a stage that is cut off loses none.

    Rows are added to those of a file that is already there.

    Attributes:
        failed: whether a row added here holds an error.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content: dict[str, Any] = {"about": about(), "rows": []}
        if path.exists():
            self._content["rows"] = json.loads(path.read_text())["rows"]
        self.failed = False

    def add(self, **row: Any) -> None:
        """Add a row, write the file and print the row; ``error`` marks what failed."""
        self.failed |= "error" in row
        self._content["rows"].append(row)
        # Replaced as a whole: whoever is stopped while writing leaves the file of the row before.
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self._content, indent=1) + "\n")
        unfinished.replace(self._path)
        print(", ".join(f"{name} {_short(value)}" for name, value in row.items()), flush=True)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"({len(value)} entries)" if isinstance(value, dict | list) else str(value)


def about() -> dict[str, object]:
    """Device and versions."""
    import triton

    facts: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "numpy": np.__version__,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return facts
