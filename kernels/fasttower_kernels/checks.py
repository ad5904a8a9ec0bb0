"""Checks of arguments that more than one operator takes. Compiled code checks no index."""

import torch
from torch import Tensor

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives


def check_index(name: str, index: Tensor, size: int) -> None:
    """Check that an index is one-dimensional and integer, and goes from 0 to size - 1.

    Reading it waits for the device.

    Raises:
        FastTowerError: it is not.
    """
    if index.dtype not in (torch.int32, torch.int64) or index.ndim != 1:
        raise FastTowerError(
            f"{name} is {index.dtype} of shape {tuple(index.shape)}; expected int32 or int64 (n,)."
        )
    if len(index):
        low, high = torch.stack(index.aminmax()).tolist()
        if low < 0 or high >= size:
            raise FastTowerError(f"{name} goes from {low} to {high}; expected 0 to {size - 1}.")


def check_known_positives(known_positives: KnownPositives, num_items: int, device: torch.device) -> None:
    """Check that known positives are of a catalogue and on a device.

    Raises:
        FastTowerError: they are not.
    """
    if known_positives.num_items != num_items or known_positives.items.device != device:
        raise FastTowerError(
            f"known positives are of {known_positives.num_items} items on {known_positives.items.device}; "
            f"expected {num_items} on {device}."
        )


def check_step(step: int) -> None:
    """Check that a step fits its word of a counter.

    Raises:
        FastTowerError: it does not.
    """
    if not 0 <= step < 2**32:
        raise FastTowerError(f"step is {step}; expected a whole number from 0 to 2**32 - 1.")
