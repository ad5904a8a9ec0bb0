"""What the benchmarks of `pytest benchmarks` share: one thread, CPU time, the data, the versions.

Each test does some work in one way; the ways of the same work form a group. "fasttower" is what the program
uses, "fasttower_reference" its plain torch specification; the others are what one would use instead. A way is
timed after its result was checked against the specification's or another way's: no speed of a wrong result.

Everything gets one thread, and CPU time is taken unless `--benchmark-timer` asks for another: small machines
are shared, and a wall clock measures the neighbours too. What counts is the minimum of the rounds.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

for library in ("POLARS_MAX", "OPENBLAS_NUM", "MKL_NUM"):  # Polars and numpy read them when they are imported
    os.environ.setdefault(f"{library}_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from benchmarks.shapes import Data, make_data  # noqa: E402
from fasttower_kernels.known_positives import KnownPositives  # noqa: E402

# pytest-benchmark's options; max_time is the seconds that the rounds of one benchmark take.
OPTIONS = {"timer": "time.process_time", "max_time": "0.4"}
PACKAGES = ("torch", "numba", "numpy", "polars", "pandas", "scikit-learn", "replay-rec", "pytest-benchmark")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Collect bench_*.py, and time as said above where the command line says nothing else."""
    config.addinivalue_line("python_files", "bench_*.py")
    given = {argument.partition("=")[0] for argument in config.invocation_params.args}
    for name, value in OPTIONS.items():
        if f"--benchmark-{name.replace('_', '-')}" not in given:
            setattr(config.option, f"benchmark_{name}", value)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Versions beside what pytest-benchmark says of the machine, and not the machine's name."""
    del machine_info["node"]
    machine_info["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    machine_info["versions"]["python"] = platform.python_version()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread for torch, and with it for numba."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def benchmark_in(benchmark) -> Callable[..., Any]:
    """The benchmark fixture, put into a group and told the shape that it works on."""

    def benchmark_in(group: str, **shape: Any):
        benchmark.group = group
        benchmark.extra_info.update(shape, threads=torch.get_num_threads())
        return benchmark

    return benchmark_in


@pytest.fixture(scope="session")
def ml_1m_shape() -> Data:
    """Made-up interactions: 6,040 users, 3,706 items, a million positives."""
    return make_data()


@pytest.fixture(scope="session")
def ml_20m_tables() -> Data:
    """Made-up interactions: 138,493 users and 26,744 items as in ML-20M, a million positives."""
    return make_data(138_493, 26_744)


@pytest.fixture(scope="session")
def known(ml_1m_shape: Data) -> KnownPositives:
    """Their users' known positives."""
    return ml_1m_shape.known_positives()


@pytest.fixture(scope="session")
def ratings_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A million synthetic ratings as a csv."""
    from fasttower.data.synthetic import generate, write_csv

    path = tmp_path_factory.mktemp("ratings") / "ratings.csv"
    write_csv(generate("synthetic-1m", seed=0), path)
    return path
