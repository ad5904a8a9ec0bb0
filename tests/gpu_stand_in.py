#!/usr/bin/env python3
"""Stands in for the interpreter, ncu and compute-sanitizer of a GPU machine, for the suite's tests.

Each stage's files are made as the stage would make them, and then GPU_STAND_IN says what becomes of a stage:
"step=hang,top_k=crash" with hang, fail (exit code 3) and crash (killed). The suite itself is run as it is.
"""

import os
import signal
import sys
import time
from pathlib import Path

FILE_OF = {
    "step": "step.json",
    "kernels": "kernels.json",
    "sanitizer": "sanitizer.json",
    "training": "training.json",
    "top_k": "top_k.json",
}


def stage_of(arguments: list[str]) -> tuple[str, list[Path]]:
    """The stage that the arguments are of, and its files."""
    if "--junitxml" in " ".join(arguments):
        return "tests", [Path(argument[11:]) for argument in arguments if argument.startswith("--junitxml=")]
    name = arguments[1].rpartition(".")[2]
    if "synthetic-1m" in arguments:
        name = "step_1m"
    folder = Path(arguments[2])
    return name, [folder / FILE_OF[name.removesuffix("_1m")]]


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[0] == "-c":  # "is there a GPU?"
        sys.exit(0)
    if "benchmarks.gpu.suite" in arguments:
        os.execv(sys.executable, [sys.executable, *arguments])
    if Path(sys.argv[0]).name == "ncu":
        name, files = "ncu", [Path(arguments[arguments.index("--log-file") + 1])]
    else:
        name, files = stage_of(arguments)
    for file in files:
        with file.open("a") as opened:
            opened.write(f"{name}\n")
    sys.stdout.write(f"{name} has begun\n")
    sys.stdout.flush()
    fate = dict(entry.split("=") for entry in os.environ.get("GPU_STAND_IN", "").split(",") if entry)
    match fate.get(name):
        case "hang":
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # as where a kernel never ends
            time.sleep(600)
        case "fail":
            sys.exit(3)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)


if __name__ == "__main__":
    main()
