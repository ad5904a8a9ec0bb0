"""The losses, compiled, by name: the name is a literal, and only the loss that it names is compiled.

    begin_tile(x, tile)                    # row 0 has the positives' logits
    for each chunk:                        # only for a loss of NORMALISED, whose slopes need all logits
        ...                                # rows 1 .. end - 1 of x get the logits of the chunk's negatives
        accumulate(loss, x, end, tile)
    for each chunk:
        ...                                # the same logits again, unless there is one chunk
        slopes(loss, x, end, last, tile)   # logits become slopes times weight; tile.value is the chunk's loss

Softmax takes negatives' logits less log q. A logit of -inf counts for nothing: its slope is 0.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from numba import types

from fasttower_kernels.compiled import OPTIONS, Array, overload
from fasttower_kernels.losses.tile_numba_cpu import TILE, LossTile, begin_tile, new_tile

__all__ = ["NORMALISED", "TILE", "LossTile", "accumulate", "begin_tile", "new_tile", "slopes"]

NORMALISED = frozenset({"softmax"})
"""Losses whose slopes need a sum over all negatives first."""


def accumulate(loss: str, x: Array, end: int, tile: LossTile) -> None:
    """Add rows 1 .. end - 1 to ``tile.maximum`` and ``tile.total``; nothing if the loss isn't normalised."""
    raise NotImplementedError  # compiled code only


def slopes(loss: str, x: Array, end: int, last: bool, tile: LossTile) -> None:
    """Replace logits by slopes, times the weights, and write ``tile.value``.

    Args:
        loss: a literal.
        x: (rows * TILE,), float32: rows 1 .. end - 1 are the chunk's negatives. Row 0, the positives, is read
            in every chunk and replaced in the last one.
        end: uint64.
        last: bool, whether this is the last chunk.
        tile: of `new_tile`; its value is the loss of this chunk.
    """
    raise NotImplementedError  # compiled code only


def _chosen(loss: Any, function: str) -> Any:
    module = f"fasttower_kernels.losses.{loss.literal_value}.numba_cpu"
    return getattr(importlib.import_module(module), function)


@overload(accumulate, prefer_literal=True, jit_options=OPTIONS)
def _accumulate(loss: Any, x: Any, end: Any, tile: Any) -> Callable[..., None] | None:
    if not isinstance(loss, types.StringLiteral):
        return None  # numba then tries the literal
    if loss.literal_value not in NORMALISED:

        def nothing(loss: Any, x: Any, end: Any, tile: Any) -> None:
            return

        return nothing
    chosen = _chosen(loss, "accumulate")

    def run(loss: Any, x: Any, end: Any, tile: Any) -> None:
        chosen(x, end, tile)

    return run


@overload(slopes, prefer_literal=True, jit_options=OPTIONS)
def _slopes(loss: Any, x: Any, end: Any, last: Any, tile: Any) -> Callable[..., None] | None:
    if not isinstance(loss, types.StringLiteral):
        return None
    chosen = _chosen(loss, "slopes")

    def run(loss: Any, x: Any, end: Any, last: Any, tile: Any) -> None:
        chosen(x, end, last, tile)

    return run
