"""What the Triton kernels of shared negatives become, compiled ahead of time; no GPU is needed.

    python -m benchmarks.compiled_shared          a table
    python -m benchmarks.compiled_shared --json   the same as JSON

As `benchmarks.compiled_kernels`, and the number of matrix instructions: Hopper's (wgmma) and those of a warp
(mma). The kernels are those of a step with mixed negatives, softmax, item bias, L2 and known positives by a
bitmap, with float32 tables by torch's "highest" precision of products (three of TF32) and by "high" (one),
and with bfloat16 tables. With cosine similarity, and other losses, they are named so.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton

from benchmarks import compiled_kernels
from benchmarks.compiled_kernels import TARGETS, Figures, compile_launch
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.settings import LossSettings, NegativeSettings
from fasttower_kernels.step.shared_negatives.triton_gpu import shared_launches
from fasttower_kernels.tables import Interactions, Tables, padded
from fasttower_kernels.triton_launch import Launch

DIMS = (32, 64, 128)
PRODUCTS = {
    "float32": ("highest", torch.float32),
    "tf32": ("high", torch.float32),
    "bfloat16": ("high", torch.bfloat16),
}
LOSSES = {
    "softmax": LossSettings("softmax", user_l2=0.01, item_l2=0.01, bias_l2=0.01),
    "bce, cosine": LossSettings("bce", similarity="cosine", user_l2=0.01, item_l2=0.01, bias_l2=0.01),
}


@dataclass(frozen=True)
class ProductFigures(Figures):
    """Figures of a kernel, and its matrix instructions.

    Attributes:
        wgmma: of a warp group.
        mma: of a warp.
    """

    wgmma: int
    mma: int


def launches(dim: int) -> dict[str, Launch]:
    """The launches of a step with shared negatives, on arrays that are small: only their types count."""
    found: dict[str, Launch] = {}
    before = torch.get_float32_matmul_precision()
    for product, (precision, dtype) in PRODUCTS.items():
        torch.set_float32_matmul_precision(precision)
        for name, loss in LOSSES.items():
            step = launches_of(dim, dtype, loss)
            assert step.items is not None
            found |= {f"users, {name}, {product}": step.users, f"items, {name}, {product}": step.items}
            if product != "tf32":
                found |= {f"masks, {name}, {product}": step.mask}
        if dtype == torch.float32:
            found |= {"lists": step.draw, "masks by search": _by_search(step.mask)}
    torch.set_float32_matmul_precision(before)
    return found


def launches_of(dim: int, dtype: torch.dtype, loss: LossSettings) -> Any:
    """The launches of a step."""
    width, users, items = padded(dim), 8, 40
    gradients = Tables(torch.zeros(users, width), torch.zeros(items, width), torch.zeros(items))
    index = torch.arange(users, dtype=torch.int32)
    known = KnownPositives.from_pairs(index, index, users, items)
    interactions = Interactions(index, index)
    return shared_launches(
        Tables(gradients.users.to(dtype), gradients.items.to(dtype), gradients.item_bias),
        gradients,
        interactions,
        Negatives.of(NegativeSettings("mixed", count=4, block_size=users), interactions, users, items, known),
        loss,
        words=torch.zeros(10, dtype=torch.int32),
        counters=torch.zeros(2, dtype=torch.int64),
        losses=torch.zeros(users, dtype=torch.float64),
        batch_size=users,
        shuffle=True,
    )


def _by_search(mask: Launch) -> Launch:
    return mask.with_arguments(bitmap_ptr=None, bitmap_words=0)


def figures_of(name: str, launch: Launch, dim: int, target: str) -> ProductFigures:
    """Compile one launch, and read the result."""
    kept: list[str] = []
    read = compiled_kernels._read_nvidia

    def with_ptx(compiled: Any) -> dict[str, int]:
        kept.append(compiled.asm["ptx"])
        return read(compiled)

    compiled_kernels._read_nvidia = with_ptx
    try:
        figures = compile_launch(name, launch, dim, target)
    finally:
        compiled_kernels._read_nvidia = read
    ptx = kept[0] if kept else ""
    return ProductFigures(
        **asdict(figures), wgmma=len(re.findall(r"wgmma\.mma_async", ptx)), mma=ptx.count("mma.sync")
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["sm_80", "sm_90"])
    parser.add_argument("--kernels", nargs="+", default=[], help="names as in the table; all without it")
    asked = parser.parse_args()
    compiled_kernels.negatives.BITMAP_LIMIT_BYTES = 1 << 62
    figures = [
        figures_of(name, launch, dim, target)
        for dim in asked.dims
        for target in asked.targets
        for name, launch in launches(dim).items()
        if not asked.kernels or name in asked.kernels
    ]
    if asked.json:
        print(json.dumps([asdict(f) for f in figures]))
        return
    head = ["kernel", "dim", "target", "registers", "local B", "shared B", "16 B loads", "8 B loads"]
    head += ["adds x4", "adds x1", "wgmma", "mma"]
    rows = [head, ["---"] * len(head)] + [[str(v) for v in asdict(f).values()] for f in figures]
    print(f"Triton {triton.__version__}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows))


if __name__ == "__main__":
    main()
