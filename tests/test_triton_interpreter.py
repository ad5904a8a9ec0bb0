"""The Triton kernels under Triton's interpreter, where there is no GPU.

`TRITON_INTERPRET` is read when a kernel is decorated, so the cases run in a process of their own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasttower_kernels.backends import choose_backend
from fasttower_kernels.errors import FastTowerError

TESTS = Path(__file__).parent
CASES = TESTS / "triton_interpreter_cases.py"
BFLOAT16_CASES = TESTS / "triton_bfloat16_cases.py"
LOSS_CASES = TESTS / "step" / "own_triton_cases.py"
CONTRACT = TESTS / "step" / "test_contract.py"
ALL_CASES = pytest.mark.parametrize(
    "cases",
    [CASES, BFLOAT16_CASES, LOSS_CASES, CONTRACT],
    ids=["float32", "bfloat16", "losses", "contract"],
)
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")


def run_cases(cases, *arguments):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(cases), "-x", "-p", "no:cacheprovider", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


@needs_triton
@ALL_CASES
def test_kernels(cases):
    run_cases(cases)


@needs_triton
@pytest.mark.slow
@ALL_CASES
def test_kernels_in_more_shapes(cases):
    run_cases(cases, "-m", "slow")


def test_triton_is_not_for_the_cpu():
    with pytest.raises(FastTowerError, match="triton runs on cuda, not cpu"):
        choose_backend("triton", torch.device("cpu"))
