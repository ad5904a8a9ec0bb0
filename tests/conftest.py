"""Fixtures that more than one test file uses.

Nothing is imported here that a machine for `tests/gpu` may lack, Polars among it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fasttower
from fasttower import Config

# They compile the most, or wait for a process that does.
SLOWEST_FIRST = ("test_triton_compiled", "test_triton_interpreter", "test_steps_numba")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist's own reads the options
def pytest_cmdline_main(config):
    """Where whole folders are tested and nothing else is said, two processes share the files."""
    within = "PYTEST_XDIST_WORKER" in os.environ  # of one of them, or of a test's own process
    folders = all(Path(argument).is_dir() for argument in config.args)
    if folders and not within and config.getoption("numprocesses", default=0) is None:
        config.option.numprocesses, config.option.dist = 2, "loadfile"


def pytest_configure():
    """One thread in each of several processes: together they have no more cores."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """What takes longest begins first, so that no process waits for it in the end."""
    order = {name: place for place, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


CONFIG = Config(
    embedding_dim=4, batch_size=64, epochs=3, learning_rate=0.05, backend="torch", l2=0.03, threads=1, k=5
)


def signalled(arguments, line_start, number):
    """The exit code, stdout and stderr of ``python -m ...``, sent a signal at a line that begins so."""
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith(line_start):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def _movielens(name: str) -> Path:
    root = os.environ.get("FASTTOWER_DATA")
    if not root:
        pytest.skip("FASTTOWER_DATA is not set: it names the folder that holds ml-100k.zip and ml-1m.zip")
    path = Path(root).resolve() / f"{name}.zip"
    if not path.exists():
        pytest.skip(f"no {name}.zip in FASTTOWER_DATA ({root})")
    return path


@pytest.fixture(scope="session")
def ml_100k() -> Path:
    """MovieLens 100K as GroupLens packs it."""
    return _movielens("ml-100k")


@pytest.fixture(scope="session")
def ml_1m() -> Path:
    """MovieLens 1M as GroupLens packs it."""
    return _movielens("ml-1m")


@pytest.fixture(scope="session")
def ratings():
    """Users like items of their own parity; ids are strings, with leading zeros."""
    import polars as pl

    generator = torch.Generator().manual_seed(0)
    users = torch.randint(40, (2000,), generator=generator)
    items = torch.randint(30, (2000,), generator=generator) * 2 + users % 2
    return pl.DataFrame(
        {
            "user": [f"{user:03d}" for user in users.tolist()],
            "item": [f"item {item}" for item in items.tolist()],
            "rating": [float(1 + i % 5) for i in range(2000)],
            "timestamp": list(range(2000)),
        }
    )


@pytest.fixture(scope="session")
def run(ratings):
    return fasttower.fit(ratings, CONFIG)


@pytest.fixture(scope="session")
def saved(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "first"
    run.save(path)
    return path
