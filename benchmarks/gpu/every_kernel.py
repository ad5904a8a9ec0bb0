"""Every Triton kernel on small arrays: what compute-sanitizer watches.

    python -m benchmarks.gpu.every_kernel

A line per case when it is done, so that a log that ends early tells how far it came. Sizes are odd, so that
programs are partly empty.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from benchmarks.gpu.data import Positives, draw_shape
from benchmarks.gpu.step import BCE, SOFTMAX, Fused
from benchmarks.gpu.timing import wait
from fasttower.data.synthetic import Shape
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.negatives import triton_gpu as negatives_triton
from fasttower_kernels.philox import seed_key
from fasttower_kernels.settings import NegativeSettings
from fasttower_kernels.shuffle import triton_gpu as shuffle_triton
from fasttower_kernels.step import steps_per_epoch
from fasttower_kernels.step.gradients import triton_gpu as gradients_triton

SHAPE = Shape(users=499, items=301, ratings=2_003, min_ratings=1)
BATCH_SIZE = 199
DIMS = (64, 13)
KEY = seed_key(7)
POPULARITY = NegativeSettings("popularity", count=7)
HARD = NegativeSettings(count=5, pool=18)
HARD_BY_POPULARITY = replace(POPULARITY, pool=18)
MIXED = NegativeSettings("mixed", count=37, block_size=64)


def step_cases() -> list[Fused]:
    """Training steps: first the kernels that training launches by default, each of them once."""
    kinds = itertools.product(("adam", "lazy_adam"), ("float32", "bfloat16"))
    launched = [Fused(*kind, graphs=False) for kind in kinds]
    others = [
        Fused(loss=SOFTMAX, negatives=MIXED, graphs=False),
        Fused(loss=replace(SOFTMAX, similarity="cosine"), negatives=MIXED, graphs=False),
        Fused(table_dtype="bfloat16", loss=SOFTMAX, negatives=MIXED, graphs=False),
        *(Fused(loss=replace(BCE, name=name), graphs=False) for name in ("gbce", "bpr", "softmax")),
        Fused(loss=replace(BCE, similarity="cosine"), graphs=False),
        Fused("lazy_adam", negatives=POPULARITY, graphs=False),
        Fused(loss=SOFTMAX, negatives=POPULARITY, exclusion="filters", graphs=False),
        Fused("lazy_adam", negatives=HARD, graphs=False),
        Fused(loss=replace(SOFTMAX, similarity="cosine"), negatives=HARD_BY_POPULARITY, graphs=False),
        Fused(table_dtype="bfloat16", negatives=HARD, graphs=False),
        Fused(exclusion="filters", graphs=False),
        Fused("lazy_adam", exclusion="filters", graphs=False),
        Fused(exclusion=None, graphs=False),
        Fused(deterministic=True),
        Fused("lazy_adam", deterministic=True),
        Fused(),
        Fused("lazy_adam"),
    ]
    return launched + others


def check(values: torch.Tensor) -> None:
    """Fail where something is not finite."""
    wait()
    if not bool(values.isfinite().all()):
        raise SystemExit(f"not finite: {values}")


def single_kernels(positives: Positives) -> None:
    """The shuffle, the negatives and the validation loss."""
    device, known = positives.known.items.device, positives.known
    check(shuffle_triton.shuffled_rows(torch.arange(1_003, device=device), 1_003, (1, 2)))
    check(
        negatives_triton.sample_negatives(
            positives.interactions.user_index, 7, known.num_items, key=KEY, step=3, known_positives=known
        )
    )
    tables = positives.start_tables(13)
    for settings in (NegativeSettings(count=7), MIXED):
        negatives = Negatives.of(settings, positives.interactions, known.num_users, known.num_items, known)
        check(gradients_triton.loss_sum(tables, positives.interactions, negatives, BCE, key=KEY, step=0))


def main() -> None:
    positives = draw_shape("small", SHAPE, torch.device("cpu")).to(torch.device("cuda"))
    steps = steps_per_epoch(len(positives.interactions), BATCH_SIZE)
    for dim in DIMS:
        for case in step_cases():
            check(case.steps(positives, dim, BATCH_SIZE)(steps))
            print(f"done: dim {dim}, {case}", flush=True)
    single_kernels(positives)
    print("done: shuffle, negatives, loss", flush=True)


if __name__ == "__main__":
    main()
