"""Files and folders that somebody names: only regular files are opened, and nothing waits for one."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from fasttower.errors import FastTowerError, quoted, reason, shown

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def as_path(path: Any, what: str = "the path") -> Path:  # noqa: ANN401 - what it is, is looked at here
    """A path as somebody gave it, ``~`` expanded.

    Args:
        path: text or a path.
        what: what it is the path of, for messages.

    Raises:
        FastTowerError: it is no path, or has characters that libraries cannot open files by.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(text := os.fspath(path), str):
        raise FastTowerError(f"{what} is {quoted(path)}; expected that of a file or folder as text.")
    if "\0" in text:
        raise FastTowerError(f"{what} {shown(text)} has a NUL character in it; give another.")
    try:
        text.encode()
        return Path(text).expanduser()
    except (RuntimeError, UnicodeEncodeError) as error:
        raise FastTowerError(
            f"{what} {shown(text)} is none that can be read: {reason(error)}; give another."
        ) from error


def check_regular(path: Path, name: str | None = None, *, most_bytes: int | None = None) -> None:
    """Check that a path is that of a regular file, before a library opens it.

    Args:
        path: a file, or a link to one.
        name: the file, for messages; the path if not given.
        most_bytes: the size up to which it is read.

    Raises:
        FastTowerError: it is a folder, a pipe, a device or a socket, or too large.
        OSError: it is not there, or cannot be looked at.
    """
    _check(path.stat(), name or str(path), most_bytes)


def _check(found: os.stat_result, name: str, most_bytes: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise FastTowerError(f"{shown(name)} is {kind}; expected a regular file.")
    if most_bytes is not None and found.st_size > most_bytes:
        raise FastTowerError(
            f"{shown(name)} has {found.st_size:,} bytes; expected at most {most_bytes:,} of such a file."
        )


def open_regular(path: Path, name: str | None = None, *, most_bytes: int | None = None) -> BufferedReader:
    """Open a regular file to read its bytes; see `check_regular`, whose promise holds for what was opened."""
    # Without O_NONBLOCK to open a pipe is to wait for its writer.
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check(os.fstat(file), name or str(path), most_bytes)
        return os.fdopen(file, "rb")
    except BaseException:
        os.close(file)
        raise


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for this block, in $TMPDIR where that is set.

    Raises:
        FastTowerError: nothing can be written there.
    """
    asked = os.environ.get("TMPDIR")
    try:
        # Where TMPDIR cannot be written Python would go on to another place without a word.
        made = tempfile.TemporaryDirectory(prefix="fasttower-", dir=asked or None)
    except OSError as error:
        where = f"in TMPDIR, {shown(asked)}," if asked else "for temporary files"
        raise FastTowerError(
            f"no folder can be made {where} ({reason(error)}); set TMPDIR to a folder that can be written."
        ) from error
    with made as folder:
        yield Path(folder)
