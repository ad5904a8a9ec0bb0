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
from fasttower_kernels.negatives import Negatives, sample_negatives
from fasttower_kernels.settings import LossSettings, StepSettings
from fasttower_kernels.shuffle import shuffled_rows
from fasttower_kernels.step import Step, TrainState, add_gradients, loss_sum, sampled_loss
from fasttower_kernels.tables import Interactions, Tables

CPU = torch.device("cpu")
LOSS, SETTINGS = LossSettings(), StepSettings(learning_rate=0.1, batch_size=2, seed=0)
NEGATIVES = Negatives(SETTINGS.negatives, 3, 5)
KEY = (1, 2)


class CalledError(Exception):
    """Raised by the function of the backend that is watched."""


def tables():
    return Tables(torch.ones(3, 4), torch.ones(5, 4), torch.zeros(5))


def batch():
    return Interactions(torch.zeros(2, dtype=torch.int32), torch.ones(2, dtype=torch.int32))


# Of each call with a backend: the operator's package, and the function that a backend has for it.
OPERATORS = {
    "Step": (
        "step",
        "Steps",
        lambda backend: Step(TrainState.start(tables()), batch(), NEGATIVES, SETTINGS, backend=backend),
    ),
    "add_gradients": (
        "step.gradients",
        "add_gradients",
        lambda backend: add_gradients(
            tables(), tables(), batch(), NEGATIVES, LOSS, key=KEY, step=0, backend=backend
        ),
    ),
    "loss_sum": (
        "step.gradients",
        "loss_sum",
        lambda backend: loss_sum(tables(), batch(), NEGATIVES, LOSS, key=KEY, step=0, backend=backend),
    ),
    "sampled_loss": (
        "step.gradients",
        {"reference": "batch_loss", "numba_cpu": "add_gradients"},
        lambda backend: sampled_loss(
            torch.ones(2, 4),
            torch.ones(5, 4),
            batch().item_index,
            negatives=NEGATIVES,
            key=KEY,
            step=0,
            backend=backend,
        ),
    ),
    "adam_step": (
        "adam",
        "adam_step",
        lambda backend: adam_step(*(tables() for _ in range(4)), count=1, learning_rate=0.1, backend=backend),
    ),
    "sample_negatives": (
        "negatives",
        "sample_negatives",
        lambda backend: sample_negatives(batch().user_index, 2, 5, key=KEY, step=0, backend=backend),
    ),
    "shuffled_rows": (
        "shuffle",
        "shuffled_rows",
        lambda backend: shuffled_rows(torch.arange(3), 3, KEY, backend=backend),
    ),
}


@pytest.mark.parametrize("public", OPERATORS)
@pytest.mark.parametrize(
    ("asked", "runs"), [("torch", "reference"), ("numba", "numba_cpu"), ("auto", "numba_cpu")]
)
def test_the_backend_that_was_asked_for_runs(monkeypatch, public, asked, runs):
    operator, function, call = OPERATORS[public]
    for name in ("reference", "numba_cpu"):
        module = importlib.import_module(f"fasttower_kernels.{operator}.{name}")

        def called(*_, name=name, **__):
            raise CalledError(name)

        monkeypatch.setattr(module, function if isinstance(function, str) else function[name], called)
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


@pytest.mark.parametrize("operator", ["step", "step.gradients", "adam", "negatives", "shuffle"])
def test_a_backend_is_a_file_of_the_operator(operator):
    package = f"fasttower_kernels.{operator}"
    assert implementation(package, "numba", CPU).__name__ == f"{package}.numba_cpu"
    assert implementation(package, "torch", CPU).__name__ == f"{package}.reference"
