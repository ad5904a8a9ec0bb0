"""A top-K as a frame in the caller's ids."""

from __future__ import annotations

import numpy as np
import polars as pl

from fasttower.errors import FastTowerError
from fasttower.retrieval.ids import IdMap
from fasttower_kernels.topk import TopK


def recommendation_frame(user_ids: pl.Series, topk: TopK, items: IdMap) -> pl.DataFrame:
    """A row for each item that a top-K gives to a user; slots that hold none are dropped.

    Args:
        user_ids: (R,): the user of each row of `topk`; names the first column.
        topk: items (R, K) and scores (R, K), best first, on any device.
        items: the ids of the items and, if known, their titles.

    Returns:
        The users, item_id, score (Float32), rank (Int32, from 1) and, if known, title.

    Raises:
        FastTowerError: rows that do not match, or an index that the map does not hold.
    """
    return ranked_frame(user_ids, topk, items, id_name="item_id", score_name="score")


def ranked_frame(
    query_ids: pl.Series, topk: TopK, id_map: IdMap, *, id_name: str, score_name: str
) -> pl.DataFrame:
    """A row for each slot of a top-K that is taken: query, found id, score, rank and, if known, title."""
    if topk.items.shape != topk.scores.shape or len(topk.items) != len(query_ids):
        raise FastTowerError(
            f"{len(query_ids)} users, items {tuple(topk.items.shape)}, scores {tuple(topk.scores.shape)}; "
            f"expected (R,), (R, K) and (R, K)"
        )
    index = topk.items.cpu().numpy()  # [R, K]
    row, slot = np.nonzero(index >= 0)
    found = index[row, slot]
    if (last := found.max(initial=-1)) >= len(id_map):
        raise FastTowerError(f"{id_map.index_name} goes up to {last}; the map holds 0 to {len(id_map) - 1}")
    columns = [
        query_ids[row],
        id_map.ids[found].alias(id_name),
        pl.Series(score_name, topk.scores.cpu().numpy()[row, slot]),
        pl.Series("rank", (slot + 1).astype(np.int32)),
    ]
    if id_map.titles is not None:
        columns.append(id_map.titles[found])
    return pl.DataFrame(columns)
