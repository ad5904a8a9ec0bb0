"""What ties a run's files together: a list of their sizes and SHA-256, written after all of them.

It holds names within the directory only, so that a run may be moved and copied. It tells a damaged file, a
file of another run and a change by hand; it is no signature, and says nothing of who wrote the run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import TypedDict

from fasttower.errors import FastTowerError, shown
from fasttower.files import open_regular
from fasttower.json_files import parse_object
from fasttower.typed import check_typed

MANIFEST = "manifest.json"

_MOST_BYTES = 1 << 20
_ANYWAY = "--trust-files (trust_files=True) loads it all the same"


class FileEntry(TypedDict):
    """A file as it was written."""

    bytes: int
    sha256: str


class Manifest(TypedDict):
    """The contents of ``manifest.json``."""

    format: int
    """Of the run."""
    run: str
    """What identifies the run: the SHA-256 of its files' names and digests."""
    files: dict[str, FileEntry]


def write_manifest(folder: Path, names: Iterable[str], number: int) -> None:
    """Write the manifest of a run's files, which are complete.

    Args:
        folder: holds them.
        names: theirs.
        number: the run's format.
    """
    manifest = _manifest({name: _entry(folder / name) for name in names}, number)
    (folder / MANIFEST).write_bytes(_text(manifest))


def check_manifest(path: Path, names: Iterable[str], newest: int) -> None:
    """Check that the files of a run directory are those that the run was written with.

    Args:
        path: the directory.
        names: of the files that a run has.
        newest: the latest format that can be read.

    Raises:
        FastTowerError: one is missing or another, the manifest was changed, or a newer version wrote it.
        OSError: the manifest or a file is not there, or cannot be read.
    """
    with open_regular(path / MANIFEST, most_bytes=_MOST_BYTES) as file:
        data = file.read()
    try:
        values = parse_object(data)
        number = values.get("format")
        if isinstance(number, int) and number > newest:
            raise newer_format(path, number, newest)
        check_typed(values, Manifest, "it")
    except ValueError as error:
        raise FastTowerError(f"{shown(path)}: {MANIFEST} is damaged: {error}; {_ANYWAY}.") from error
    listed: dict[str, FileEntry] = values["files"]
    for name in names:
        if name not in listed:
            raise FastTowerError(f"{shown(path)}: {MANIFEST} does not list {name}; {_ANYWAY}.")
        if why := _difference(path / name, listed[name]):
            raise FastTowerError(
                f"{shown(path)}: {name} is not the file that the run was written with ({why}); put that back,"
                f" or {_ANYWAY}."
            )
    if data != _text(_manifest({name: listed[name] for name in names}, values["format"])):
        raise FastTowerError(f"{shown(path)}: {MANIFEST} was changed after the run was written; {_ANYWAY}.")


def newer_format(path: Path, number: int, newest: int) -> FastTowerError:
    """The error of a run that a newer version wrote."""
    return FastTowerError(
        f"{shown(path)} was written in format {shown(number, 40)} by a newer fasttower; this one reads up to"
        f" {newest}; update fasttower."
    )


def without_manifest(path: Path, number: object) -> FastTowerError:
    """The error of a run directory that has no manifest.

    Args:
        path: the directory.
        number: the format of its ``config.json``; None where that does not say.
    """
    why = "the run was not written to its end, or by hand"
    if isinstance(number, int):
        why = f"the run is of format {shown(number, 40)}, which has none" if number < 4 else why
    return FastTowerError(f"{shown(path)} has no {MANIFEST}: {why}; {_ANYWAY}, and checks what it holds.")


def _difference(path: Path, entry: FileEntry) -> str | None:
    """In what a file is not the one that was written, or None."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry["bytes"]:
            return f"it has {size:,} bytes, not {entry['bytes']:,}"
        return None if _sha256(file) == entry["sha256"] else "its SHA-256 is another"


def _entry(path: Path) -> FileEntry:
    with open_regular(path) as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": _sha256(file)}


def _sha256(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(files: dict[str, FileEntry], number: int) -> Manifest:
    lines = "".join(f"{name} {entry['sha256']}\n" for name, entry in sorted(files.items()))
    run = hashlib.sha256(lines.encode()).hexdigest()
    return {"format": number, "run": run, "files": files}


def _text(manifest: Manifest) -> bytes:
    return (json.dumps(manifest, indent=2) + "\n").encode()
