"""compute-sanitizer's memcheck and initcheck over every kernel.

    python -m benchmarks.gpu.sanitizer FOLDER

Rows go to FOLDER/sanitizer.json. A log is read to its end also where time ran out: what it holds counts, and
a row says how many cases were done. racecheck is left out: it looks at shared memory, of which the step has
none.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import Results

TOOLS = ("memcheck", "initcheck")
LIMIT_S = 38.0  # per tool
PROGRAM = [sys.executable, "-m", "benchmarks.gpu.every_kernel"]

_ERROR = re.compile(
    r"^=+ (?:Invalid|Uninitialized|Misaligned|Out-of-range|Stack overflow|Malloc/Free|Device-side|"
    r"Unspecified|Fatal|Program hit)"
)
# "at 0x70 in name", "at name(int *)+0x70 in file", "at void name<int>(int *)+0x70 in file"
_WHERE = re.compile(r"^=+ +at (?:0x[0-9a-f]+ in )?(?:void )?([\w:]+)")
_SUMMARY = re.compile(r"^=+ ERROR SUMMARY: (\d+) error")


def read_log(log: str) -> dict[str, Any]:
    """What a log says.

    Returns:
        ``errors``: how many it reports; ``kernels``: how many in each kernel; ``finished``: whether it ends
        with a summary; ``cases``: those that were done.
    """
    lines = log.splitlines()
    records = [number for number, line in enumerate(lines) if _ERROR.match(line)]
    places = (_WHERE.match(line) for number in records for line in lines[number + 1 : number + 2])
    kernels = Counter(place.group(1) for place in places if place)
    summaries = [int(match.group(1)) for match in map(_SUMMARY.match, lines) if match]
    return {
        "errors": max([len(records), *summaries]),
        "kernels": dict(kernels),
        "finished": bool(summaries),
        "cases": sum(line.startswith("done: ") for line in lines),
    }


def judge(log: str, code: int | None) -> dict[str, Any]:
    """The row of a run: what its log says, and ``error`` unless it watched something and found nothing.

    Args:
        log: all that the tool and the program wrote.
        code: the exit code; None where time ran out.
    """
    row = read_log(log) | {"stopped": code is None}
    if row["errors"]:
        first = next((i for i, line in enumerate(log.splitlines()) if _ERROR.match(line)), 0)
        row["error"] = "\n".join(log.splitlines()[first : first + 40])
    elif not row["cases"] or (code is not None and (code or not row["finished"])):
        row["error"] = f"ended with code {code} after {row['cases']} cases:\n{log[-2000:]}"
    return row


def run_tool(tool: str, limit_s: float) -> dict[str, Any]:
    """Run the program under a tool of compute-sanitizer, for that long at most."""
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--report-api-errors",
        "no",
        "--error-exitcode",
        "9",
        *PROGRAM,
    ]
    # Without torch's caching allocator each array is an allocation of its own, with ends to run over.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        code: int | None
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
            process.kill()
            process.wait()
        log.seek(0)
        return judge(log.read(), code)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    results = Results(parser.parse_args().folder / "sanitizer.json")
    for tool in TOOLS:
        if shutil.which("compute-sanitizer"):
            results.add(tool=tool, **run_tool(tool, LIMIT_S))
        else:
            results.add(tool=tool, missing="compute-sanitizer is not on this machine")
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())
