"""The source of a run and the files beside it, read and given common codes for their ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from fasttower.config import DataConfig
from fasttower.data import catalog
from fasttower.data.columns import columns_asked_for
from fasttower.data.ids import encode
from fasttower.data.readers import Interactions, read_interactions
from fasttower.data.titles import read_titles
from fasttower.errors import FastTowerError


@dataclass(frozen=True)
class Loaded:
    """Rows with UInt32 codes as user_id and item_id, which are positions in the sorted ids.

    Attributes:
        source: the rows to train on and, without files for it, to validate and test on.
        valid: the validation file's rows, or None.
        test: the test file's rows, or None.
        user_ids: the distinct ids of all of these, sorted.
        item_ids: likewise.
        timestamp_unit: the source's.
        titles: item_id and title, where the source is MovieLens and has them; else None.
    """

    source: pl.DataFrame
    valid: pl.DataFrame | None
    test: pl.DataFrame | None
    user_ids: pl.Series
    item_ids: pl.Series
    timestamp_unit: str | None
    titles: pl.DataFrame | None


def load(
    source: Any,  # noqa: ANN401 - frames of libraries that may not be there
    config: DataConfig,
    seed: int,
    on_download: catalog.Progress | None = None,
) -> Loaded:
    """Read the source and the validation and test files that the configuration names.

    Raises:
        FastTowerError: one cannot be read, or lacks a column that the configuration needs.
    """
    if isinstance(source, str) and source in catalog.MOVIELENS:
        source = catalog.find_or_download(source, config.data_root, on_download)
    read = [_read(source, config, seed)]
    asked = columns_asked_for(config)
    read += [read_interactions(file, asked) for file in (config.valid_data, config.test_data) if file]
    _check_columns(read, config)
    unit = read[0].timestamp_unit
    frames = [interactions.frame for interactions in read]
    distinct = {}
    for column in ("user_id", "item_id"):
        codes, distinct[column] = encode(pl.concat(_of_one_type(read, column)))
        start = 0
        for place, frame in enumerate(frames):
            frames[place] = frame.with_columns(codes.slice(start, len(frame)).alias(column))
            start += len(frame)
    return Loaded(
        source=frames[0],
        valid=frames[1] if config.valid_data else None,
        test=frames[-1] if config.test_data else None,
        user_ids=distinct["user_id"],
        item_ids=distinct["item_id"],
        timestamp_unit=unit,
        titles=None if _is_frame_or_synthetic(source) else read_titles(Path(source).expanduser()),
    )


def _is_frame_or_synthetic(source: Any) -> bool:  # noqa: ANN401
    return not isinstance(source, str | Path) or source in catalog.SYNTHETIC


def _read(source: Any, config: DataConfig, seed: int) -> Interactions:  # noqa: ANN401
    if isinstance(source, str) and source in catalog.SYNTHETIC:
        return _generate(source, seed)
    return read_interactions(source, columns_asked_for(config))


def _generate(name: str, seed: int) -> Interactions:
    from fasttower.data import synthetic  # noqa: PLC0415 - it is needed for these names alone

    data = synthetic.generate(name, seed)
    columns = ("user_id", "item_id", "rating", "timestamp")
    return Interactions(pl.DataFrame({column: getattr(data, column) for column in columns}), "s", name)


def _check_columns(read: list[Interactions], config: DataConfig) -> None:
    """Raise if a filter or a split lacks its column."""
    source = read[0]
    cuts = (config.test_data is None and config.test_fraction > 0) or (
        config.valid_data is None and config.valid_fraction > 0
    )
    if cuts and config.split != "random" and "timestamp" not in source.frame.columns:
        raise FastTowerError(
            f"{source.name}: no column of timestamps for --split {config.split}; name it with"
            " --timestamp-column, or use --split random, or files (--test-data, --valid-data), or cut nothing"
            " (--test-fraction 0, --valid-fraction 0)"
        )
    for interactions in read:
        rated = {"--min-rating": config.min_rating}
        if cuts or interactions is not source:
            rated["--test-min-rating"] = config.test_min_rating
        for flag, minimum in rated.items():
            if minimum is not None and "rating" not in interactions.frame.columns:
                raise FastTowerError(
                    f"{interactions.name}: no column of ratings for {flag}; name it with --rating-column"
                )


def _of_one_type(read: list[Interactions], column: str) -> list[pl.Series]:
    """The ids of all files in the type of the source's: integers, or text."""
    source, aligned = read[0], []
    dtype = source.frame[column].dtype
    for interactions in read:
        ids = interactions.frame[column]
        if dtype.is_integer() and not ids.dtype.is_integer():
            raise FastTowerError(
                f"{interactions.name}: {column} holds text where {source.name} holds integers;"
                " write both the same way"
            )
        if ids.dtype != dtype:
            # An integer of a text file is spelled as it was; of two widths of integers the wider holds both.
            ids = ids.cast(pl.String).cast(dtype) if not dtype.is_integer() else ids
        aligned.append(ids)
    if dtype.is_integer() and len({ids.dtype for ids in aligned}) > 1:
        try:
            aligned = [ids.cast(pl.Int64) for ids in aligned]
        except pl.exceptions.PolarsError:
            raise FastTowerError(
                f"{source.name}: {column} is {dtype} and another file's is not, with ids past 63 bits;"
                " write all files with one type"
            ) from None
    return aligned
