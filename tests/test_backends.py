"""An operator's public function runs the backend that was asked for, and no other in its place."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fasttower_kernels.adam import adam_step
from fasttower_kernels.backends import OLDEST_TRITON, choose_backend, implementation
from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.negatives import sample_negatives
from fasttower_kernels.sampled_bce import LossSettings, bce_sum, train_step
from fasttower_kernels.shuffle import shuffled_rows
from fasttower_kernels.tables import Interactions, Tables
from fasttower_kernels.train_steps import StepSettings, TrainState, run_steps

CPU = torch.device("cpu")
LOSS = LossSettings(2)
KEY = (1, 2)


class CalledError(Exception):
    """Raised by the function of the backend that is watched."""


def tables():
    return Tables(torch.ones(3, 4), torch.ones(5, 4), torch.zeros(5))


def batch():
    return Interactions(torch.zeros(2, dtype=torch.int32), torch.ones(2, dtype=torch.int32))


# Of each operator: its package, the function, and a call with a backend.
OPERATORS = {
    "run_steps": (
        "train_steps",
        lambda backend: run_steps(
            TrainState.start(tables()),
            batch(),
            None,
            StepSettings(LOSS, learning_rate=0.1, batch_size=2, seed=0),
            first_step=0,
            num_steps=1,
            backend=backend,
        ),
    ),
    "train_step": (
        "sampled_bce",
        lambda backend: train_step(tables(), tables(), batch(), None, LOSS, key=KEY, step=0, backend=backend),
    ),
    "bce_sum": (
        "sampled_bce",
        lambda backend: bce_sum(tables(), batch(), None, LOSS, key=KEY, step=0, backend=backend),
    ),
    "adam_step": (
        "adam",
        lambda backend: adam_step(*(tables() for _ in range(4)), count=1, learning_rate=0.1, backend=backend),
    ),
    "sample_negatives": (
        "negatives",
        lambda backend: sample_negatives(batch().user_index, 2, 5, key=KEY, step=0, backend=backend),
    ),
    "shuffled_rows": ("shuffle", lambda backend: shuffled_rows(torch.arange(3), 3, KEY, backend=backend)),
}


@pytest.mark.parametrize("function", OPERATORS)
@pytest.mark.parametrize(
    ("asked", "runs"), [("torch", "reference"), ("numba", "numba_cpu"), ("auto", "numba_cpu")]
)
def test_the_backend_that_was_asked_for_runs(monkeypatch, function, asked, runs):
    operator, call = OPERATORS[function]
    for name in ("reference", "numba_cpu"):
        module = importlib.import_module(f"fasttower_kernels.{operator}.{name}")

        def called(*_, name=name, **__):
            raise CalledError(name)

        monkeypatch.setattr(module, function, called)
    with pytest.raises(CalledError, match=runs):
        call(asked)


def test_an_old_triton_is_not_used(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    for version, backend in (("3.2.0", "torch"), ("3.3.0", "triton"), ("3.10.1+git", "triton")):
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
        assert choose_backend("auto", cuda)[0] == backend
        if backend == "triton":
            assert choose_backend("triton", cuda)[0] == "triton"
        else:
            with pytest.raises(FastTowerError, match=r"needs Triton 3\.3.*torch 2\.7.*found 3\.2\.0"):
                choose_backend("triton", cuda)
            assert "found 3.2.0" in choose_backend("auto", cuda)[1]


def test_the_oldest_triton_is_what_the_package_requires():
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    oldest = ".".join(map(str, OLDEST_TRITON))
    assert f"triton>={oldest};" in project


@pytest.mark.parametrize("operator", ["train_steps", "sampled_bce", "adam", "negatives", "shuffle"])
def test_a_backend_is_a_file_of_the_operator(operator):
    package = f"fasttower_kernels.{operator}"
    assert implementation(package, "numba", CPU).__name__ == f"{package}.numba_cpu"
    assert implementation(package, "torch", CPU).__name__ == f"{package}.reference"
