"""The precision of a matmul, named by the caller: torch's settings are those of the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Literal, get_args

import torch
from torch import Tensor

from fasttower_kernels.errors import FastTowerError, quoted

Scoring = Literal["float32", "tf32", "bfloat16"]

# Where a matmul of rounded factors is known to sum in float32.
_DEVICES = {"float32": None, "tf32": ("cuda",), "bfloat16": ("cpu", "cuda")}

_TF32_DROPPED_BITS = 13

_settings = Lock()


def check_scoring(scoring: Scoring, device: torch.device) -> None:
    """Check that a device can score so.

    Raises:
        FastTowerError: it cannot, or there is no such scoring.
    """
    if scoring not in get_args(Scoring):
        raise FastTowerError(f"scoring is {quoted(scoring)}; expected {', '.join(get_args(Scoring))}.")
    devices = _DEVICES[scoring]
    if devices is not None and device.type not in devices:
        raise FastTowerError(
            f"scoring is {scoring}, which runs on {' and '.join(devices)}, and the vectors are on "
            f"{device.type}; choose float32."
        )


def rounded(vectors: Tensor, scoring: Scoring) -> Tensor:
    """The vectors as the factors of such a matmul, which takes them as they are: bfloat16, or float32.

    Rounding to tf32 before the matmul makes the hardware's own way of doing it, which is not documented,
    change nothing.
    """
    if scoring == "bfloat16":
        return vectors.bfloat16()
    if scoring == "tf32":
        # To nearest, ties away from zero; a carry goes on into the exponent, as it should.
        half = 1 << (_TF32_DROPPED_BITS - 1)
        return (vectors.view(torch.int32) + half).bitwise_and_(-1 << _TF32_DROPPED_BITS).view(torch.float32)
    return vectors


def multiply(left: Tensor, right: Tensor, scoring: Scoring, out: Tensor) -> None:
    """``torch.mm(left, right, out=out)`` of factors rounded for that scoring, its sums in float32."""
    if left.is_cuda:
        with _cuda_settings(tf32=scoring == "tf32"):
            torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out=out)


@contextmanager
def _cuda_settings(*, tf32: bool) -> Iterator[None]:
    """Matmuls launched in this context round float32 factors to tf32, or not at all, and sum in float32.

    The settings are those of all threads. They change for the time of a launch alone, and the lock keeps one
    thread from taking another's for those to restore.
    """
    matmul = torch.backends.cuda.matmul
    # torch 2.9 has a new name for the one setting, and raises errors where both names are used.
    value: str | bool
    name, value = "fp32_precision", "tf32" if tf32 else "ieee"
    if not hasattr(matmul, name):
        name, value = "allow_tf32", tf32
    with _settings:
        before = getattr(matmul, name)
        # Partial sums of a bfloat16 product would be in bfloat16.
        partial_sums = matmul.allow_bf16_reduced_precision_reduction
        try:
            setattr(matmul, name, value)
            if partial_sums:
                matmul.allow_bf16_reduced_precision_reduction = False
            yield
        finally:
            setattr(matmul, name, before)
            if partial_sums:
                matmul.allow_bf16_reduced_precision_reduction = True
