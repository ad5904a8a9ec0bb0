"""The stages of `benchmarks/gpu_suite.sh`, most worth first: each in a process of its own, with a time limit.

    python -m benchmarks.gpu.suite FOLDER

No stage stops the next one. A stage writes its file whenever it knows more, and all output goes to
FOLDER/suite.log, so that a stage that fails, hangs or crashes leaves what it had found. The last lines say
how each stage ended. PYTHON names the interpreter of the stages.

Exit codes: 0 all stages passed, or need a tool that is not there; 1 some did not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT_S = 460.0  # of the whole suite, which with the start of torch is to end within 8 minutes
GRACE_S = 12.0  # to write a file after the time limit; pytest-xdist waits 10 s for its workers
SHOWN_LINES = 15
NOT_HERE = "not on this machine:"

LOG = "suite.log"
FILES = ("tests.xml", "step.json", "kernels.json", "ncu.csv", "sanitizer.json", "training.json", "top_k.json")


@dataclass(frozen=True)
class Stage:
    """A command with a time limit.

    Attributes:
        name: of the stage.
        command: the program and its arguments.
        limit_s: seconds after which it is stopped.
    """

    name: str
    command: list[str]
    limit_s: float


def stages(folder: Path, python: str) -> list[Stage]:
    """All stages, in the order in which they run."""

    def module(name: str, *arguments: str) -> list[str]:
        return [python, "-m", f"benchmarks.gpu.{name}", str(folder), *arguments]

    tests = ["tests/gpu", "-n", "8", "-vv", "-p", "no:cacheprovider", f"--junitxml={folder / 'tests.xml'}"]
    counters = ["SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy", "WarpStateStats"]
    watch = ["ncu", "--csv", "--log-file", str(folder / "ncu.csv"), "--clock-control", "none"]
    watch += ["--target-processes", "all", "--profile-from-start", "off"]
    watch += [*(word for name in counters for word in ("--section", name))]
    return [
        Stage("tests", [python, "-m", "pytest", *tests], 100),
        Stage("step", module("step"), 125),
        Stage("kernels", module("kernels"), 40),
        Stage("ncu", [*watch, python, "-m", "benchmarks.gpu.kernels", "--launched"], 60),
        Stage("sanitizer", module("sanitizer"), 80),
        Stage("training", module("training"), 60),
        Stage("top_k", module("top_k"), 25),
        Stage("step_1m", module("step", "--data", "synthetic-1m", "--dims", "64", "16", "128"), 60),
    ]


def run_stage(stage: Stage, log: IO[bytes], limit_s: float) -> str:
    """Run a stage, its output into the log, and say how it ended; nothing that it started outlives it."""
    if not shutil.which(stage.command[0]):
        return f"{NOT_HERE} {stage.command[0]}"
    process = subprocess.Popen(
        stage.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
    )
    try:
        return _ending(process.wait(limit_s))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # as Ctrl-C: pytest writes its file, Python says where it was
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        return f"stopped after {limit_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ending(code: int) -> str:
    if code < 0:
        return f"crashed: {signal.Signals(-code).name}"
    return f"failed: exit code {code}" if code else "passed"


def run_stages(chosen: list[Stage], folder: Path, limit_s: float = LIMIT_S) -> dict[str, str]:
    """Run stages one after another, whatever becomes of each.

    Args:
        chosen: the stages.
        folder: for their files; those of an earlier run are removed first.
        limit_s: of all stages together.

    Returns:
        How each stage ended, by its name: "passed", without its tool `NOT_HERE` and the tool, or what failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*FILES, LOG):
        (folder / name).unlink(missing_ok=True)
    end = time.monotonic() + limit_s
    endings = {}
    for stage in chosen:
        began = time.monotonic()
        with (folder / LOG).open("ab", buffering=0) as log:
            _say(log, f"== {stage.name}")
            begin = log.tell()
            left = min(stage.limit_s, end - began)
            ending = run_stage(stage, log, left) if left > 0 else "left out: no time was left"
            endings[stage.name] = ending
            lines = (folder / LOG).read_bytes()[begin:].decode(errors="replace").splitlines()
            print("\n".join(line[:300] for line in lines[-SHOWN_LINES:]))
            _say(log, f"== {stage.name}: {ending} ({time.monotonic() - began:.0f} s)")
    with (folder / LOG).open("ab", buffering=0) as log:
        _say(log, "\n".join(["== all stages", *(f"{name}: {ending}" for name, ending in endings.items())]))
        _say(log, f"in {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
    return endings


def _say(log: IO[bytes], text: str) -> None:
    print(text, flush=True)
    log.write(f"{text}\n".encode())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    # Stages would inherit a Ctrl-C that is ignored, as it is in the background of a script.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # past run_stage, which ends its stage
    endings = run_stages(stages(folder, os.environ.get("PYTHON", sys.executable)), folder)
    return int(not all(ending == "passed" or ending.startswith(NOT_HERE) for ending in endings.values()))


if __name__ == "__main__":
    sys.exit(main())
