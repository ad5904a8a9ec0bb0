"""A finished run: a trained model with its ids, and what it can be asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fasttower.config import ResolvedConfig
from fasttower.data.later_rows import positives, read_later_rows
from fasttower.device import choose_device, memory_of
from fasttower.errors import FastTowerError
from fasttower.evaluation.later_test import Evaluation, evaluate_run
from fasttower.export import Format, export_run
from fasttower.model import TwoTower
from fasttower.new_directory import reserved
from fasttower.retrieval import find_ids, nearest, recommend, with_index
from fasttower.retrieval.ids import Unknown, check_choice, check_known
from fasttower.run_directory import read_run, run_path, write_run
from fasttower.training.fold_in import fold_in
from fasttower.training.observer import EpochRecord, Observer
from fasttower.update import update_run
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.sampled_bce import LossSettings
from fasttower_kernels.topk import Scoring


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
        recommendations: user_id, item_id, rating (the score), rank (from 1) for every user of the run.
        metrics: the contents of ``metrics.json``.
        known_positives: the unique pairs that the model was fitted to; what "seen" means.
    """

    model: TwoTower
    users: pl.DataFrame
    items: pl.DataFrame
    config: ResolvedConfig
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
        scoring: Scoring = "float32",
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
            scoring: precision of the matmul; "tf32" (CUDA alone) and "bfloat16" give the results of "float32"
                up to its rounding, for their best are scored again in float32 and proved to be the best.
            memory_budget_bytes: bound on what scoring allocates beside tables and result; by default a part
                of what is free.

        Returns:
            user_id, item_id, rating (Float32, the score), rank (Int32, from 1) and, if known, title; users
            in the order given, best first.

        Raises:
            FastTowerError: unknown users, ids of another type than the run's, nothing allowed, or a scoring
                that the run's device does not have.
        """
        return pl.concat(
            self.recommend_in_blocks(
                users,
                k,
                filter_seen=filter_seen,
                deny=deny,
                allow=allow,
                unknown=unknown,
                scoring=scoring,
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
        scoring: Scoring = "float32",
        memory_budget_bytes: int | None = None,
    ) -> Iterator[pl.DataFrame]:
        """`recommend` in frames of some users each, for results that do not fit into memory."""
        check_choice(unknown)
        wanted = self.users if users is None else find_ids(users, self.users, unknown)
        index = self._index(wanted["user_index"])
        with self._memory():
            vectors = self.model.infer_users() if users is None else self.model.infer_users(index)
        return self._watched(
            recommend(
                vectors,
                wanted["user_id"],
                self.model,
                self.items,
                k=k,
                seen=self.known_positives if filter_seen else None,
                seen_users=index,
                candidates=self._candidates(deny, allow),
                scoring=scoring,
                memory_budget_bytes=memory_budget_bytes,
            )
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
        scoring: Scoring = "float32",
        memory_budget_bytes: int | None = None,
    ) -> pl.DataFrame:
        """Recommend to users who were not there at training, from what they touched.

        Their vectors are those that the training loss is least for with the items as they are (see
        `fasttower.training.fold_in`); nothing of the run changes. A user the run knows is taken by the given
        interactions alone.

        Args:
            interactions: a path, or a Polars, pandas or Arrow frame with columns of user and item ids; rows
                rated below the run's `min_rating` say nothing of what the user likes.
            k: items wanted a user.
            filter_seen: leave out what is in the interactions, whatever its rating.
            deny: as in `recommend`.
            allow: as in `recommend`.
            unknown: what to do about items that the run does not know: "raise", or "skip" their rows. A user
                who is left with none gets what suits everybody, the items of the largest biases; and nothing
                where the model has no bias.
            scoring: as in `recommend`.
            memory_budget_bytes: as in `recommend`.

        Returns:
            As `recommend`; users in the order of their first rows.

        Raises:
            FastTowerError: interactions that cannot be read, unknown items, or nothing allowed.
        """
        return pl.concat(
            self.recommend_new_in_blocks(
                interactions,
                k,
                filter_seen=filter_seen,
                deny=deny,
                allow=allow,
                unknown=unknown,
                scoring=scoring,
                memory_budget_bytes=memory_budget_bytes,
            )
        )

    def recommend_new_in_blocks(
        self,
        interactions: Any,  # noqa: ANN401
        k: int = 10,
        *,
        filter_seen: bool = True,
        deny: Any = None,  # noqa: ANN401
        allow: Any = None,  # noqa: ANN401
        unknown: Unknown = "raise",
        scoring: Scoring = "float32",
        memory_budget_bytes: int | None = None,
    ) -> Iterator[pl.DataFrame]:
        """`recommend_new` in frames of some users each, for results that do not fit into memory."""
        maps, rated = (self.users, self.items), self.config.min_rating is not None
        rows = read_later_rows(interactions, self.config, rated=rated, like=maps)
        user_ids = rows["user_id"].unique(maintain_order=True)
        rows = _known(rows, self.items, unknown)
        numbered = user_ids.to_frame().with_row_index("user_index")
        rows = rows.join(numbered, on="user_id", how="left", maintain_order="left")
        touched, seen = (
            KnownPositives.from_pairs(
                self._index(some["user_index"]),
                self._index(some["item_index"]),
                len(user_ids),
                len(self.items),
            )
            for some in (positives(rows, self.config.min_rating), rows)
        )
        with self._memory():
            vectors = fold_in(
                touched,
                self.model.infer_items(),
                self.model.item_bias,
                LossSettings(self.config.num_negatives, self.metrics["l2"], self.config.loss_scale),
                exclude_known_positives=self.config.exclude_known_positives,
            )
        users = torch.arange(len(user_ids), device=vectors.device)
        if self.model.item_bias is None:  # then nothing is known of who has touched nothing
            users = users[touched.degrees > 0]
        return self._watched(
            recommend(
                vectors[users],
                user_ids.gather(users.cpu().numpy()),
                self.model,
                self.items,
                k=k,
                seen=seen if filter_seen else None,
                seen_users=users,
                candidates=self._candidates(deny, allow),
                scoring=scoring,
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
        rows = read_later_rows(pairs, self.config, like=(self.users, self.items))
        for id_map in (self.users, self.items):
            rows = _known(rows, id_map, unknown)
        with self._memory():
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
        with self._memory():
            return nearest(self.model.infer_items(), wanted, self.items, k=k)

    def similar_users(self, users: Any, k: int = 10, *, unknown: Unknown = "raise") -> pl.DataFrame:  # noqa: ANN401
        """The K users whose vectors have the largest cosine to each user's; see `similar_items`."""
        wanted = find_ids(users, self.users, unknown)
        with self._memory():
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
        with self._memory():
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
            interactions: a path, or a Polars, pandas or Arrow frame with columns of user and item ids; rows
                rated below the run's `min_rating` are left out.
            epochs: passes over old pairs and new rows together.
            observer: progress and the stop signal.

        Returns:
            A new run, with the device and backend that were used now; where a backend that the run asked for
            cannot run here, with backend auto. It has no metrics of a test part: what is new may be what the
            old one was tested on.

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
            format: "faiss" (``items.faiss``, a flat index), "hnswlib" (``items.hnsw``, a graph; its recall
                at a search's ef is in ``about.json``), "numpy" (``item_vectors.npy``), each with
                ``user_vectors.npy``; or "parquet" (vectors beside the ids).

        Returns:
            The files written.

        Raises:
            FastTowerError: the folder is not empty or cannot be written, or the library is not installed.
        """
        return export_run(self, to, format)

    def _memory(self) -> AbstractContextManager[None]:
        """Where the device's memory runs out inside the block, the error says what to do."""
        device = self.known_positives.items.device
        return memory_of(device, "a smaller memory budget or fewer users and items at a time")

    def _watched(self, frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """The frames, made with an eye on the device's memory."""
        with self._memory():
            yield from frames

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
        path = run_path(path)
        with reserved(path):
            write_run(self, path)


def _known(rows: pl.DataFrame, id_map: pl.DataFrame, unknown: Unknown) -> pl.DataFrame:
    """The rows whose ids a map has, with its index."""
    rows = with_index(rows, id_map)
    check_known(rows, id_map, unknown)
    return rows.drop_nulls(id_map.columns[1])


def _vectors(ids: pl.Series, vectors: Tensor) -> pl.DataFrame:
    values = vectors.detach().cpu().contiguous().numpy()
    return pl.DataFrame([ids, pl.Series("vector", values, dtype=pl.Array(pl.Float32, values.shape[1]))])


def load_run(path: str | Path, device: str = "cpu") -> Run:
    """Read a run directory.

    Args:
        path: the directory.
        device: where the model is to be, wherever it was trained: "auto", "cpu", "cuda" or "mps".

    Raises:
        FastTowerError: a file is missing or is not what it should be, or there is no such device.
    """
    place, _ = choose_device(device, strict=True)
    fields = read_run(run_path(path))
    fields["model"] = fields["model"].to(place)
    fields["known_positives"] = fields["known_positives"].to(place)
    return Run(**fields)
