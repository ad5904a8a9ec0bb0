"""The nearest of a table's own vectors, by cosine."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fasttower.errors import whole_number
from fasttower.retrieval.recommendations import ranked_frame
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.topk import top_k


@torch.no_grad()
def nearest(vectors: Tensor, queries: pl.DataFrame, id_map: pl.DataFrame, *, k: int) -> pl.DataFrame:
    """The K vectors with the largest cosine to each of some of them, itself left out.

    Args:
        vectors: (R, D), float32; a vector of zeros has cosine 0 to all.
        queries: rows of the map: whose neighbours are wanted.
        id_map: an id, its index and, if known, its title; row i belongs to vector i.
        k: K, at least 1.

    Returns:
        Of ``item_id``: item_id, similar_item_id, similarity (Float32, the cosine), rank (Int32, from 1) and,
        if known, the title of the similar one.
    """
    column, index_column = id_map.columns[:2]
    index = torch.from_numpy(queries[index_column].to_numpy().astype(np.int64)).to(vectors.device)
    unit = normalize(vectors, eps=torch.finfo(torch.float32).tiny)
    rows = torch.arange(len(index), device=vectors.device)
    topk = top_k(
        unit[index],
        unit,
        k=min(whole_number("k", k), len(vectors)),
        seen=KnownPositives.from_pairs(rows, index, len(index), len(vectors)),
        seen_users=rows,
    )
    return ranked_frame(queries[column], topk, id_map, id_name=f"similar_{column}", score_name="similarity")
