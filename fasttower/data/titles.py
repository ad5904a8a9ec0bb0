"""The titles of MovieLens' films, where they lie beside the ratings."""

from __future__ import annotations

import csv
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from fasttower.data.sources import BAD_ZIP
from fasttower.errors import FastTowerError
from fasttower.files import open_regular


@dataclass(frozen=True)
class _Layout:
    """How a release writes its films, number and title first, and the ratings that they belong to."""

    ratings: str
    separator: str
    encoding: str


_LAYOUTS = {
    "u.item": _Layout("u.data", "|", "iso-8859-1"),
    "movies.dat": _Layout("ratings.dat", "::", "iso-8859-1"),
    "movies.csv": _Layout("ratings.csv", ",", "utf-8-sig"),
}
_HEADER = ["movieId", "title"]
_MOST_BYTES = 1 << 26  # twenty times those of the largest release


def read_titles(source: Path) -> pl.DataFrame | None:
    """The titles of a MovieLens zip, of its unpacked folder, or of the ratings file in it.

    Returns:
        item_id (Int64) and title (String), or None where there are none that can be read: titles are for
        people to look at, and nothing depends on them.
    """
    try:
        found = _from_zip(source) if source.suffix.lower() == ".zip" else _from_folder(source)
        return None if found is None else _parse(*found)
    except (OSError, ValueError, OverflowError, csv.Error, FastTowerError, *BAD_ZIP):
        return None


def _from_zip(archive: Path) -> tuple[bytes, _Layout] | None:
    with open_regular(archive) as file, zipfile.ZipFile(file) as opened:
        for member in opened.infolist():
            layout = _LAYOUTS.get(Path(member.filename).name)
            if layout and not member.filename.startswith("__MACOSX"):
                return (opened.read(member), layout) if member.file_size <= _MOST_BYTES else None
    return None


def _from_folder(source: Path) -> tuple[bytes, _Layout] | None:
    folders = [source, *sorted(source.iterdir())] if source.is_dir() else [source.parent]
    for folder in folders:
        for name, layout in _LAYOUTS.items():
            ratings = folder / layout.ratings
            # A file of another name has other items, whatever lies beside it.
            if (folder / name).is_file() and ratings.is_file() and (source.is_dir() or source == ratings):
                with open_regular(folder / name, most_bytes=_MOST_BYTES) as file:
                    return file.read(), layout
    return None


def _parse(content: bytes, layout: _Layout) -> pl.DataFrame | None:
    text = content.decode(layout.encoding)
    if layout.separator == ",":
        header, *rows = csv.reader(io.StringIO(text))
        if header[:2] != _HEADER:
            return None
    else:
        rows = [line.split(layout.separator) for line in text.splitlines()]
    titles = {int(row[0]): row[1] for row in rows if len(row) > 1}
    if any(abs(item) >= 1 << 63 for item in titles):
        return None
    return pl.DataFrame(
        {"item_id": list(titles), "title": list(titles.values())},
        schema={"item_id": pl.Int64, "title": pl.String},
    )
