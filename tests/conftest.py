"""Fixtures that more than one test file uses."""

import os
from pathlib import Path

import pytest


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
