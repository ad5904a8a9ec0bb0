"""Top-K for many users, block by block, as frames in the caller's ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fasttower.config import Config
from fasttower.errors import FastTowerError, whole_number
from fasttower.model import TwoTower
from fasttower.retrieval.ahead import one_ahead
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.topk import Scoring, TopK, top_k

# What a block's frame holds stays small beside the tables, and a block large enough to keep every core busy.
_BLOCK_SLOTS = 1 << 18


def recommend(
    user_vectors: Tensor,
    user_ids: pl.Series,
    model: TwoTower,
    items: pl.DataFrame,
    *,
    k: int,
    seen: KnownPositives | None = None,
    seen_users: Tensor | None = None,
    candidates: Tensor | None = None,
    scoring: Scoring = "float32",
    memory_budget_bytes: int | None = None,
) -> Iterator[pl.DataFrame]:
    """The K best items of each user, in frames of some users each, which can be written as they come.

    On a GPU the next block of users is scored while the frame of this one is made and used.

    Args:
        user_vectors: (R, D), float32.
        user_ids: (R,): whose they are.
        model: has the item vectors and the bias.
        items: item_id, item_index and, if known, title; row i holds index i.
        k: items wanted a user.
        seen: items to leave out; None leaves nothing out.
        seen_users: (R,), integer: the row of `seen` for each user; needed with it.
        candidates: (I,), bool: the only items that may be given; None for all.
        scoring: see `fasttower_kernels.topk.top_k`.
        memory_budget_bytes: likewise.

    Yields:
        user_id, item_id, rating (Float32, the score), rank (Int32, from 1) and, if known, title; in the order
        of the users and then of rank. A user with fewer than K items left has fewer rows.

    Raises:
        FastTowerError: k below 1, a budget that cannot be kept, or a scoring that the device does not have.
    """
    k = min(whole_number("k", k), max(1, len(items)))
    if memory_budget_bytes is not None:
        memory_budget_bytes = whole_number("memory_budget_bytes", memory_budget_bytes)
    block = max(1, _BLOCK_SLOTS // k)
    blocks = [slice(begin, begin + block) for begin in range(0, max(1, len(user_vectors)), block)]
    item_vectors, device = model.infer_items(), user_vectors.device
    # The stream and the device are the caller's, also in a thread, which would have others.
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def search(rows: slice) -> TopK:
        with torch.cuda.stream(stream):
            topk = top_k(
                user_vectors[rows],
                item_vectors,
                k=k,
                item_bias=model.item_bias,
                seen=seen,
                seen_users=None if seen is None or seen_users is None else seen_users[rows],
                candidates=candidates,
                scoring=scoring,
                memory_budget_bytes=memory_budget_bytes,
            )
            return TopK(topk.items.cpu(), topk.scores.cpu())

    for rows, topk in zip(blocks, _mapping(device)(search, blocks), strict=True):
        yield recommendation_frame(user_ids[rows], topk, items)


def _mapping(device: torch.device) -> Callable[[Callable[[slice], TopK], Iterable[slice]], Iterable[TopK]]:
    """How a search is applied to blocks: on a CPU one after another, for the cores are busy as it is."""
    return one_ahead if device.type == "cuda" else map


def recommend_to_all(
    model: TwoTower, known: KnownPositives, users: pl.DataFrame, items: pl.DataFrame, config: Config
) -> pl.DataFrame:
    """A run's own recommendations: to all of its users, by its configuration, without titles.

    Args:
        model: the trained model.
        known: the pairs that it was fitted to, on its device.
        users: user_id, user_index; row i holds index i.
        items: item_id and item_index, likewise.
        config: says how many, and whether seen items are left out.

    Returns:
        user_id, item_id, rating and rank, as `recommend` yields them.
    """
    frames = recommend(
        model.infer_users(),
        users["user_id"],
        model,
        items.select("item_id", "item_index"),
        k=config.k,
        seen=known if config.filter_seen else None,
        seen_users=torch.arange(known.num_users, device=known.items.device),
    )
    return pl.concat(frames)


def recommendation_frame(user_ids: pl.Series, topk: TopK, items: pl.DataFrame) -> pl.DataFrame:
    """Put the original ids to a top-K; absent slots are dropped.

    Args:
        user_ids: (R,): the user of each row of `topk`; names the first column.
        topk: items (R, K) and scores (R, K), best first, on any device.
        items: item_id, item_index and, if known, title; row i holds index i.

    Returns:
        The users, item_id, rating (Float32, the score), rank (Int32, from 1) and, if known, title.

    Raises:
        FastTowerError: rows that do not match, an id map out of order, or an index that it does not hold.
    """
    return ranked_frame(user_ids, topk, items, id_name="item_id", score_name="rating")


def ranked_frame(
    query_ids: pl.Series, topk: TopK, id_map: pl.DataFrame, *, id_name: str, score_name: str
) -> pl.DataFrame:
    """A row for each slot of a top-K that is taken: query, found id, score, rank and, if known, title."""
    if topk.items.shape != topk.scores.shape or len(topk.items) != len(query_ids):
        raise FastTowerError(
            f"{len(query_ids)} users, items {tuple(topk.items.shape)}, scores {tuple(topk.scores.shape)}; "
            f"expected (R,), (R, K) and (R, K)"
        )
    index = topk.items.cpu().numpy()  # [R, K]
    row, slot = np.nonzero(index >= 0)
    found = rows_at(index[row, slot], id_map)
    columns = [
        query_ids.gather(row),
        found[:, 0].alias(id_name),
        pl.Series(score_name, topk.scores.cpu().numpy()[row, slot]),
        pl.Series("rank", (slot + 1).astype(np.int32)),
    ]
    if "title" in id_map.columns:
        columns.append(found["title"])
    return pl.DataFrame(columns)


def rows_at(index: np.ndarray, id_map: pl.DataFrame) -> pl.DataFrame:
    """Rows of an id map by position, which is a gather where a join would hash.

    Args:
        index: (n,), integer.
        id_map: an id, its index, and whatever else; row i holds index i.

    Raises:
        FastTowerError: the map is out of order, or does not hold an index.
    """
    name = id_map.columns[1]
    if not np.array_equal(id_map[name].to_numpy(), np.arange(id_map.height)):
        raise FastTowerError(f"the map of {id_map.columns[0]} has gaps or is out of order; sort it by {name}")
    if len(index) and not 0 <= index.min() <= index.max() < id_map.height:
        raise FastTowerError(
            f"{name} goes from {index.min()} to {index.max()}; the map holds 0 to {id_map.height - 1}"
        )
    return id_map[index]
