"""Top-K retrieval over a whole catalogue, seen items left out.

`top_k` is the function; `TopKSearch` is the same for a catalogue that is searched many times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor

from fasttower_kernels.backends import choose_backend
from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.settings import Backend
from fasttower_kernels.topk.certified import top_k_certified
from fasttower_kernels.topk.precision import Scoring, check_scoring
from fasttower_kernels.topk.reference import TopK, top_k_torch
from fasttower_kernels.topk.tiles import Catalogue

__all__ = ["Scoring", "TopK", "TopKSearch", "top_k"]

_CPU_BUDGET_BYTES = 256 << 20


@torch.no_grad()
def top_k(
    user_vectors: Tensor,
    item_vectors: Tensor,
    *,
    k: int,
    item_bias: Tensor | None = None,
    seen: KnownPositives | None = None,
    seen_users: Tensor | None = None,
    candidates: Tensor | None = None,
    scoring: Scoring = "float32",
    memory_budget_bytes: int | None = None,
    backend: Backend = "auto",
) -> TopK:
    """The K items with the highest scores for each user, best first, seen items left out.

    Replaces ``(user_vectors @ item_vectors.T + item_bias).masked_fill(seen | ~candidates, -inf).topk(k)``,
    which holds users x items scores; here they exist for a tile of some users and some items at a time.

    Equal scores are ordered by the smaller item index, also at the boundary between the K-th and the next;
    0.0 and -0.0 are equal. A user with fewer than K items left gets fewer: the slots left over hold item -1
    and score -inf.

    Where scores are exact, as those of small integers are, the result is the same bit for bit whatever the
    backend, budget and number of threads. Otherwise the matmul's rounding decides between scores that differ
    in their last bits. Backend numba gives MKL no shape for which it is known to round otherwise, so that
    with MKL the result depends neither on the budget nor on the number of threads, nor on which other users
    are asked for; other matmuls promise less.

    Args:
        user_vectors: (R, D), float32; rows may be strided (a view of padded storage).
        item_vectors: (I, D), float32; likewise.
        k: K, items wanted per user, at least 1.
        item_bias: (I,), float32, added to the scores; None for none.
        seen: items to leave out, (U rows, I items); None leaves nothing out.
        seen_users: (R,), int32 or int64, 0 <= index < U: the row of `seen` for each user vector; needed with
            `seen` and not read without.
        candidates: (I,), bool: the only items that may be given; None for all. Where they are few, only
            they are scored.
        scoring: precision of the matmul. With "tf32" (CUDA) and "bfloat16" (CUDA, CPU) more than K items per
            user are scored again in float32, and a user for whom a bound of the error leaves it open whether
            these hold the K best is scored in float32 throughout: the result is that of "float32" up to
            float32's own rounding, always. It is for GPUs and a K that is small beside the catalogue; on a
            CPU it is the slower way, and runs in backend torch.
        memory_budget_bytes: bound on what is allocated beyond the arguments and the result, in bytes; None
            for a quarter of what is free on a GPU and 256 MiB elsewhere, of which backend numba takes 4 MiB
            a thread and no more unless candidates are gathered. Below some 100 kB (numba: 4 users and 256
            items at a time, and 64 bytes for each of K; in reduced precision 3 kB a dimension more) it is
            the least that is possible. What the matmul library keeps for itself is not in it.
        backend: numba on a CPU, torch everywhere; there is none in Triton.

    Returns:
        Without gradients, items (R, K) int32 and their scores (R, K) float32, on the vectors' device.

    Raises:
        FastTowerError: shapes, types or devices that do not fit, an index out of range, vectors that are
            not finite (or so large that scores would not be), or a backend that cannot run here.
    """
    return TopKSearch(item_vectors, item_bias)(
        user_vectors,
        k=k,
        seen=seen,
        seen_users=seen_users,
        candidates=candidates,
        scoring=scoring,
        memory_budget_bytes=memory_budget_bytes,
        backend=backend,
    )


class TopKSearch:
    """`top_k` over one catalogue, whose values are looked at once, in the first search.

    The vectors and the bias are taken without a copy, and must not change afterwards.

    Args:
        item_vectors: as in `top_k`.
        item_bias: as in `top_k`.

    Raises:
        FastTowerError: shapes, types or devices that do not fit.
    """

    def __init__(self, item_vectors: Tensor, item_bias: Tensor | None = None) -> None:
        _check_tensor("item_vectors", item_vectors)
        if item_bias is not None:
            _check_tensor("item_bias", item_bias)
            _check_device("item_bias", item_bias, "item_vectors", item_vectors)
            if item_bias.shape != item_vectors.shape[:1]:
                raise FastTowerError(
                    f"item_bias has shape {tuple(item_bias.shape)}; expected ({len(item_vectors)},)"
                )
        self._vectors, self._bias = item_vectors, item_bias

    @torch.no_grad()
    def __call__(
        self,
        user_vectors: Tensor,
        *,
        k: int,
        seen: KnownPositives | None = None,
        seen_users: Tensor | None = None,
        candidates: Tensor | None = None,
        scoring: Scoring = "float32",
        memory_budget_bytes: int | None = None,
        backend: Backend = "auto",
    ) -> TopK:
        """The K best items of each user; see `top_k`."""
        _check_numbers(k, memory_budget_bytes)
        self._check_users(user_vectors)
        if seen is not None:
            _check_seen(seen, seen_users, user_vectors, len(self._vectors))
        if candidates is not None:
            _check_candidates(candidates, self._vectors)
        device = user_vectors.device
        check_scoring(scoring, device)
        name = _choose_backend(backend, device, scoring)
        budget = _default_budget(device) if memory_budget_bytes is None else memory_budget_bytes
        catalogue = Catalogue.of(self._vectors, self._bias, candidates, budget)
        run: Callable[..., TopK] = top_k_torch
        if name == "numba":
            # numba is optional
            from fasttower_kernels.topk.numba_cpu import top_k_numba as run  # noqa: PLC0415
        elif scoring != "float32":
            run = partial(top_k_certified, scoring=scoring)
        return run(
            user_vectors,
            catalogue,
            k=k,
            seen=seen,
            seen_users=seen_users,
            budget_bytes=budget - catalogue.index_bytes,
        )

    @cached_property
    def _largest(self) -> tuple[float, float]:
        """The largest magnitudes of the vectors and of the bias."""
        bias = 0.0 if self._bias is None else _largest_magnitude("item_bias", self._bias)
        return _largest_magnitude("item_vectors", self._vectors), bias

    def _check_users(self, user_vectors: Tensor) -> None:
        _check_tensor("user_vectors", user_vectors)
        _check_device("item_vectors", self._vectors, "user_vectors", user_vectors)
        users, items = tuple(user_vectors.shape), tuple(self._vectors.shape)
        if len(users) != 2 or len(items) != 2 or users[1] != items[1] or users[1] == 0:
            raise FastTowerError(
                f"user_vectors have shape {users} and item_vectors {items}; "
                f"expected (R, D) and (I, D), D >= 1"
            )
        # Finite scores leave -inf to mean one thing only: left out.
        largest_user = _largest_magnitude("user_vectors", user_vectors)
        largest_item, largest_bias = self._largest
        bound = users[1] * largest_user * largest_item + largest_bias
        if bound > torch.finfo(torch.float32).max:
            raise FastTowerError(
                f"scores may reach {bound:.1e}, beyond float32; scale the vectors down: "
                f"the model has diverged"
            )


def _choose_backend(backend: Backend, device: torch.device, scoring: Scoring) -> str:
    if backend == "triton":
        raise FastTowerError("backend is triton, in which there is no top-K; choose auto, torch or numba.")
    name, _ = choose_backend(backend, device)
    if scoring != "float32":
        if backend == "numba":
            raise FastTowerError(
                f"scoring is {scoring}, and backend numba has only float32; choose backend auto or torch."
            )
        return "torch"
    return "torch" if name == "triton" else name


def _default_budget(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_BUDGET_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + unused) // 4


def _check_numbers(k: int, memory_budget_bytes: int | None) -> None:
    if k < 1:
        raise FastTowerError(f"k is {k}; ask for at least 1 item per user")
    if memory_budget_bytes is not None and memory_budget_bytes < 1:
        raise FastTowerError(
            f"memory_budget_bytes is {memory_budget_bytes}; give a positive number of bytes, or None"
        )


def _check_candidates(candidates: Tensor, item_vectors: Tensor) -> None:
    if candidates.dtype != torch.bool or candidates.shape != item_vectors.shape[:1]:
        raise FastTowerError(
            f"candidates are {candidates.dtype} of shape {tuple(candidates.shape)}; "
            f"expected bool of shape ({len(item_vectors)},)"
        )
    if candidates.device != item_vectors.device:
        raise FastTowerError(
            f"candidates are on {candidates.device}, item_vectors on {item_vectors.device}; use one device"
        )


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise FastTowerError(f"{name} is {tensor.dtype}; top-K takes float32, convert it with .float()")


def _check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise FastTowerError(f"{name} is on {tensor.device}, {other_name} on {other.device}; use one device")


def _largest_magnitude(name: str, tensor: Tensor) -> float:
    """The largest absolute value of finite ones; without a copy of the tensor."""
    if tensor.numel() == 0:
        return 0.0
    low, high = torch.stack(tensor.aminmax()).tolist()
    magnitude = high if math.isnan(high) else max(-low, high)  # NaN propagates to both ends
    if not magnitude < torch.inf:
        raise FastTowerError(
            f"{name} hold NaN or infinity; top-K needs finite values: the model has diverged or is broken"
        )
    return magnitude


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
