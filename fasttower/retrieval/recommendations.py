"""The frame of recommendations: who is recommended what, at which rank, with which score."""

from __future__ import annotations

import numpy as np
import polars as pl
from torch import Tensor

from fasttower.errors import FastTowerError
from fasttower_kernels.topk import TopK


def recommendation_frame(
    user_index: Tensor, topk: TopK, users: pl.DataFrame, items: pl.DataFrame
) -> pl.DataFrame:
    """Put the original ids to a top-K; absent slots are dropped.

    Args:
        user_index: (R,), integer: the user of each row of `topk`.
        topk: items (R, K) and scores (R, K), best first, on any device.
        users: user_id, user_index; row i holds index i.
        items: item_id, item_index; row i holds index i.

    Returns:
        user_id, item_id (the types of `users` and `items`), rating (Float32, the score) and rank (Int32, from
        1), in the order of `user_index` and then of rank. A user without recommendations has no row.

    Raises:
        FastTowerError: rows that do not match, an id map out of order, or an index that it does not hold.
    """
    if topk.items.shape != topk.scores.shape or len(topk.items) != len(user_index):
        raise FastTowerError(
            f"{len(user_index)} users, items {tuple(topk.items.shape)}, scores {tuple(topk.scores.shape)}; "
            f"expected (R,), (R, K) and (R, K)"
        )
    item_index = topk.items.cpu().numpy()  # [R, K]
    row, slot = np.nonzero(item_index >= 0)
    return pl.DataFrame(
        [
            _ids_of(user_index.cpu().numpy()[row], users, "user"),
            _ids_of(item_index[row, slot], items, "item"),
            pl.Series("rating", topk.scores.cpu().numpy()[row, slot]),
            pl.Series("rank", (slot + 1).astype(np.int32)),
        ]
    )


def _ids_of(index: np.ndarray, id_map: pl.DataFrame, name: str) -> pl.Series:
    """Original ids by position in the map, which is a gather where a join would hash."""
    if not np.array_equal(id_map[f"{name}_index"].to_numpy(), np.arange(id_map.height)):
        raise FastTowerError(f"the map of {name} ids has gaps or is out of order; sort it by {name}_index")
    if len(index) and not 0 <= index.min() <= index.max() < id_map.height:
        raise FastTowerError(
            f"{name} indices go from {index.min()} to {index.max()}; the map holds 0 to {id_map.height - 1}"
        )
    return id_map[f"{name}_id"].gather(index)
