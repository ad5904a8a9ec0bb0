"""Initial vectors from the interactions' leading singular vectors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize, pad

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.philox import Purpose, derive_key

_OVERSAMPLING = 8

# Smaller singular values than this, relative to the largest one, are rounding errors.
_SMALLEST = 1e-3


def spectral_vectors(known: KnownPositives, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Vectors of users and items whose inner products come nearest to the interactions.

    The matrix holds 1 / sqrt(d) for each item that a user with d items has touched, so that all users count
    alike. Its leading singular vectors, times the roots of the singular values, are found by random
    projection and one power iteration; each row is divided by its length.

    Args:
        known: U users and I items.
        dim: D.
        seed: of the projection.

    Returns:
        (U, D) and (I, D), float32, on the device of ``known``. Rows are of length 1, or 0 where nothing was
        touched; columns past the rank of the matrix are 0.

    Source: Halko, Martinsson and Tropp, "Finding Structure with Randomness" (SIAM Review 2011), algorithms
    4.4 and 5.1.
    """
    device = known.items.device
    known = known.to("cpu") if device.type == "mps" else known  # that has no float64
    by_user, by_item = _Bags.of(known), _Bags.transposed(known)
    scale = known.degrees.clamp(min=1).rsqrt().unsqueeze(1)

    def to_users(items: Tensor) -> Tensor:
        return by_user.sums(items).mul_(scale)

    def to_items(users: Tensor) -> Tensor:
        return by_item.sums(users * scale)

    num_users, num_items = known.num_users, known.num_items
    width = min(dim + _OVERSAMPLING, num_users, num_items)
    generator = torch.Generator().manual_seed(derive_key(seed, Purpose.INITIAL_TABLES, 2)[0])
    projection = torch.randn(num_items, width, generator=generator).to(known.items.device)
    items = torch.linalg.qr(to_items(to_users(projection)))[0]
    users = torch.linalg.qr(to_users(items))[0] * (known.degrees > 0).unsqueeze(1)  # without rounding errors
    items = to_items(users)
    squares, rotation = torch.linalg.eigh(items.double().T @ items.double())
    squares, rotation = squares.flip(0)[:dim], rotation.flip(1)[:, :dim]
    root = squares.clamp(min=0).sqrt().sqrt()  # of the singular values
    kept = squares > _SMALLEST**2 * squares[:1].clamp(min=torch.finfo(torch.float32).tiny)
    vectors = (
        users @ (rotation * torch.where(kept, root, 0)).float(),
        items @ (rotation * torch.where(kept, 1 / root, 0)).float(),
    )
    missing = dim - vectors[0].shape[1]
    left, right = (pad(normalize(part), (0, missing)).to(device) for part in vectors)
    return left, right


class _Bags:
    """Sums of rows of a table, a bag of rows for each output row."""

    def __init__(self, members: Tensor, offsets: Tensor) -> None:
        # Both in one type, the smaller one if it can count the members.
        kind = torch.int32 if len(members) < 2**31 else torch.int64
        self._members, self._offsets = members.to(kind), offsets.to(kind)

    @staticmethod
    def of(known: KnownPositives) -> _Bags:
        """The items of each user."""
        return _Bags(known.items, known.indptr)

    @staticmethod
    def transposed(known: KnownPositives) -> _Bags:
        """The users of each item."""
        device = known.items.device
        users = torch.arange(known.num_users, dtype=torch.int32, device=device)
        users = users.repeat_interleave(known.degrees)
        items, order = known.items.sort(stable=True)
        bounds = torch.arange(known.num_items + 1, dtype=torch.int32, device=device)
        return _Bags(users[order], torch.searchsorted(items, bounds))

    def sums(self, table: Tensor) -> Tensor:
        """(bags, D): the sums of the rows of a table (rows, D)."""
        table = table.contiguous()  # a factor of a QR decomposition is not, and costs ten times as much
        return embedding_bag(self._members, table, self._offsets, mode="sum", include_last_offset=True)
