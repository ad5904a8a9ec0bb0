"""The Triton kernels of shared negatives: under the interpreter, and compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_triton_interpreter import needs_triton, run_cases

ROOT = Path(__file__).parent.parent.parent
pytestmark = needs_triton


def test_kernels():
    run_cases(Path(__file__).parent / "shared_triton_cases.py")


def compiled(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiled_shared", "--json", *arguments],
        env=environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def check(figures):
    name = f"{figures['kernel']}, dim {figures['dim']}, {figures['target']}: {figures}"
    assert figures["local_bytes"] == 0, name
    if not figures["kernel"].startswith(("users", "items")):
        assert figures["registers"] <= 128, name
        return
    # On tensor cores; Hopper's own instructions where a tile has 64 rows. A product of float32 is three.
    own = figures["target"] == "sm_90" and not figures["kernel"].endswith("float32")
    assert bool(figures["wgmma"]) == own, name
    assert bool(figures["mma"]) != own, name
    # Hopper adds 4 floats at a time, and single ones only to biases.
    assert figures["target"] != "sm_90" or (figures["vector_adds"] > 0 and figures["scalar_adds"] == 1), name


def test_compiled_kernels():
    kernels = ["users, softmax, float32", "users, softmax, tf32", "items, softmax, bfloat16"]
    figures = compiled("--dims", "64", "--targets", "sm_90", "--kernels", *kernels)
    assert [one["kernel"] for one in figures] == kernels
    for one in figures:
        check(one)


@pytest.mark.slow
def test_all_compiled_kernels():
    figures = compiled()
    assert len(figures) == 18 * 2 * 3
    for one in figures:
        check(one)
