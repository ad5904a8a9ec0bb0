"""What the Triton kernels become, compiled ahead of time; no GPU is needed.

    python -m benchmarks.compiled_kernels          a table
    python -m benchmarks.compiled_kernels --json   the same as JSON

Registers, bytes of stack and local memory (spills), bytes of shared memory, and the number of instructions
that load 16 bytes, that load 8 bytes of several elements, and that add to global memory, 4 floats or 1 float
at a time. Beside them the matrix instructions, Hopper's of a warp group (wgmma) and those of
a warp (mma). The kernels are those that training launches, see `benchmarks.launches`, compiled from the very
arguments of the launches.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.launches import NUM_NEGATIVES, launches
from fasttower_kernels.triton_launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DIMS = (16, 64, 128)

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Figures:
    """One compiled kernel.

    Attributes:
        kernel: what it does.
        dim: dimensions of a vector.
        target: architecture.
        registers: a thread's (AMD: vector registers).
        local_bytes: stack and local memory of a thread: spills, and arrays that registers cannot hold.
        shared_bytes: shared memory of a program.
        loads_16_bytes: instructions that load 16 bytes.
        loads_8_bytes: instructions that load 8 bytes of several elements (AMD: any 8 bytes).
        vector_adds: instructions that add 4 floats to global memory and return nothing.
        scalar_adds: instructions that add 1 float likewise.
        wgmma: matrix instructions of a warp group (Hopper).
        mma: matrix instructions of a warp (AMD: of a wave).
    """

    kernel: str
    dim: int
    target: str
    registers: int
    local_bytes: int
    shared_bytes: int
    loads_16_bytes: int
    loads_8_bytes: int
    vector_adds: int
    scalar_adds: int
    wgmma: int
    mma: int


def compile_launch(name: str, launch: Launch, dim: int, target: str) -> Figures:
    """Compile one launch as the just-in-time compiler would, and read the result."""
    kernel = launch.kernel
    constants = {p.name for p in kernel.params if p.is_constexpr}
    signature: dict[str, str] = {}
    values: dict[str, Any] = {}
    hints: dict[tuple[int], list[list[object]]] = {}
    for place, argument in enumerate(kernel.arg_names):
        value = launch.arguments[argument]
        if argument in constants or value is None:
            signature[argument], values[argument] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[argument] = _TYPES[value.dtype]
            # Torch allocates in multiples of at least 64 bytes; rows are padded to 16.
            hints[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if isinstance(value, float) else "i32"
    compiled = triton.compile(
        ASTSource(kernel, signature, values, hints),
        target=TARGETS[target],
        options=launch.options(nvidia=TARGETS[target].backend == "cuda"),
    )
    read = _read_amd if "amdgcn" in compiled.asm else _read_nvidia
    return Figures(name, dim, target, **read(compiled))


def _read_nvidia(compiled: Any) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}
    ptx = compiled.asm["ptx"]
    return {
        "registers": usage["REG"],
        "local_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "loads_16_bytes": len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", ptx)),
        "loads_8_bytes": len(re.findall(r"ld\.global[\w.:]*\.v2\.b32", ptx)),
        # An atomic whose result goes nowhere becomes a reduction in the assembler.
        "vector_adds": len(re.findall(r"\b(?:red|atom)\.global[\w.]*add\.v4\.f32", ptx)),
        "scalar_adds": len(re.findall(r"\b(?:red|atom)\.global[\w.]*add\.f32", ptx)),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
    }


def _read_amd(compiled: Any) -> dict[str, int]:
    assembly = compiled.asm["amdgcn"]

    def first(pattern: str) -> int:
        found = re.search(pattern, assembly)
        return int(found[1]) if found else 0

    return {
        "registers": first(r"\.vgpr_count:\s*(\d+)"),
        "local_bytes": first(r"\.private_segment_fixed_size:\s*(\d+)"),
        "shared_bytes": compiled.metadata.shared,
        "loads_16_bytes": len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly)),
        "loads_8_bytes": len(re.findall(r"(?:global|buffer)_load_dwordx2", assembly)),
        "vector_adds": 0,
        "scalar_adds": len(re.findall(r"(?:global|buffer|flat)_atomic_add_f32", assembly)),
        "wgmma": 0,
        "mma": len(re.findall(r"v_mfma", assembly)),
    }


_launches = lru_cache(launches)


def _compile(asked: tuple[str, int, str]) -> Figures:
    name, dim, target = asked
    return compile_launch(name, _launches(dim, TARGETS[target].warp_size)[name], dim, target)


def compile_all(
    dims: tuple[int, ...], targets: tuple[str, ...], kernels: tuple[str, ...] = ()
) -> list[Figures]:
    """The figures of the kernels, all of them if none is named, compiled on all cores."""
    asked = [
        (name, dim, target)
        for dim in dims
        for target in targets
        for name in _launches(dim, TARGETS[target].warp_size)
        if not kernels or name in kernels
    ]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_compile, asked))


def table(figures: list[Figures]) -> str:
    """The figures as a Markdown table."""
    head = [
        "kernel",
        "dim",
        "target",
        "registers",
        "local B",
        "shared B",
        "16 B loads",
        "8 B loads",
        "adds x4",
        "adds x1",
        "wgmma",
        "mma",
    ]
    rows = [head, ["---"] * len(head)] + [[str(v) for v in asdict(f).values()] for f in figures]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=[*TARGETS])
    parser.add_argument("--kernels", nargs="+", default=[], help="names as in the table; all without it")
    asked = parser.parse_args()
    figures = compile_all(tuple(asked.dims), tuple(asked.targets), tuple(asked.kernels))
    if asked.json:
        print(json.dumps([asdict(f) for f in figures]))
    else:
        print(f"Triton {triton.__version__}, {NUM_NEGATIVES} negatives, item bias, L2\n\n{table(figures)}")


if __name__ == "__main__":
    main()
