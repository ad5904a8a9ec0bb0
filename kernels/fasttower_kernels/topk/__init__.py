"""Top-K retrieval over a whole catalogue, seen items left out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.topk.reference import TopK, top_k_torch

__all__ = ["TopK", "top_k"]

DEFAULT_CHUNK_BYTES = 64 * 2**20


def top_k(
    user_vectors: Tensor,
    item_vectors: Tensor,
    *,
    k: int,
    item_bias: Tensor | None = None,
    seen: KnownPositives | None = None,
    seen_users: Tensor | None = None,
    candidates: Tensor | None = None,
    memory_budget_bytes: int | None = None,
) -> TopK:
    """The K items with the highest scores for each user, best first, seen items left out.

    Replaces ``(user_vectors @ item_vectors.T + item_bias).masked_fill(seen, -inf).topk(k)``, which holds
    users x items scores; here they exist for one chunk of users at a time.

    Equal scores are ordered by the smaller item index, also at the boundary between the K-th and the next.
    A user with fewer than K unseen items, or a catalogue smaller than K, gets fewer items: the slots left
    over hold item -1 and score -inf. Which users share a chunk matters to the matmul's rounding at most.

    Args:
        user_vectors: (R, D), float32; rows may be strided (a view of padded storage).
        item_vectors: (I, D), float32; likewise.
        k: K, items wanted a user, at least 1.
        item_bias: (I,), float32, added to the scores; None for none.
        seen: items to leave out, (U rows, I items); None leaves nothing out.
        seen_users: (R,), int32 or int64, 0 <= index < U: the row of `seen` for each user vector; needed with
            `seen` and not read without.
        chunk_bytes: bound on the memory that scores take, in bytes; one user at a time is the least.

    Returns:
        Without gradients, items (R, K) int32 and their scores (R, K) float32, on the vectors' device.

    Raises:
        FastTowerError: shapes, types or devices that do not fit, an index out of range, or vectors that are
            not finite (or so large that scores would not be).
    """
    chunk_bytes = DEFAULT_CHUNK_BYTES if memory_budget_bytes is None else memory_budget_bytes
    _check_numbers(k, chunk_bytes)
    _check_vectors(user_vectors, item_vectors, item_bias)
    if seen is not None:
        _check_seen(seen, seen_users, user_vectors, len(item_vectors))
    if candidates is not None:
        bias = torch.zeros(len(item_vectors), device=item_vectors.device) if item_bias is None else item_bias
        item_bias = bias.masked_fill(~candidates, -torch.inf)
    return top_k_torch(
        user_vectors,
        item_vectors,
        k=k,
        item_bias=item_bias,
        seen=seen,
        seen_users=seen_users,
        chunk_bytes=chunk_bytes,
    )


def _check_numbers(k: int, chunk_bytes: int) -> None:
    if k < 1:
        raise FastTowerError(f"k is {k}; ask for at least 1 item a user")
    if chunk_bytes < 1:
        raise FastTowerError(f"chunk_bytes is {chunk_bytes}; give a positive number of bytes")


def _check_vectors(user_vectors: Tensor, item_vectors: Tensor, item_bias: Tensor | None) -> None:
    tensors = {"user_vectors": user_vectors, "item_vectors": item_vectors}
    if item_bias is not None:
        tensors["item_bias"] = item_bias
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise FastTowerError(f"{name} is {tensor.dtype}; top-K takes float32, convert it with .float()")
        if tensor.device != user_vectors.device:
            raise FastTowerError(
                f"{name} is on {tensor.device}, user_vectors on {user_vectors.device}; use one device"
            )
    users, items = tuple(user_vectors.shape), tuple(item_vectors.shape)
    if len(users) != 2 or len(items) != 2 or users[1] != items[1] or users[1] == 0:
        raise FastTowerError(
            f"user_vectors have shape {users} and item_vectors {items}; expected (R, D) and (I, D), D >= 1"
        )
    if item_bias is not None and item_bias.shape != items[:1]:
        raise FastTowerError(f"item_bias has shape {tuple(item_bias.shape)}; expected ({items[0]},)")

    # Finite scores leave -inf to mean one thing only: left out.
    largest = {name: _largest_magnitude(tensor) for name, tensor in tensors.items()}
    for name, magnitude in largest.items():
        if not magnitude < torch.inf:
            raise FastTowerError(
                f"{name} hold NaN or infinity; top-K needs finite values: the model has diverged or is broken"
            )
    bound = users[1] * largest["user_vectors"] * largest["item_vectors"] + largest.get("item_bias", 0.0)
    if bound > torch.finfo(torch.float32).max:
        raise FastTowerError(
            f"scores may reach {bound:.1e}, beyond float32; scale the vectors down: the model has diverged"
        )


def _largest_magnitude(tensor: Tensor) -> float:
    """The largest absolute value, NaN where there is one; without a copy of the tensor."""
    if tensor.numel() == 0:
        return 0.0
    low, high = torch.stack(tensor.aminmax()).tolist()
    return high if math.isnan(high) else max(-low, high)  # NaN propagates to both ends


def _check_seen(
    seen: KnownPositives, seen_users: Tensor | None, user_vectors: Tensor, num_items: int
) -> None:
    num_vectors, device = len(user_vectors), user_vectors.device
    if seen.num_items != num_items:
        raise FastTowerError(f"seen knows {seen.num_items} items, item_vectors {num_items}; they must agree")
    if seen_users is None:
        raise FastTowerError("seen is given without seen_users; give the row of seen for each user vector")
    if seen_users.dtype not in (torch.int32, torch.int64) or seen_users.shape != (num_vectors,):
        raise FastTowerError(
            f"seen_users is {seen_users.dtype} of shape {tuple(seen_users.shape)}; "
            f"expected int32 or int64 of shape ({num_vectors},)"
        )
    if not seen.indptr.device == seen.items.device == seen_users.device == device:
        raise FastTowerError(
            f"seen is on {seen.indptr.device}, seen_users on {seen_users.device}, user_vectors on {device}; "
            f"move them to one device"
        )
    if num_vectors:
        num_users = len(seen.indptr) - 1
        low, high = torch.stack(seen_users.aminmax()).tolist()
        if low < 0 or high >= num_users:
            raise FastTowerError(f"seen_users goes from {low} to {high}; seen has rows 0 to {num_users - 1}")
