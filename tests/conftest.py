"""Fixtures that more than one test file uses.

Nothing is imported here that a machine for `tests/gpu` may lack, Polars among it.
"""

import os
from pathlib import Path

import pytest
import torch

import fasttower
from fasttower import Config

CONFIG = Config(
    embedding_dim=4, batch_size=64, epochs=3, learning_rate=0.05, backend="torch", l2=(0.03,), threads=1, k=5
)


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
