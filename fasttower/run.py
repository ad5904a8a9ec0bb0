"""A run: a trained model, its ids, configuration, history, recommendations and metrics; and its directory."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasttower.config import Config
from fasttower.data.later_rows import read_later_rows, with_index
from fasttower.device import choose_device
from fasttower.errors import FastTowerError
from fasttower.evaluation.later_test import Evaluation, evaluate_run
from fasttower.export import Format, export_run
from fasttower.model import TwoTower
from fasttower.retrieval import find_ids, nearest, recommend
from fasttower.retrieval.ids import Unknown
from fasttower.training.fold_in import fold_in
from fasttower.training.trainer import EpochRecord, Observer
from fasttower.update import update_run
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.sampled_bce import LossSettings


@dataclass(frozen=True, repr=False)
class Run:
    """What `fasttower.fit` returns and `fasttower.load_run` reads back.

    Attributes:
        model: the trained model.
        users: user_id (as it came), user_index (Int32); sorted by id.
        items: item_id, item_index; likewise.
        config: as asked for, with what was left open filled in.
        device: where the training ran.
        backend: the implementation of the training step that ran.
        history: the record of every epoch.
        recommendations: user_id, item_id, rating (the score), rank (from 1) for every user.
        metrics: the contents of ``metrics.json``.
        known_positives: the unique pairs that the model was fitted to; what "seen" means.
    """

    model: TwoTower
    users: pl.DataFrame
    items: pl.DataFrame
    config: Config
    device: str
    backend: str
    history: list[EpochRecord]
    recommendations: pl.DataFrame
    metrics: dict[str, Any]
    known_positives: KnownPositives

    def __repr__(self) -> str:
        measured = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.get("test", {}).items())
        return (
            f"<Run on {self.config.data}: {len(self.users):,} users, {len(self.items):,} items, dimension "
            f"{self.config.embedding_dim}{measured and '; ' + measured}>"
        )

    @property
    def interrupted(self) -> bool:
        """Whether a stop signal ended the training early."""
        return bool(self.metrics["interrupted"])

    def recommend(
        self,
        users: Any = None,  # noqa: ANN401 - whatever holds ids
        k: int = 10,
        *,
        filter_seen: bool = True,
        deny: Any = None,  # noqa: ANN401
        allow: Any = None,  # noqa: ANN401
        unknown: Unknown = "raise",
        memory_budget_bytes: int | None = None,
    ) -> pl.DataFrame:
        """The K items with the highest scores for each user.

        Args:
            users: ids, or one id; None for all users of the run.
            k: items wanted a user; a user for whom fewer are left gets those.
            filter_seen: leave out what the user had touched in the training data.
            deny: ids of items that nobody is to get; ids that the run does not know change nothing.
            allow: ids of the only items that may be given, likewise.
            unknown: what to do about users whom the run does not know: "raise", or "skip" them.
            memory_budget_bytes: bound on what scoring allocates beside tables and result; by default a part
                of what is free.

        Returns:
            user_id, item_id, rating (Float32, the score), rank (Int32, from 1) and, if known, title; users
            in the order given, best first.

        Raises:
            FastTowerError: unknown users, ids of another type than the run's, or nothing allowed.
        """
        return pl.concat(
            self.recommend_in_blocks(
                users,
                k,
                filter_seen=filter_seen,
                deny=deny,
                allow=allow,
                unknown=unknown,
                memory_budget_bytes=memory_budget_bytes,
            )
        )

    def recommend_in_blocks(
        self,
        users: Any = None,  # noqa: ANN401
        k: int = 10,
        *,
        filter_seen: bool = True,
        deny: Any = None,  # noqa: ANN401
        allow: Any = None,  # noqa: ANN401
        unknown: Unknown = "raise",
        memory_budget_bytes: int | None = None,
    ) -> Iterator[pl.DataFrame]:
        """`recommend` in frames of some users each, for results that do not fit into memory."""
        wanted = self.users if users is None else find_ids(users, self.users, unknown)
        index = self._index(wanted["user_index"])
        return recommend(
            self.model.infer_users() if users is None else self.model.infer_users(index),
            wanted["user_id"],
            self.model,
            self.items,
            k=k,
            seen=self.known_positives if filter_seen else None,
            seen_users=index,
            candidates=self._candidates(deny, allow),
            memory_budget_bytes=memory_budget_bytes,
        )

    def recommend_new(
        self,
        interactions: Any,  # noqa: ANN401 - frames of libraries that may not be there
        k: int = 10,
        *,
        filter_seen: bool = True,
        deny: Any = None,  # noqa: ANN401
        allow: Any = None,  # noqa: ANN401
        unknown: Unknown = "raise",
        memory_budget_bytes: int | None = None,
    ) -> pl.DataFrame:
        """Recommend to users who were not there at training, from what they touched.

        Their vectors are those that the training loss is least for with the items as they are (see
        `fasttower.training.fold_in`); nothing of the run changes. A user the run knows is taken by the given
        interactions alone.

        Args:
            interactions: a path, or a Polars, pandas or Arrow frame with columns of user and item ids; rows
                rated below the run's `min_rating` are none.
            k: items wanted a user.
            filter_seen: leave out what is in the interactions.
            deny: as in `recommend`.
            allow: as in `recommend`.
            unknown: what to do about items that the run does not know: "raise", or "skip" their rows. A user
                who is left with none gets what suits everybody: the items of the largest biases.
            memory_budget_bytes: as in `recommend`.

        Returns:
            As `recommend`; users in the order of their first rows.

        Raises:
            FastTowerError: interactions that cannot be read, unknown items, or nothing allowed.
        """
        rows = read_later_rows(interactions, self.config, self.config.min_rating)
        user_ids = rows["user_id"].unique(maintain_order=True)
        rows = _known(rows, self.items, unknown)
        numbered = user_ids.to_frame().with_row_index("user_index")
        rows = rows.join(numbered, on="user_id", how="left", maintain_order="left")
        touched = KnownPositives.from_pairs(
            self._index(rows["user_index"]), self._index(rows["item_index"]), len(user_ids), len(self.items)
        )
        vectors = fold_in(
            touched,
            self.model.infer_items(),
            self.model.item_bias,
            LossSettings(self.config.num_negatives, self.metrics["l2"], self.config.loss_scale),
            exclude_known_positives=self.config.exclude_known_positives,
        )
        return pl.concat(
            recommend(
                vectors,
                user_ids,
                self.model,
                self.items,
                k=k,
                seen=touched if filter_seen else None,
                seen_users=torch.arange(len(user_ids), device=vectors.device),
                candidates=self._candidates(deny, allow),
                memory_budget_bytes=memory_budget_bytes,
            )
        )

    @torch.no_grad()
    def score(self, pairs: Any, *, unknown: Unknown = "raise") -> pl.DataFrame:  # noqa: ANN401
        """The model's logits of pairs of users and items.

        Args:
            pairs: a path, or a Polars, pandas or Arrow frame with columns of user and item ids.
            unknown: what to do about ids that the run does not know: "raise", or "skip" their rows.

        Returns:
            user_id, item_id and rating (Float32, the logit), in the order given.

        Raises:
            FastTowerError: pairs that cannot be read, or unknown ids.
        """
        rows = read_later_rows(pairs, self.config)
        for id_map in (self.users, self.items):
            rows = _known(rows, id_map, unknown)
        logits = self.model.score(self._index(rows["user_index"]), self._index(rows["item_index"]))
        return rows.select("user_id", "item_id", rating=pl.Series(logits.cpu().numpy()))

    def similar_items(self, items: Any, k: int = 10, *, unknown: Unknown = "raise") -> pl.DataFrame:  # noqa: ANN401
        """The K items whose vectors have the largest cosine to each item's.

        Args:
            items: ids, or one id.
            k: neighbours wanted an item.
            unknown: what to do about items that the run does not know: "raise", or "skip" them.

        Returns:
            item_id, similar_item_id, similarity (Float32, the cosine), rank (Int32, from 1) and, if known,
            the similar item's title.

        Raises:
            FastTowerError: unknown items, or ids of another type than the run's.
        """
        wanted = find_ids(items, self.items, unknown)
        return nearest(self.model.infer_items(), wanted, self.items, k=k)

    def similar_users(self, users: Any, k: int = 10, *, unknown: Unknown = "raise") -> pl.DataFrame:  # noqa: ANN401
        """The K users whose vectors have the largest cosine to each user's; see `similar_items`."""
        wanted = find_ids(users, self.users, unknown)
        return nearest(self.model.infer_users(), wanted, self.users, k=k)

    def evaluate(
        self,
        test: Any,  # noqa: ANN401
        metrics: Sequence[str] | None = None,
        k: int = 10,
        *,
        filter_seen: bool = True,
    ) -> Evaluation:
        """RePlay's metrics of the recommendations against interactions that came later.

        Args:
            test: a path, or a Polars, pandas or Arrow frame with columns of user and item ids; rows rated
                below the run's `min_rating` or `test_min_rating` are none.
            metrics: some of NDCG, HitRate, Recall, MAP, MRR, Coverage; None for all.
            k: the cutoff.
            filter_seen: whether what a user had touched in the training data is left out.

        Returns:
            The metrics of the model and of popularity, and how many rows they rest on; rows of users and
            items that the run does not know are dropped and counted.

        Raises:
            FastTowerError: a test part that cannot be read or has no row the run knows, or an unknown metric.
        """
        return evaluate_run(self, test, metrics, k, filter_seen=filter_seen)

    def user_vectors(self) -> pl.DataFrame:
        """user_id and vector (Array(Float32, D)), sorted by id."""
        return _vectors(self.users["user_id"], self.model.infer_users())

    def item_vectors(self) -> pl.DataFrame:
        """item_id, vector (Array(Float32, D)) and, if the model has it, item_bias (Float32), sorted by id.

        The score of a user and an item is the dot product of their vectors plus the bias.
        """
        frame = _vectors(self.items["item_id"], self.model.infer_items())
        bias = self.model.item_bias
        return frame if bias is None else frame.with_columns(item_bias=pl.Series(bias.detach().cpu().numpy()))

    def update(
        self,
        interactions: Any,  # noqa: ANN401
        *,
        epochs: int = 2,
        observer: Observer = Observer(),  # noqa: B008 - it has no state
    ) -> Run:
        """Go on training with more interactions, whose users and items may be new.

        The rows join what the run was fitted to; new users start at the vectors that fit what they touched,
        new items where training would begin. The run itself stays as it is.

        Args:
            interactions: as in `recommend_new`.
            epochs: passes over old pairs and new rows together.
            observer: progress and the stop signal.

        Returns:
            A new run. It has no metrics of a test part: what is new may be what the old one was tested on.

        Raises:
            FastTowerError: interactions that cannot be read, or ids of another type than the run's.
            TrainingError: the loss is not finite.
        """
        return update_run(self, interactions, epochs=epochs, observer=observer)

    def export(self, to: str | Path, format: Format) -> list[Path]:
        """Write the vectors for other software, the item bias as one more dimension.

        Items are (v, bias) and users (u, 1), so that an inner-product index gives the model's own ranking
        (seen items included). ``users.parquet`` and ``items.parquet`` hold the ids: row i is vector i.

        Args:
            to: a folder that is empty or not there.
            format: "faiss" (``items.faiss``, a flat index), "hnswlib" (``items.hnsw``, a graph), "numpy"
                (``item_vectors.npy``), each with ``user_vectors.npy``; or "parquet" (vectors beside the ids).

        Returns:
            The files written.

        Raises:
            FastTowerError: the folder is not empty or cannot be written, or the library is not installed.
        """
        return export_run(self, to, format)

    def _index(self, index: pl.Series) -> Tensor:
        """A column of indices on the run's device: (n,), int64."""
        device = self.known_positives.items.device
        return torch.from_numpy(index.to_numpy().astype(np.int64)).to(device)

    def _candidates(self, deny: Any, allow: Any) -> Tensor | None:  # noqa: ANN401
        """(I,), bool: the items that may be given; None for all."""
        if deny is None and allow is None:
            return None
        allowed = np.full(len(self.items), allow is None)
        if allow is not None:
            allowed[find_ids(allow, self.items, "skip")["item_index"]] = True
        if deny is not None:
            allowed[find_ids(deny, self.items, "skip")["item_index"]] = False
        if not allowed.any():
            raise FastTowerError(
                "deny and allow leave no item that the run knows; allow at least one of its items."
            )
        return torch.from_numpy(allowed).to(self.known_positives.items.device)

    def save(self, path: str | Path) -> None:
        """Write the run to a directory.

        Raises:
            FastTowerError: the directory is not empty, or cannot be written.
        """
        path = Path(path)
        with reserved(path):
            self._write(path)

    def _write(self, run_dir: Path) -> None:
        with _all_or_nothing(run_dir) as path:
            config = self.config.to_json(device=self.device, backend=self.backend)
            _write_json(path / "config.json", config)
            save_file(self.model.saved_tensors(), path / "model.safetensors")
            self.users.write_parquet(path / "users.parquet")
            self.items.write_parquet(path / "items.parquet")
            lines = (json.dumps(dataclasses.asdict(record)) + "\n" for record in self.history)
            (path / "history.jsonl").write_text("".join(lines))
            self.recommendations.write_parquet(path / "recommendations.parquet")
            known = self.known_positives.to("cpu")
            save_file({"indptr": known.indptr, "items": known.items}, path / "known_positives.safetensors")
            _write_json(path / "metrics.json", self.metrics)


def _known(rows: pl.DataFrame, id_map: pl.DataFrame, unknown: Unknown) -> pl.DataFrame:
    """The rows whose ids a map has, with its index."""
    column, index = id_map.columns[:2]
    rows = with_index(rows, id_map)
    find_ids(rows.filter(pl.col(index).is_null())[column], id_map, unknown)  # raises where there are any
    return rows.drop_nulls(index)


def _vectors(ids: pl.Series, vectors: Tensor) -> pl.DataFrame:
    values = vectors.detach().cpu().contiguous().numpy()
    return pl.DataFrame([ids, pl.Series("vector", values, dtype=pl.Array(pl.Float32, values.shape[1]))])


def load_run(path: str | Path, device: str = "cpu") -> Run:
    """Read a run directory.

    Args:
        path: the directory.
        device: where the model is to be, wherever it was trained: "auto", "cpu", "cuda" or "mps".

    Raises:
        FastTowerError: a file is missing or is not what it should be.
    """
    if not isinstance(path, str | os.PathLike):
        raise FastTowerError(f"the run is {path!r}; expected the path of a run directory.")
    path = Path(path)
    place, _ = choose_device(device, strict=True)
    try:
        config, metrics = _read_object(path / "config.json"), _read_object(path / "metrics.json")
        lines = (path / "history.jsonl").read_text().splitlines()
        users, items = (pl.read_parquet(path / f"{name}.parquet") for name in ("users", "items"))
        return Run(
            model=TwoTower.from_saved(load_file(path / "model.safetensors")).to(place),
            users=users,
            items=items,
            config=Config.from_json(config),
            device=config["device"],
            backend=config["backend"],
            history=[EpochRecord(**json.loads(line)) for line in lines],
            recommendations=pl.read_parquet(path / "recommendations.parquet"),
            metrics=metrics,
            known_positives=_read_known(path / "known_positives.safetensors", users, items).to(place),
        )
    except FileNotFoundError as error:
        raise FastTowerError(
            f"{path} is not a run directory: {error.filename or error} is missing."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, pl.exceptions.PolarsError) as error:
        raise FastTowerError(f"{path} holds a damaged run: {error}.") from error


def _read_known(path: Path, users: pl.DataFrame, items: pl.DataFrame) -> KnownPositives:
    tensors = load_file(path)
    known = KnownPositives(tensors["indptr"], tensors["items"], items.height)
    if known.num_users != users.height or int(known.indptr[-1]) != len(known.items):
        raise ValueError(f"{path.name} holds {known.num_users} users, users.parquet {users.height}")
    return known


@contextlib.contextmanager
def reserved(path: Path) -> Iterator[None]:
    """Make a run's directory before there is a run, and take it away again if the block fails.

    Raises:
        FastTowerError: there is a file, a directory that is not empty, or none can be made or written in.
    """
    try:
        if path.is_dir() and any(path.iterdir()):
            raise FastTowerError(f"the run directory {path} is not empty; give another --run-dir.")
        made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise FastTowerError(
            f"the run directory {path} cannot be written: {error}; give another --run-dir."
        ) from error
    try:
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def _all_or_nothing(run_dir: Path) -> Iterator[Path]:
    """A folder to write a run's files to; they come into the run's directory together, or not at all.

    The folder is inside the directory: what is beside it may be another disk, or not ours to write to.

    Raises:
        FastTowerError: a file cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=run_dir, prefix=".unfinished-") as folder:
            yield Path(folder)
            for file in Path(folder).iterdir():
                file.rename(run_dir / file.name)
    except (OSError, SafetensorError, pl.exceptions.PolarsError) as error:
        raise FastTowerError(f"the run cannot be written to {run_dir}: {error}.") from error


def versions() -> dict[str, str]:
    """The versions that a run's figures depend on."""
    names = ("fasttower", "torch", "numpy", "polars", "numba", "triton", "replay-rec")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _read_object(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} holds a {type(values).__name__}, not an object")  # noqa: TRY004
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
