"""What training holds in the memory of a device, and whether there is room for it."""

from __future__ import annotations

import torch

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.settings import TableDtype


def resident_bytes(
    *,
    num_users: int,
    num_items: int,
    width: int,
    num_rows: int,
    num_known: int,
    bits: int = 0,
    table_dtype: TableDtype = "float32",
) -> dict[str, int]:
    """What training holds in device memory, in bytes by name.

    Args:
        num_users: U.
        num_items: I.
        width: P, the padded width of a row.
        num_rows: n, the positives.
        num_known: nnz of the known positives; 0 without exclusion.
        bits: size of the bits that negatives are looked up in, where there are any.
        table_dtype: of the vectors that the loss reads.
    """
    return {
        "tables, gradients and moments": 4 * 4 * ((num_users + num_items) * width + num_items),
        "rounded tables": 2 * (num_users + num_items) * width if table_dtype == "bfloat16" else 0,
        "positives": 8 * num_rows,
        "known positives": 4 * num_known + 8 * (num_users + 1) if num_known else 0,
        "bits of known positives": bits,
    }


def check_device_memory(sizes: dict[str, int], device: torch.device) -> None:
    """Refuse, before anything is copied, what the device cannot hold.

    Args:
        sizes: of `resident_bytes`.
        device: a CUDA device; others are not checked.

    Raises:
        FastTowerError: the sizes, and the memory that is free.
    """
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if sum(sizes.values()) > free:
        raise FastTowerError(
            f"training needs {listed(sizes)}, but {device} has {_gib(free)} of {_gib(total)} free; "
            "choose a smaller embedding_dim, fewer interactions, or device cpu."
        )


def listed(sizes: dict[str, int]) -> str:
    """The sizes and their names, for a message."""
    return ", ".join(f"{_gib(size)} for {name}" for name, size in sizes.items() if size)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
