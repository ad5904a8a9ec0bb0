"""Recommendations, scores and neighbours by one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import cached_property

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fasttower.config import Config
from fasttower.errors import whole_number
from fasttower.model import TwoTower
from fasttower.retrieval.ahead import one_ahead
from fasttower.retrieval.frames import recommendation_frame
from fasttower.retrieval.ids import IdMap
from fasttower.retrieval.neighbours import Neighbours
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.topk import Scoring, TopK, TopKSearch

# What a block's frame holds stays small beside the tables, and a block large enough to keep every core busy.
_BLOCK_SLOTS = 1 << 18


class Retriever:
    """A model with its ids, ready to be asked: what does not change is checked and looked up once.

    So a question about one user takes the time of that user's scores. The model's parameters, the maps and
    the known positives are taken without a copy, and must not change afterwards.

    Attributes:
        users: the ids of the users.
        items: the ids of the items and, if known, their titles.

    Args:
        model: its user u has the id at position u of `users`, its item i that at position i of `items`.
        users: user_id, user_index; row i holds index i.
        items: item_id, item_index and, if known, title; likewise.
        known_positives: what each user has seen; on the model's device.

    Raises:
        FastTowerError: a map that is out of order.
    """

    def __init__(
        self, model: TwoTower, users: pl.DataFrame, items: pl.DataFrame, known_positives: KnownPositives
    ) -> None:
        self.users, self.items = IdMap(users), IdMap(items)
        self._model, self._known = model, known_positives
        self._device = known_positives.items.device

    @cached_property
    def _search(self) -> TopKSearch:
        return TopKSearch(self._model.infer_items().detach(), self._model.item_bias)

    @cached_property
    def _similar_users(self) -> Neighbours:
        return Neighbours(self._model.infer_users(), self.users)

    @cached_property
    def _similar_items(self) -> Neighbours:
        return Neighbours(self._model.infer_items(), self.items)

    @torch.no_grad()
    def recommend(
        self,
        users: np.ndarray | None = None,
        *,
        k: int,
        filter_seen: bool = True,
        candidates: Tensor | None = None,
        scoring: Scoring = "float32",
        memory_budget_bytes: int | None = None,
    ) -> Iterator[pl.DataFrame]:
        """The K best items of some of the model's users, as `recommend_to_vectors` yields them.

        Args:
            users: (n,), integer: their indices; None for all.
            k: items wanted per user.
            filter_seen: leave out the known positives.
            candidates: as in `recommend_to_vectors`, as the others are.
            scoring: likewise.
            memory_budget_bytes: likewise.
        """
        if users is None:
            vectors, ids = self._model.infer_users(), self.users.ids
            rows = torch.arange(len(ids), device=self._device)
        else:
            rows = self.on_device(users)
            vectors, ids = self._model.infer_users(rows), self.users.ids[users]
        return self.recommend_to_vectors(
            vectors,
            ids,
            k=k,
            seen=self._known if filter_seen else None,
            seen_users=rows,
            candidates=candidates,
            scoring=scoring,
            memory_budget_bytes=memory_budget_bytes,
        )

    def recommend_to_vectors(
        self,
        vectors: Tensor,
        ids: pl.Series,
        *,
        k: int,
        seen: KnownPositives | None = None,
        seen_users: Tensor | None = None,
        candidates: Tensor | None = None,
        scoring: Scoring = "float32",
        memory_budget_bytes: int | None = None,
    ) -> Iterator[pl.DataFrame]:
        """The K best items for each of some vectors, in frames of some users each.

        The frames can be written as they come: on a GPU the next block of users is scored while the frame of
        this one is made and used.

        Args:
            vectors: (R, D), float32, on the model's device.
            ids: (R,): whose they are; they need not be the model's users.
            k: items wanted per user.
            seen: items to leave out; None leaves nothing out.
            seen_users: (R,), integer: the row of `seen` for each user; needed with it.
            candidates: (I,), bool: the only items that may be given; None for all.
            scoring: see `fasttower_kernels.topk.top_k`.
            memory_budget_bytes: likewise.

        Yields:
            user_id, item_id, score (Float32), rank (Int32, from 1) and, if known, title; in the order of the
            users and then of rank. A user with fewer than K items left has fewer rows.

        Raises:
            FastTowerError: k below 1, a budget that cannot be kept, or a scoring that the device does not
                have.
        """
        k = min(whole_number("k", k), max(1, len(self.items)))
        if memory_budget_bytes is not None:
            memory_budget_bytes = whole_number("memory_budget_bytes", memory_budget_bytes)
        block = max(1, _BLOCK_SLOTS // k)
        begins = range(0, max(1, len(vectors)), block)
        # The stream and the device are the caller's, also in a thread, which would have others.
        stream = torch.cuda.current_stream(vectors.device) if vectors.is_cuda else None

        def search(begin: int) -> TopK:
            rows = slice(begin, begin + block)
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                topk = self._search(
                    vectors[rows],
                    k=k,
                    seen=seen,
                    seen_users=None if seen is None or seen_users is None else seen_users[rows],
                    candidates=candidates,
                    scoring=scoring,
                    memory_budget_bytes=memory_budget_bytes,
                )
                return TopK(topk.items.cpu(), topk.scores.cpu())

        for begin, topk in zip(begins, _mapping(vectors.device)(search, begins), strict=True):
            yield recommendation_frame(ids.slice(begin, block), topk, self.items)

    @torch.no_grad()
    def score(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """The logits (n,), float32, of pairs of users (n,) and items (n,), given by their indices."""
        return self._model.score(self.on_device(users), self.on_device(items)).cpu().numpy()

    def similar_users(self, users: np.ndarray, k: int) -> pl.DataFrame:
        """The K users nearest to each of some, given by their indices; see `Neighbours.of`."""
        return self._similar_users.of(users, k)

    def similar_items(self, items: np.ndarray, k: int) -> pl.DataFrame:
        """The K items nearest to each of some, given by their indices; see `Neighbours.of`."""
        return self._similar_items.of(items, k)

    def on_device(self, index: np.ndarray) -> Tensor:
        """Indices (n,) on the model's device, int64."""
        return torch.from_numpy(index.astype(np.int64)).to(self._device)


def _mapping(device: torch.device) -> Callable[[Callable[[int], TopK], Iterable[int]], Iterable[TopK]]:
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
        user_id, item_id, score and rank, as `Retriever.recommend` yields them.
    """
    retriever = Retriever(model, users, items.select("item_id", "item_index"), known)
    return pl.concat(retriever.recommend(k=config.k, filter_seen=config.filter_seen))
