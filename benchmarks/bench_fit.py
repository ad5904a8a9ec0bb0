"""The whole run on synthetic-100k, from its generation to RePlay's metrics."""

import pytest

import fasttower

BACKENDS = {"fasttower": "numba", "fasttower_reference": "torch"}


def short_run(backend):
    config = fasttower.Config(threads=1, backend=backend, epochs=3, l2=0.03)
    return fasttower.fit("synthetic-100k", config).metrics["test"]


@pytest.fixture(scope="module")
def metrics():
    """RePlay's metrics of the short run, by every way."""
    return {way: short_run(backend) for way, backend in BACKENDS.items()}


@pytest.mark.parametrize("way", BACKENDS)
def test_three_epochs(benchmark_in, way, metrics):
    """The plain torch backend is the baseline: with the default settings it would take minutes."""
    # The models are the same but for rounding, which may swap two items somewhere.
    assert metrics["fasttower"] == pytest.approx(metrics["fasttower_reference"], abs=2e-3)
    benchmark_in("whole run, synthetic-100k, 3 epochs", ratings=100_000).pedantic(
        short_run, args=(BACKENDS[way],), rounds=3 if way == "fasttower" else 1
    )


@pytest.mark.parametrize("way", ["fasttower"])
def test_default(benchmark_in, way):
    """With no baseline; popularity's quality is the one to beat."""

    def run():
        return fasttower.fit("synthetic-100k", fasttower.Config(threads=1))

    benchmark = benchmark_in("whole run, synthetic-100k, default settings", ratings=100_000)
    metrics = benchmark.pedantic(run, rounds=2).metrics
    assert metrics["test"]["NDCG@10"] > metrics["popularity"]["NDCG@10"]
    benchmark.extra_info["wall_s"] = {name: round(value, 3) for name, value in metrics["timing_s"].items()}
    benchmark.extra_info["test"] = metrics["test"]
