"""A csv of ratings to tensors, fasttower's way and the pandas way; what each does is in `preparation.py`."""

import pytest

from benchmarks.preparation import WAYS

PARTS = ("fit", "train", "valid", "test", "known_pairs")


@pytest.fixture(scope="module")
def sizes(ratings_csv):
    """Rows of each part, by every way."""
    done = {name: way(str(ratings_csv)) for name, way in WAYS.items()}
    return {name: {part: result[part] for part in PARTS} for name, result in done.items()}


@pytest.mark.parametrize("way", WAYS)
def test_preparation(benchmark_in, way, ratings_csv, sizes):
    assert sizes["fasttower"] == sizes["pandas"]
    benchmark = benchmark_in("preparation, a csv of a million ratings", **sizes[way])
    benchmark.pedantic(WAYS[way], args=(str(ratings_csv),), rounds=3)
