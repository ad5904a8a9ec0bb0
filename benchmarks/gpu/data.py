"""Positives of a synthetic data set's shape, drawn on the device in seconds.

Users' activity and items' popularity are as skewed as in `fasttower.data.synthetic`, and no pair is drawn
twice. There are no planted factors: they matter for quality, and here only time is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fasttower.data.synthetic import SHAPES, Shape, popularity, ratings_per_user
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.tables import Interactions, Tables, padded

_CELLS_PER_CHUNK = 1 << 26  # of the users x items matrix; sorting them takes about 2 GB


@dataclass(frozen=True)
class Positives:
    """A data set on the device.

    Attributes:
        name: of its shape.
        interactions: the n positives, by user and then by item.
        known: the same pairs.
    """

    name: str
    interactions: Interactions
    known: KnownPositives

    def to(self, device: torch.device) -> Positives:
        """The same positives on another device."""
        return Positives(self.name, self.interactions.to(device), self.known.to(device))

    def start_tables(self, dim: int) -> Tables:
        """New tables: normal with standard deviation 0.1 / sqrt(D), no padding, bias 0."""
        device = self.known.items.device
        generator = torch.Generator(device).manual_seed(dim)
        users, items = (
            torch.randn(rows, padded(dim), generator=generator, device=device).mul_(0.1 / dim**0.5)
            for rows in (self.known.num_users, self.known.num_items)
        )
        return Tables(users, items, torch.zeros(self.known.num_items, device=device))


def draw(name: str, device: torch.device) -> Positives:
    """Positives of a named shape."""
    return draw_shape(name, SHAPES[name], device)


def draw_shape(name: str, shape: Shape, device: torch.device) -> Positives:
    """Positives of any shape.

    A user has the items with the smallest ``uniform / popularity``: distinct ones, with chances about in
    proportion to their popularity (sequential Poisson sampling, as in `fasttower.data.synthetic`).
    """
    rng = np.random.default_rng(0)
    generator = torch.Generator(device).manual_seed(0)
    counts = torch.from_numpy(ratings_per_user(shape, rng)).to(device)
    weights = torch.from_numpy(rng.permutation(popularity(shape))).to(device, torch.float32)
    items = [
        _items(chunk, weights, generator) for chunk in counts.split(max(1, _CELLS_PER_CHUNK // shape.items))
    ]
    known = KnownPositives(torch.nn.functional.pad(counts.cumsum(0), (1, 0)), torch.cat(items), shape.items)
    users = torch.repeat_interleave(torch.arange(shape.users, dtype=torch.int32, device=device), counts)
    return Positives(name, Interactions(users, known.items), known)


def _items(counts: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
    """The items of some users, one user after another, sorted: (sum of counts,), int32."""
    keys = torch.rand(len(counts), len(weights), generator=generator, device=weights.device)
    order = keys.div_(weights).argsort(dim=1)
    first = torch.arange(len(weights), device=weights.device) < counts[:, None]
    chosen = torch.zeros_like(first).scatter_(1, order, first)
    return chosen.nonzero()[:, 1].int()
