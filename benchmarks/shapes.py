"""What the training step is measured on: interactions in MovieLens' shapes, and tables to train."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.tables import Interactions, Tables

TRAINED_SHARE = 0.8  # of ML-20M's ratings, in the order of time


class Data(NamedTuple):
    """What is trained on."""

    interactions: Interactions
    num_users: int
    num_items: int

    def known_positives(self) -> KnownPositives:
        """Of all rows."""
        pairs = self.interactions.user_index, self.interactions.item_index
        return KnownPositives.from_pairs(*pairs, self.num_users, self.num_items)

    def batch(self, size: int) -> Interactions:
        """The first rows."""
        return Interactions(self.interactions.user_index[:size], self.interactions.item_index[:size])


def make_data(num_users: int = 6_040, num_items: int = 3_706, num_rows: int = 1_000_000) -> Data:
    """Uniform users and Zipf-distributed items; by default as many as MovieLens 1M has."""
    rng = np.random.default_rng(0)
    weight = 1 / np.arange(1, num_items + 1) ** 0.9
    users = rng.integers(0, num_users, num_rows, dtype=np.int32)
    items = rng.choice(num_items, num_rows, p=weight / weight.sum()).astype(np.int32)
    return Data(Interactions(torch.from_numpy(users), torch.from_numpy(items)), num_users, num_items)


def make_ml_20m() -> Data:
    """The rows before a time cut of `synthetic-20m`, whose users and items are as skewed as MovieLens 20M's.

    Sorted by user, as the file of ratings is.
    """
    from fasttower.data.synthetic import generate

    ratings = generate("synthetic-20m", seed=0)
    rows = int(len(ratings.user_id) * TRAINED_SHARE)
    trained = np.sort(np.argsort(ratings.timestamp, kind="stable")[:rows])
    (users, user_index), (items, item_index) = (
        np.unique(ids[trained], return_inverse=True) for ids in (ratings.user_id, ratings.item_id)
    )
    index = (torch.from_numpy(column.astype(np.int32)) for column in (user_index, item_index))
    return Data(Interactions(*index), len(users), len(items))


def read_data(name: str) -> Data:
    """The rows of a data set that RePlay's protocol trains on."""
    from fasttower.config import DataConfig
    from fasttower.data.preparation import prepare

    prepared = prepare(name, DataConfig(min_rating=3, valid_fraction=0))
    columns = (torch.tensor(prepared.fit[name].to_numpy()) for name in ("user_index", "item_index"))
    return Data(Interactions(*columns), prepared.users.height, prepared.items.height)


def make_tables(dim: int, data: Data, *, item_bias: bool = False) -> Tables:
    """New tables of the default scale."""
    generator = torch.Generator().manual_seed(0)
    users, items = (
        torch.randn(rows, dim, generator=generator) * 0.1 / dim**0.5
        for rows in (data.num_users, data.num_items)
    )
    return Tables(users, items, torch.zeros(data.num_items) if item_bias else None)
