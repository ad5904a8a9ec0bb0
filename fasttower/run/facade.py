"""The run that users hold: a record, and what it can be asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from torch import Tensor

from fasttower.device import choose_device
from fasttower.files import as_path
from fasttower.retrieval.ids import Unknown
from fasttower.run.directory import read_run, write_run
from fasttower.run.evaluate import Evaluation, evaluate
from fasttower.run.export import Format, export
from fasttower.run.new_directory import reserved
from fasttower.run.recommend import Request, recommend, recommend_new, score, similar_items, similar_users
from fasttower.run.record import Record
from fasttower.run.update import update
from fasttower.training.observer import Observer
from fasttower_kernels.topk import Scoring


@dataclass(frozen=True, repr=False)
class Run(Record):
    """What `fasttower.fit` returns and `fasttower.load_run` reads back.

    Its attributes are those of `Record`; they must not change after the first question to the run. A changed
    copy is made by ``dataclasses.replace``.
    """

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
            k: items wanted per user; a user for whom fewer are left gets those.
            filter_seen: leave out what the user had touched in the training data.
            deny: ids of items that nobody is to get; ids that the run does not know change nothing.
            allow: ids of the only items that may be given, likewise.
            unknown: what to do about unknown users: "raise", or "skip" them.
            scoring: precision of the matmul; "tf32" (only on CUDA) and "bfloat16" give the results of
                "float32" up to its rounding, for their best are scored again in float32 and proved to be the
                best.
            memory_budget_bytes: bound on what scoring allocates beside tables and result; by default a part
                of what is free.

        Returns:
            user_id, item_id, score (Float32), rank (Int32, from 1) and, if known, title; users in the order
            given, best first.

        Raises:
            FastTowerError: unknown users, ids of another type than the run's, nothing allowed, or a scoring
                that the run's device does not have.
        """
        request = Request(k, filter_seen, deny, allow, unknown, scoring, memory_budget_bytes)
        return pl.concat(recommend(self, users, request))

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
        request = Request(k, filter_seen, deny, allow, unknown, scoring, memory_budget_bytes)
        return recommend(self, users, request)

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
        `fasttower.training.fold_in`); nothing of the run changes. For a known user only the given
        interactions count.

        Args:
            interactions: a path, or a Polars, pandas or Arrow frame with columns of user and item ids; rows
                rated below the run's `min_rating` say nothing of what the user likes.
            k: items wanted per user.
            filter_seen: leave out what is in the interactions, whatever its rating.
            deny: as in `recommend`.
            allow: as in `recommend`.
            unknown: what to do about unknown items: "raise", or "skip" their rows. A user who is left with
                none gets what suits everybody, the items of the largest biases; and nothing where the model
                has no bias.
            scoring: as in `recommend`.
            memory_budget_bytes: as in `recommend`.

        Returns:
            As `recommend`; users in the order of their first rows.

        Raises:
            FastTowerError: interactions that cannot be read, unknown items, or nothing allowed.
        """
        request = Request(k, filter_seen, deny, allow, unknown, scoring, memory_budget_bytes)
        return pl.concat(recommend_new(self, interactions, request))

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
        request = Request(k, filter_seen, deny, allow, unknown, scoring, memory_budget_bytes)
        return recommend_new(self, interactions, request)

    def score(self, pairs: Any, *, unknown: Unknown = "raise") -> pl.DataFrame:  # noqa: ANN401
        """The model's logits of pairs of users and items.

        Args:
            pairs: a path, or a Polars, pandas or Arrow frame with columns of user and item ids.
            unknown: what to do about unknown ids: "raise", or "skip" their rows.

        Returns:
            user_id, item_id and score (Float32, the logit), in the order given.

        Raises:
            FastTowerError: pairs that cannot be read, or unknown ids.
        """
        return score(self, pairs, unknown)

    def similar_items(self, items: Any, k: int = 10, *, unknown: Unknown = "raise") -> pl.DataFrame:  # noqa: ANN401
        """The K items whose vectors have the largest cosine to each item's.

        Args:
            items: ids, or one id.
            k: neighbours wanted per item.
            unknown: what to do about unknown items: "raise", or "skip" them.

        Returns:
            item_id, similar_item_id, similarity (Float32, the cosine), rank (Int32, from 1) and, if known,
            the similar item's title.

        Raises:
            FastTowerError: unknown items, or ids of another type than the run's.
        """
        return similar_items(self, items, k, unknown)

    def similar_users(self, users: Any, k: int = 10, *, unknown: Unknown = "raise") -> pl.DataFrame:  # noqa: ANN401
        """The K users whose vectors have the largest cosine to each user's; see `similar_items`."""
        return similar_users(self, users, k, unknown)

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
            The metrics of the model and of popularity, and how many rows they rest on; rows of unknown users
            and items are dropped and counted.

        Raises:
            FastTowerError: a test part that cannot be read or has no row the run knows, or an unknown metric.
        """
        return evaluate(self, test, metrics, k, filter_seen=filter_seen)

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
        return update(self, interactions, epochs=epochs, observer=observer)

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
        return export(self, to, format)

    def save(self, path: str | Path) -> None:
        """Write the run to a directory.

        Raises:
            FastTowerError: the directory is not empty, or cannot be written.
        """
        path = as_path(path)
        with reserved(path):
            write_run(self, path)


def _vectors(ids: pl.Series, vectors: Tensor) -> pl.DataFrame:
    values = vectors.detach().cpu().contiguous().numpy()
    return pl.DataFrame([ids, pl.Series("vector", values, dtype=pl.Array(pl.Float32, values.shape[1]))])


def load_run(path: str | Path, device: str = "cpu", *, trust_files: bool = False) -> Run:
    """Read a run directory.

    Args:
        path: the directory.
        device: where the model is to be, wherever it was trained: "auto", "cpu", "cuda" or "mps".
        trust_files: load it though its files are not those of its manifest, or it has none, as runs that an
            older version wrote. What the files hold is checked all the same.

    Raises:
        FastTowerError: a file is missing, is not what it should be, or is not the one that the run was
            written with; or there is no such device.
    """
    place, _ = choose_device(device, strict=True)
    fields = read_run(as_path(path), trust_files=trust_files)
    fields["model"] = fields["model"].to(place)
    fields["known_positives"] = fields["known_positives"].to(place)
    return Run(**fields)
