"""How long the first training step takes in a fresh process: `python -m benchmarks.start`.

A process imports what it needs and is timed from asking for one training step until that step is done, and
again for the first validation loss, on MovieLens 1M's shape with the default preset's settings: known
positives left out, item bias, L2. Cold, numba's cache folder is empty and all is compiled; cached, it holds
what the process before compiled. With the other optimiser that `auto` may take, the same again. The best wall
and CPU seconds of the repeats, each in processes and a folder of its own; the imports are timed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

OPTIMISERS = ("adam", "lazy_adam")
LIMITS_S = {"cold": 6.0, "cached": 0.5}


def first_step(optimiser: str, threads: int) -> dict[str, list[float]]:
    """Wall and CPU seconds of each part of the start, in this process."""
    times = {}

    def now() -> list[float]:
        return [time.perf_counter(), time.process_time()]

    began = now()

    def lap(name: str) -> None:
        nonlocal began
        times[name] = [end - begin for begin, end in zip(began, now(), strict=True)]
        began = now()

    import torch

    lap("import torch")
    import numba  # noqa: F401

    lap("import numba")
    import fasttower_kernels.step.numba_cpu  # noqa: F401

    lap("import fasttower_kernels")
    from benchmarks.shapes import make_data, make_tables
    from fasttower.config import PRESETS
    from fasttower_kernels.negatives import Negatives
    from fasttower_kernels.settings import StepSettings
    from fasttower_kernels.step import Step, TrainState, loss_sum

    torch.set_num_threads(threads)
    data = make_data()
    config = PRESETS["default"].resolved(len(data.interactions), data.num_items)
    drawn = config.negative_settings
    negatives = Negatives.of(drawn, data.interactions, data.num_users, data.num_items, data.known_positives())
    state = TrainState.start(make_tables(config.embedding_dim, data, item_bias=config.item_bias))
    loss = config.loss_settings
    settings = StepSettings(config.learning_rate, config.batch_size, config.seed, loss, drawn, optimiser)
    began = now()
    Step(state, data.interactions, negatives, settings).run(0, 1)
    lap("first step")
    part = data.batch(1024)
    loss_sum(state.parameters, part, negatives, loss, key=(1, 2), step=0)
    lap("first validation loss")
    return times


def in_new_process(optimiser: str, threads: int, cache: str) -> dict[str, list[float]]:
    command = [sys.executable, "-m", "benchmarks.start", "--threads", str(threads), "--here", optimiser]
    environment = os.environ | {"NUMBA_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    times: dict[str, list[float]] = json.loads(done.stdout)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--here", choices=OPTIMISERS, help="start in this process, and print JSON")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(first_step(arguments.here, arguments.threads)))
        return

    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "numba", "llvmlite"))
    print(
        f"{platform.machine()}, Python {platform.python_version()}, {libraries}, "
        f"{arguments.threads} threads; seconds, wall and CPU, each the best of {arguments.repeats}"
    )
    print("aims for the first step: " + ", ".join(f"{name} {limit} s" for name, limit in LIMITS_S.items()))
    for optimiser in OPTIMISERS:
        repeats: dict[str, list[dict[str, list[float]]]] = {state: [] for state in LIMITS_S}
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory() as cache:
                for times in repeats.values():  # cold first, which fills the folder
                    times.append(in_new_process(optimiser, arguments.threads, cache))
        print(f"\n{optimiser:24s}" + "".join(f"{state:>18s}" for state in repeats))
        for part in repeats["cold"][0]:
            line = f"{part:24s}"
            for times in repeats.values():
                wall, cpu = (min(clock) for clock in zip(*(one[part] for one in times), strict=True))
                line += f"{wall:9.2f} {cpu:8.2f}"
            print(line)


if __name__ == "__main__":
    main()
