"""A directory being created: reserved for one writer, and filled once all of its files are complete."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import polars as pl
from safetensors import SafetensorError

from fasttower.errors import FastTowerError, reason, shown

# What is in a directory beside its files while they are being written.
_LOCK, _UNFINISHED = ".lock", ".unfinished-"


@contextlib.contextmanager
def reserved(path: Path, *, numbered: bool = False) -> Iterator[Path]:
    """Make a run's directory before there is a run, for this block; remove it again if that fails.

    Args:
        path: a directory that is not there, or empty but for what a killed process left.
        numbered: make a new one in any case, with a number behind its name where that is taken.

    Yields:
        The directory.

    Raises:
        FastTowerError: there is a file, a directory that is not empty or in use, or none can be made or
            written in.
    """
    with contextlib.ExitStack() as stack:
        try:
            if numbered or not path.exists():
                path = _made(path, numbered=numbered)
                stack.enter_context(_removed_on_failure(path))
            _check_empty(path)
            stack.enter_context(_locked(path))
            _check_empty(path)  # of the directory that nobody else may change now
            for leftover in path.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(leftover)
        except OSError as error:
            raise FastTowerError(
                f"the directory {shown(path)} cannot be written: {reason(error)}; give another directory."
            ) from error
        yield path


def _made(path: Path, *, numbered: bool) -> Path:
    """Make a directory, in its parents; ``path-2`` and so on where it is there and numbers are allowed."""
    made, number = path, 1
    while True:
        try:
            made.mkdir(parents=True, exist_ok=not numbered)
        except FileExistsError:
            if not numbered:
                raise
            number += 1
            made = path.with_name(f"{path.name}-{number}")
        else:
            return made


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it holds what is not ours
            path.rmdir()
        raise


def _check_empty(path: Path) -> None:
    if any(file.name != _LOCK and not file.name.startswith(_UNFINISHED) for file in path.iterdir()):
        raise FastTowerError(f"the directory {shown(path)} is not empty; give another directory.")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes out of a directory, by the system's lock of a file in it: that goes with us."""
    with (path / _LOCK).open("ab") as file:
        try:
            _lock(file)
            if not os.path.samestat(os.fstat(file.fileno()), (path / _LOCK).stat()):
                raise FileNotFoundError  # noqa: TRY301 - who had it has just taken it away
        except (BlockingIOError, FileNotFoundError):
            raise FastTowerError(
                f"the directory {shown(path)} is in use, another run is to be written there; give another"
                " directory."
            ) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows keeps an open file; an empty one does no harm
                (path / _LOCK).unlink()


def _lock(file: BinaryIO) -> None:
    """Lock a file, or raise BlockingIOError where another process has."""
    if sys.platform == "win32":
        import msvcrt  # noqa: PLC0415 - only on Windows

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error
    else:
        import fcntl  # noqa: PLC0415 - only elsewhere

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some file systems of clusters have no locks; a run can be written to them all the same.
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise


@contextlib.contextmanager
def all_or_nothing(run_dir: Path, *, last: str = "") -> Iterator[Path]:
    """A folder to write files to; they are moved into the directory when all of them are whole.

    So a write that fails leaves nothing there. A process that is killed leaves this folder, which `reserved`
    takes away; or, killed between two moves, some of the files, which are no run to `read_run`. The folder is
    inside the directory: what is beside it may be another disk, or not ours to write to.

    Args:
        run_dir: the directory.
        last: the name of the file that is moved after all others.

    Raises:
        FastTowerError: a file cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=run_dir, prefix=_UNFINISHED) as folder:
            yield Path(folder)
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == last):
                file.rename(run_dir / file.name)
    except (OSError, SafetensorError, pl.exceptions.PolarsError) as error:
        raise FastTowerError(f"{shown(run_dir)} cannot be written: {reason(error)}.") from error
