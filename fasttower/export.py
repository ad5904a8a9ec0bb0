"""A run's vectors for other software: an index of the items, and the users to ask it with.

The item bias becomes one more dimension: items are (v, bias), users (u, 1), so that their inner product is
the model's score and an inner-product index gives the model's ranking.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import polars as pl

from fasttower.errors import FastTowerError
from fasttower.run_directory import all_or_nothing, reserved, run_path, write_json

if TYPE_CHECKING:
    from fasttower.run import Run

Format = Literal["faiss", "hnswlib", "numpy", "parquet"]

# hnswlib's graph: links a node, and candidates while it is built. Inner products are no metric, for which a
# graph wants more of both.
_HNSW_LINKS, _HNSW_CANDIDATES = 48, 400


def export_run(run: Run, to: str | Path, kind: Format) -> list[Path]:
    """See `Run.export`."""
    if kind not in get_args(Format):
        raise FastTowerError(f"the format is {kind!r}; expected one of {', '.join(get_args(Format))}.")
    library = _library(kind)
    to = run_path(to)
    with reserved(to), all_or_nothing(to) as folder:
        users, items = _vectors_with_bias(run)
        if kind == "parquet":
            _write_parquet(run, folder, users, items)
        else:
            run.users.write_parquet(folder / "users.parquet")
            run.items.write_parquet(folder / "items.parquet")
            np.save(folder / "user_vectors.npy", users, allow_pickle=False)
        if kind == "numpy":
            np.save(folder / "item_vectors.npy", items, allow_pickle=False)
        elif library is not None:
            write = {"faiss": _write_faiss, "hnswlib": _write_hnswlib}[kind]
            write(library, folder, items)
        about = {
            "format": kind,
            "space": "inner product",
            "dimensions": items.shape[1],
            "users": len(users),
            "items": len(items),
        }
        write_json(folder / "about.json", about)
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


def _vectors_with_bias(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """(U, D + 1) and (I, D + 1), float32; (U, D) and (I, D) of a model without a bias."""
    users, items = (
        vectors.detach().cpu().numpy() for vectors in (run.model.infer_users(), run.model.infer_items())
    )
    if run.model.item_bias is None:
        return users, items
    bias = run.model.item_bias.detach().cpu().numpy()
    ones = np.ones((len(users), 1), dtype=np.float32)
    return np.concatenate([users, ones], axis=1), np.concatenate([items, bias[:, None]], axis=1)


def _write_parquet(run: Run, folder: Path, users: np.ndarray, items: np.ndarray) -> None:
    for name, id_map, vectors in (("users", run.users, users), ("items", run.items, items)):
        column = pl.Series("vector", vectors, dtype=pl.Array(pl.Float32, vectors.shape[1]))
        rows = id_map.drop(id_map.columns[1]).with_columns(column)
        rows.write_parquet(folder / f"{name}.parquet")


def _write_faiss(faiss: ModuleType, folder: Path, items: np.ndarray) -> None:
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items)
    faiss.write_index(index, str(folder / "items.faiss"))


def _write_hnswlib(hnswlib: ModuleType, folder: Path, items: np.ndarray) -> None:
    index = hnswlib.Index(space="ip", dim=items.shape[1])
    index.init_index(max_elements=len(items), M=_HNSW_LINKS, ef_construction=_HNSW_CANDIDATES, random_seed=0)
    index.add_items(items, np.arange(len(items)), num_threads=1)  # in one order, so that it repeats
    index.save_index(str(folder / "items.hnsw"))
