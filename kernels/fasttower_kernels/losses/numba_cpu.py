"""The losses, compiled, by name: the name is a literal, and only the loss that it names is compiled.

    begin_tile(x, tile)                    # row 0 has the positives' logits
    for each chunk:                        # only for a loss of NORMALISED, whose slopes need all logits
        ...                                # rows 1 .. end - 1 of x get the logits of the chunk's negatives
        accumulate(loss)(x, end, tile)
    for each chunk:
        ...                                # the same logits again, unless there is one chunk
        slopes(loss)(x, end, last, tile)   # logits become slopes times weight; tile.value is the chunk's loss

Softmax takes negatives' logits less log q. A logit of -inf counts for nothing: its slope is 0.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from fasttower_kernels.compiled import OPTIONS, Array, chosen, njit
from fasttower_kernels.losses.tile_numba_cpu import TILE, LossTile, begin_tile, new_tile

__all__ = ["NORMALISED", "TILE", "LossTile", "accumulate", "begin_tile", "new_tile", "slopes"]

NORMALISED = frozenset({"softmax"})
"""Losses whose slopes need a sum over all negatives first."""


def accumulate(loss: str) -> Callable[..., None]:
    """Of a literal name, for a loss of NORMALISED: ``(x, end, tile)``.

    Adds rows 1 .. end - 1 to ``tile.maximum`` and ``tile.total``.
    """
    raise NotImplementedError  # compiled code only


def slopes(loss: str) -> Callable[..., None]:
    """Of a literal name: ``(x, end, last, tile)``, to replace logits by slopes, times the weights.

    ``x`` (rows * TILE,), float32: rows 1 .. end - 1 are the chunk's negatives. Row 0, the positives, is read
    in every chunk and replaced in the last one, which ``last`` says. ``tile`` is of `new_tile`; its value
    becomes the loss of this chunk.
    """
    raise NotImplementedError  # compiled code only


def _of(loss: str, function: str) -> Any:
    return getattr(importlib.import_module(f"fasttower_kernels.losses.{loss}.numba_cpu"), function)


@njit(**OPTIONS)
def _nothing(x: Array, end: int, tile: Any) -> None:
    return


chosen(accumulate, lambda loss: _of(loss, "accumulate") if loss in NORMALISED else _nothing)
chosen(slopes, lambda loss: _of(loss, "slopes"))
