"""What the Triton kernels become for GPUs that are not here.

Compiled in a process of their own: `TRITON_INTERPRET`, read when a kernel is decorated, would turn it off.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")

ROOT = Path(__file__).parent.parent
STEP, LAZY = "step, exclusion by bitmaps", "lazy adam, exclusion by bitmaps"
LAZY_USERS = "lazy adam, only users"
OTHERS = ("step, exclusion by filters", "adam", "segments (deterministic)", "partials (deterministic)")
LOSSES = [f"step, {name}" for name in ("softmax", "bpr", "gbce", "cosine", "softmax, cosine")]
PROPOSALS = ["step, popularity, softmax", "step, hard", "choice of hard negatives", "lazy adam, popularity"]
SHARED = ["shared users, softmax, float32", "shared users, softmax, tf32", "shared items, softmax, bfloat16"]
KERNELS = [f"{name}{dtype}" for name in (STEP, LAZY, LAZY_USERS, *OTHERS) for dtype in ("", ", bfloat16")]
FEW = [STEP, f"{STEP}, bfloat16", LAZY, LAZY_USERS, "adam"]  # of other targets, for the quick tests
WHOLE_TABLES = {"adam": 2, LAZY_USERS: 1, "lazy adam, only items": 1}
LAZY_TABLES = {LAZY_USERS: 1, "lazy adam, only items": 1, "lazy adam, all rows of users": 1}
VECTORS_PER_STEP = 6  # the user, the positive, and a quad of negatives
OWN_NAMES, SHARED_NAMES = 25 + 24, 18  # kernels of a dimension: with float32 and bfloat16 tables, and shared


def compiled(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiled_kernels", "--json", *arguments],
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def check(figures):
    name = f"{figures['kernel']}, dim {figures['dim']}, {figures['target']}: {figures}"
    # For its adds of single floats on sm_80 Triton 3.9 hands a gradient to other threads, through registers
    # that the heaviest losses of few dimensions do not have.
    heavy = figures["target"] == "sm_80" and figures["dim"] == 16 and ("softmax" in name or "bpr" in name)
    assert figures["local_bytes"] <= (24 if heavy else 0), name
    if figures["kernel"].startswith(("shared users", "shared items")):
        check_product(figures, name)
        return
    assert figures["wgmma"] == figures["mma"] == 0, name
    # For 16 warps a multiprocessor of an NVIDIA GPU; on AMD's, for 3 waves a SIMD.
    assert figures["registers"] <= (168 if figures["target"] == "gfx942" else 128), name
    rounded = figures["kernel"].endswith(", bfloat16")
    # A thread has 4 elements of a vector, whose gradients it adds: 16 bytes, or 8.
    vector_loads = figures["loads_8_bytes" if rounded else "loads_16_bytes"]
    if not figures["kernel"].startswith("step"):
        assert figures["vector_adds"] == figures["scalar_adds"] == 0, name
        if "adam" in figures["kernel"]:
            # Four arrays of each table. Of a whole one a thread has 8 elements, 4 where they are rounded; of
            # a lazy one 4, with one loop for all items of a program. AMD's may load more, of other things.
            kernel = figures["kernel"].removesuffix(", bfloat16")
            whole = WHOLE_TABLES.get(kernel, 0)
            lazy = LAZY_TABLES.get(kernel, 2) if kernel != "adam" else 0
            amd = figures["target"] == "gfx942"
            four = rounded or (amd and kernel == "adam")
            loads = 4 * lazy + 4 * whole * (1 if four else 2)
            assert figures["loads_16_bytes"] == loads or (amd and figures["loads_16_bytes"] > loads), name
            # Triton 3.3 finds the longest wait of a program's rows with a few bytes of shared memory.
            assert figures["shared_bytes"] <= (16 if lazy else 0) or (amd and lazy), name
        elif not figures["kernel"].startswith("shared"):
            assert figures["loads_16_bytes"] + figures["loads_8_bytes"] > 0, name
        return
    assert vector_loads >= VECTORS_PER_STEP, name
    vectors, biases = VECTORS_PER_STEP, VECTORS_PER_STEP - 1
    if figures["target"] in ("sm_90", "sm_100"):
        # Vectors are added 4 floats at a time, biases one at a time.
        assert (figures["vector_adds"], figures["scalar_adds"]) == (vectors, biases), name
        # No program waits at a barrier, but before 3.5 Triton hands blocks of a word per positive from one
        # layout to another through shared memory.
        old = tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 5)
        assert figures["shared_bytes"] <= (8 if old else 0), name
    else:
        assert figures["scalar_adds"] == 4 * vectors + biases, name


def check_product(figures, name):
    # On tensor cores; Hopper's own instructions where a tile has 64 rows. A product of float32 is three.
    own = figures["target"] == "sm_90" and not figures["kernel"].endswith("float32")
    assert bool(figures["wgmma"]) == own, name
    assert bool(figures["mma"]) != own, name
    # Hopper adds 4 floats at a time, and single ones only to biases.
    assert figures["target"] != "sm_90" or (figures["vector_adds"] > 0 and figures["scalar_adds"] == 1), name


@pytest.mark.parametrize(
    ("target", "kernels"),
    [("sm_90", KERNELS + LOSSES + PROPOSALS + SHARED), ("sm_80", FEW), ("gfx942", FEW)],
    ids=["nvidia, Hopper", "nvidia, Ampere", "amd"],
)
def test_kernels(target, kernels):
    figures = compiled("--dims", "64", "--targets", target, "--kernels", *kernels)
    assert sorted(one["kernel"] for one in figures) == sorted(kernels)
    for one in figures:
        check(one)


@pytest.mark.slow
def test_all_kernels():
    targets = ("sm_80", "sm_90", "gfx942")
    figures = compiled("--targets", *targets)
    assert len(figures) == (OWN_NAMES * len(targets) + SHARED_NAMES * 2) * 3
    for one in figures:
        check(one)
