"""Checks of arguments that more than one operator takes. Compiled code checks no index, and no array."""

import torch
from torch import Tensor

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.tables import ROW_ALIGNMENT, Interactions, Tables


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


def check_tables(parameters: Tables, others: dict[str, Tables], *, fused: bool) -> None:
    """Check that tables fit each other.

    Args:
        parameters: users (U, P), items (I, P) and item bias (I,) or None.
        others: by name, what goes with them: of the same shapes, dtypes and device.
        fused: whether they are for compiled code, which takes contiguous float32 and padded rows.

    Raises:
        FastTowerError: they do not.
    """
    shapes = [tuple(array.shape) for array in parameters]
    users, items, *bias = shapes
    if not len(users) == len(items) == 2 or users[1] != items[1] or bias not in ([], [items[:1]]):
        raise FastTowerError(f"tables have the shapes {shapes}; expected (U, P), (I, P) and maybe (I,).")
    first, *rest = (
        [(array.dtype, str(array.device), tuple(array.shape)) for array in tables]
        for tables in (parameters, *others.values())
    )
    for name, other in zip(others, rest, strict=True):
        if other != first:
            raise FastTowerError(f"{name} are {other}; expected those of the parameters, {first}.")
    if not fused:
        return
    for array in (array for tables in (parameters, *others.values()) for array in tables):
        if (
            array.dtype != torch.float32
            or not array.is_contiguous()
            or array.device != parameters.users.device
        ):
            raise FastTowerError(
                f"a table is {array.dtype} on {array.device}, strides {array.stride()}; the fused backends "
                f"take contiguous float32 on one device: choose backend torch."
            )
    if users[1] % ROW_ALIGNMENT:
        raise FastTowerError(
            f"rows are {users[1]} floats wide; the fused backends take a multiple of {ROW_ALIGNMENT}: pad "
            f"them with zeros, or choose backend torch."
        )


def check_pairs(parameters: Tables, pairs: Interactions, known_positives: KnownPositives | None) -> None:
    """Check that pairs of users and items, and known positives, are of some tables and on their device.

    Raises:
        FastTowerError: they are not.
    """
    sizes, device = (len(parameters.users), len(parameters.items)), parameters.users.device
    for name, index, largest, size in zip(
        ("user", "item"), (pairs.user_index, pairs.item_index), pairs.largest, sizes, strict=True
    ):
        if index.device != device:
            raise FastTowerError(
                f"{name} indices are on {index.device}, the tables on {device}; use one device."
            )
        if len(index) and not 0 <= largest < size:
            raise FastTowerError(f"{name} indices reach {largest}; expected 0 to {size - 1}.")
    if known_positives is not None:
        check_known_positives(known_positives, sizes[1], device)
        if known_positives.num_users != sizes[0]:
            raise FastTowerError(
                f"known positives are of {known_positives.num_users} users, the tables of {sizes[0]}."
            )


def check_step(step: int) -> None:
    """Check that a step fits its word of a counter.

    Raises:
        FastTowerError: it does not.
    """
    if not 0 <= step < 2**32:
        raise FastTowerError(f"step is {step}; expected a whole number from 0 to 2**32 - 1.")
