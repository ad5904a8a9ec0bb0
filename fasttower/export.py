"""A run's vectors for other software: an index of the items, and the users to ask it with.

The item bias becomes one more dimension: items are (v, bias), users (u, 1), so that their inner product is
the model's score and an inner-product index gives the model's ranking.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import polars as pl

from fasttower.errors import FastTowerError

if TYPE_CHECKING:
    from fasttower.run import Run

Format = Literal["faiss", "hnswlib", "numpy", "parquet"]

# hnswlib's graph: links a node, and candidates while it is built. Inner products are no metric, for which a
# graph wants more of both.
_HNSW_LINKS, _HNSW_CANDIDATES = 48, 400


def export_run(run: Run, folder: str | Path, kind: Format) -> list[Path]:
    """See `Run.export`."""
    if kind not in get_args(Format):
        raise FastTowerError(f"the format is {kind!r}; expected one of {', '.join(get_args(Format))}.")
    library = _library(kind)
    folder = Path(folder)
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise FastTowerError(f"the folder {folder} is not empty; give another.")
        folder.mkdir(parents=True, exist_ok=True)
        users, items = _vectors_with_bias(run)
        files = _write_parquet(run, folder, users, items) if kind == "parquet" else []
        if kind != "parquet":
            files += _write_ids(run, folder)
            files.append(_save(folder / "user_vectors.npy", users))
        if kind == "numpy":
            files.append(_save(folder / "item_vectors.npy", items))
        elif library is not None:
            write = {"faiss": _write_faiss, "hnswlib": _write_hnswlib}[kind]
            files.append(write(library, folder, items))
        about = {
            "format": kind,
            "space": "inner product",
            "dimensions": items.shape[1],
            "users": len(users),
            "items": len(items),
        }
        (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    except (OSError, pl.exceptions.PolarsError) as error:
        raise FastTowerError(f"the export cannot be written to {folder}: {error}.") from error
    return [*files, folder / "about.json"]


def _library(kind: Format) -> ModuleType | None:
    """The library that writes an index, where the format needs one."""
    if kind not in ("faiss", "hnswlib"):
        return None
    try:
        return importlib.import_module(kind)
    except ImportError:
        raise FastTowerError(
            f"the format {kind} needs the library {kind}, which is not installed; pip install"
            " 'fasttower[export]' from the checkout, or choose numpy or parquet."
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


def _write_parquet(run: Run, folder: Path, users: np.ndarray, items: np.ndarray) -> list[Path]:
    paths = [folder / "users.parquet", folder / "items.parquet"]
    for path, id_map, vectors in zip(paths, (run.users, run.items), (users, items), strict=True):
        column = pl.Series("vector", vectors, dtype=pl.Array(pl.Float32, vectors.shape[1]))
        id_map.drop(id_map.columns[1]).with_columns(column).write_parquet(path)
    return paths


def _write_ids(run: Run, folder: Path) -> list[Path]:
    """The ids by row: row i of a table or entry i of an index is index i."""
    paths = [folder / "users.parquet", folder / "items.parquet"]
    for path, id_map in zip(paths, (run.users, run.items), strict=True):
        id_map.write_parquet(path)
    return paths


def _save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array, allow_pickle=False)
    return path


def _write_faiss(faiss: ModuleType, folder: Path, items: np.ndarray) -> Path:
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items)
    faiss.write_index(index, str(folder / "items.faiss"))
    return folder / "items.faiss"


def _write_hnswlib(hnswlib: ModuleType, folder: Path, items: np.ndarray) -> Path:
    index = hnswlib.Index(space="ip", dim=items.shape[1])
    index.init_index(max_elements=len(items), M=_HNSW_LINKS, ef_construction=_HNSW_CANDIDATES, random_seed=0)
    index.add_items(items, np.arange(len(items)), num_threads=1)  # in one order, so that it repeats
    index.save_index(str(folder / "items.hnsw"))
    return folder / "items.hnsw"
