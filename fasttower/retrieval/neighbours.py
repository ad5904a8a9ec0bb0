"""The nearest of a table's own vectors, by cosine."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fasttower.errors import whole_number
from fasttower.retrieval.frames import ranked_frame
from fasttower.retrieval.ids import IdMap
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.topk import TopKSearch


class Neighbours:
    """The vectors of a table, normalised once, and searched for those nearest to some of them.

    Args:
        vectors: (R, D), float32; a vector of zeros has cosine 0 to all.
        id_map: their ids and, if known, titles.
    """

    @torch.no_grad()
    def __init__(self, vectors: Tensor, id_map: IdMap) -> None:
        self._unit = normalize(vectors, eps=torch.finfo(torch.float32).tiny)
        self._search = TopKSearch(self._unit)
        self._id_map = id_map

    def of(self, index: np.ndarray, k: int) -> pl.DataFrame:
        """The K vectors with the largest cosine to each of some, itself left out.

        Args:
            index: (n,), integer: which of the vectors.
            k: K, at least 1.

        Returns:
            Of ``item_id``: item_id, similar_item_id, similarity (Float32, the cosine), rank (Int32, from 1)
            and, if known, the title of the similar one.

        Raises:
            FastTowerError: k below 1, or vectors that are not finite.
        """
        k = min(whole_number("k", k), len(self._unit))
        rows = torch.arange(len(index) + 1, device=self._unit.device)
        queries = torch.from_numpy(index.astype(np.int64)).to(rows.device)
        itself = KnownPositives(rows, queries.int(), len(self._unit))
        topk = self._search(self._unit[queries], k=k, seen=itself, seen_users=rows[:-1])
        id_name = self._id_map.id_name
        return ranked_frame(
            self._id_map.ids[index], topk, self._id_map, id_name=f"similar_{id_name}", score_name="similarity"
        )
