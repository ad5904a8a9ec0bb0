"""The Triton kernels under Triton's interpreter, where there is no GPU.

`TRITON_INTERPRET` is read when a kernel is decorated, so the cases run in processes of their own, all files
together: starting costs as much as a file's cases.
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
CASES = (
    "triton_interpreter_cases.py",
    "triton_bfloat16_cases.py",
    "step/own_triton_cases.py",
    "step/shared_triton_cases.py",
    "step/test_contract.py",
)
WORKERS = 2
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")


def run_cases(*arguments):
    files = [str(TESTS / name) for name in CASES]
    options = ["-p", "no:cacheprovider", "-n", str(WORKERS), "--dist", "worksteal"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-x", *options, *arguments],
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
def test_kernels():
    run_cases()


@needs_triton
@pytest.mark.slow
def test_kernels_in_more_shapes():
    run_cases("-m", "slow")


def test_triton_is_not_for_the_cpu():
    with pytest.raises(FastTowerError, match="triton runs on cuda, not cpu"):
        choose_backend("triton", torch.device("cpu"))
