"""The Triton kernels of shared negatives under the interpreter."""

from pathlib import Path

from test_triton_interpreter import needs_triton, run_cases

pytestmark = needs_triton


def test_kernels():
    run_cases(Path(__file__).parent / "shared_triton_cases.py")
