"""A run's vectors for other software: an index of the items, and the users to ask it with.

The item bias becomes one more dimension: items are (v, bias), users (u, 1), so that their inner product is
the model's score and an inner-product index gives the model's ranking.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

import numpy as np
import polars as pl
import torch

from fasttower.errors import FastTowerError, quoted
from fasttower.files import as_path
from fasttower.json_files import write_object
from fasttower.run.new_directory import all_or_nothing, reserved
from fasttower.run.record import Record
from fasttower_kernels.topk import top_k

Format = Literal["faiss", "hnswlib", "numpy", "parquet"]

# hnswlib's graph: links a node, and candidates while it is built. Inner products are no metric, for which a
# graph wants more of both.
_HNSW_LINKS, _HNSW_CANDIDATES = 48, 400
# Of a search in it, for `set_ef`; and the users by whom its recall is measured.
_HNSW_EF, _HNSW_JUDGES = 100, 1000


def export(record: Record, to: str | Path, kind: Format) -> list[Path]:
    """See `Run.export`."""
    if kind not in get_args(Format):
        raise FastTowerError(f"the format is {quoted(kind)}; expected one of {', '.join(get_args(Format))}.")
    library = _library(kind)
    to = as_path(to)
    with reserved(to), all_or_nothing(to) as folder:
        users, items = _vectors_with_bias(record)
        about = {
            "format": kind,
            "space": "inner product",
            "dimensions": items.shape[1],
            "users": len(users),
            "items": len(items),
        }
        if kind == "parquet":
            _write_parquet(record, folder, users, items)
        else:
            record.users.write_parquet(folder / "users.parquet")
            record.items.write_parquet(folder / "items.parquet")
            np.save(folder / "user_vectors.npy", users, allow_pickle=False)
        if kind == "numpy":
            np.save(folder / "item_vectors.npy", items, allow_pickle=False)
        elif library is not None and kind == "faiss":
            _write_faiss(library, folder, items)
        elif library is not None:
            about |= _write_hnswlib(library, folder, users, items)
        write_object(folder / "about.json", about)
    return sorted(to.iterdir())


def _library(kind: Format) -> ModuleType | None:
    """The library that writes an index, where the format needs one."""
    if kind not in ("faiss", "hnswlib"):
        return None
    try:
        return importlib.import_module(kind)
    except ImportError:
        raise FastTowerError(
            f"the format {kind} needs the library {kind}, which is not installed; in the checkout,"
            " pip install -e '.[export]', or choose numpy or parquet."
        ) from None


def _vectors_with_bias(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """(U, D + 1) and (I, D + 1), float32; (U, D) and (I, D) of a model without a bias."""
    users, items = (
        vectors.detach().cpu().numpy() for vectors in (record.model.infer_users(), record.model.infer_items())
    )
    if record.model.item_bias is None:
        return users, items
    bias = record.model.item_bias.detach().cpu().numpy()
    ones = np.ones((len(users), 1), dtype=np.float32)
    return np.concatenate([users, ones], axis=1), np.concatenate([items, bias[:, None]], axis=1)


def _write_parquet(record: Record, folder: Path, users: np.ndarray, items: np.ndarray) -> None:
    for name, id_map, vectors in (("users", record.users, users), ("items", record.items, items)):
        column = pl.Series("vector", vectors, dtype=pl.Array(pl.Float32, vectors.shape[1]))
        rows = id_map.drop(id_map.columns[1]).with_columns(column)
        rows.write_parquet(folder / f"{name}.parquet")


def _write_faiss(faiss: ModuleType, folder: Path, items: np.ndarray) -> None:
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items)
    faiss.write_index(index, str(folder / "items.faiss"))


def _write_hnswlib(
    hnswlib: ModuleType, folder: Path, users: np.ndarray, items: np.ndarray
) -> dict[str, int | float]:
    """Returns how to search the graph, and the share of the true top-10 that this finds."""
    index = hnswlib.Index(space="ip", dim=items.shape[1])
    index.init_index(max_elements=len(items), M=_HNSW_LINKS, ef_construction=_HNSW_CANDIDATES, random_seed=0)
    index.add_items(items, np.arange(len(items)), num_threads=1)  # in one order, so that it repeats
    index.save_index(str(folder / "items.hnsw"))
    k = min(10, len(items))
    judges = users[np.linspace(0, len(users) - 1, min(_HNSW_JUDGES, len(users))).astype(np.int64)]
    true = top_k(torch.from_numpy(judges), torch.from_numpy(items), k=k).items.numpy()
    index.set_ef(_HNSW_EF)
    found, _ = index.knn_query(judges, k, num_threads=1)
    hits = (found[:, :, None] == true[:, None, :]).any(axis=2)
    return {"ef": _HNSW_EF, f"recall@{k}": round(float(hits.mean()), 4)}
