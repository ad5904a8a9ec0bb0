"""Where the table of interactions is: a file, a zip, a folder, a glob, or a frame in memory.

Nothing is read here but the first line of a text file: to tell early what is not what its name says.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import glob
import gzip
import lzma
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from fasttower.data.columns import POSITIONAL
from fasttower.errors import FastTowerError, listed, quoted, reason, shown
from fasttower.files import as_path, check_regular, open_regular, temporary_folder

# The ratings file of each MovieLens release.
_MOVIELENS_FILES = ("u.data", "ratings.dat", "ratings.csv")
_SEPARATORS = {".csv": ",", ".tsv": "\t", ".inter": "\t", ".data": "\t", ".dat": "::"}
_HEADERLESS = (".data", ".dat")
_QUOTED = (".csv", ".tsv")
_PARQUET = (".parquet", ".pq")
_PACKED = ".gz"
_KNOWN = ", ".join((*_SEPARATORS, ".parquet", ".zip", "any of them with .gz behind it"))

Types = Mapping[str, pl.DataType | type[pl.DataType]]


@dataclass(frozen=True)
class Table:
    """A source before its columns are known.

    Attributes:
        scan: opens the rows, lazily. A text file's columns are String, but for those given another type,
            which the parser then insists on; other sources have their own types.
        name: for messages.
        files: the files behind it, if any.
        separator: the byte between the columns of text files; 0 for other sources.
        row_word: what a row is called, "line" or "row".
        first_row: the number that the first row is known by.
    """

    scan: Callable[[Types], pl.LazyFrame]
    name: str
    files: tuple[Path, ...] = ()
    separator: int = 0
    row_word: str = "row"
    first_row: int = 1

    @property
    def is_text(self) -> bool:
        """Whether its columns have no types of their own."""
        return self.separator > 0


@contextlib.contextmanager
def open_table(source: Any) -> Iterator[Table]:  # noqa: ANN401 - frames of libraries that may not be there
    """The table of a path or a Polars, pandas or Arrow frame; what is unpacked lives as long as the block.

    Polars' and the system's complaints within the block become one line that names the source.

    Raises:
        FastTowerError: nothing there, or not what its name says.
    """
    if not isinstance(source, (str, Path)):
        with _readable("the frame"), _own_functions(source):
            yield _open_frame(source)
        return
    with (
        _readable(shown(source)),
        _ratings_file(source) as (found, whole_name),
        _unpacked(found) as files,
    ):
        name = shown(whole_name)
        for file in files:
            check_regular(file, name if len(files) == 1 else None)
        suffix = files[0].suffix.lower()
        if suffix in _PARQUET:
            yield Table(lambda _: pl.scan_parquet(files, glob=False), name, tuple(files))
        elif suffix in _SEPARATORS:
            yield _open_text(tuple(files), suffix, name)
        else:
            raise FastTowerError(f"{name}: unknown kind of file {quoted(suffix)}; expected one of {_KNOWN}")


@contextlib.contextmanager
def _ratings_file(source: str | Path) -> Iterator[tuple[list[Path], str]]:
    """The files to read and the name to call them by; what is unpacked lives until the end of the block."""
    if source == "":
        raise FastTowerError(
            "the path of the data is empty; expected a file, a folder, or the name of a data set"
        )
    path, source = as_path(source, "the path of the data"), str(source)
    if path.is_dir():
        files = _find_in_folder(path)
        yield files, str(files[0]) if len(files) == 1 else source
    elif not path.exists():
        files = sorted(map(Path, glob.glob(str(path))))  # noqa: PTH207 - absolute patterns too
        if not files:
            raise FastTowerError(
                f"no such file or folder: {shown(source)}; expected a path or the name of a data set"
            )
        yield files, source
    elif path.suffix.lower() == ".zip":
        with temporary_folder() as folder:
            file, name = _extract_ratings(path, folder)
            yield [file], name
    else:
        yield [path], source


@contextlib.contextmanager
def _unpacked(files: list[Path]) -> Iterator[list[Path]]:
    """The files, those that gzip packed unpacked until the end of the block."""
    if not any(file.suffix.lower() == _PACKED for file in files):
        yield files
        return
    with temporary_folder() as folder:
        plain = []
        for number, file in enumerate(files):
            if file.suffix.lower() == _PACKED:
                # Under its own name, and apart from others of that name.
                (folder / str(number)).mkdir()
                plain.append(folder / str(number) / file.stem)
                try:
                    with (
                        open_regular(file) as zipped,
                        gzip.open(zipped) as packed,
                        plain[-1].open("wb") as opened,
                    ):
                        shutil.copyfileobj(packed, opened, 1 << 20)
                except (gzip.BadGzipFile, zlib.error, EOFError) as error:
                    raise FastTowerError(
                        f"{shown(file)}: not a readable gzip ({reason(error)}); download or pack it again"
                    ) from error
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                        raise
                    raise FastTowerError(
                        f"{shown(file)}: cannot be unpacked into {shown(folder.parent)}"
                        f" ({reason(error)}); set TMPDIR to a folder that has room"
                    ) from error
            else:
                plain.append(file)
        yield plain


def _suffix(name: str) -> str:
    """What kind of table a file's name says it is, packed or not."""
    lower = name.lower()
    return Path(lower.removesuffix(_PACKED)).suffix


def _find_in_folder(folder: Path) -> list[Path]:
    """MovieLens' ratings file here or a folder below, else all parquet files, else the only table."""
    files = sorted(folder.iterdir())
    for where in (folder, *(file for file in files if file.is_dir())):
        for name in _MOVIELENS_FILES:
            if (where / name).is_file():
                return [where / name]
    parquet = [file for file in files if _suffix(file.name) in _PARQUET]
    return parquet or [folder / _only_table([file.name for file in files], str(folder))]


def _extract_ratings(archive: Path, folder: Path) -> tuple[Path, str]:
    """Unpack the one ratings file of a zip into a folder; its path and its name for messages."""
    try:
        with open_regular(archive) as file, zipfile.ZipFile(file) as opened:
            # Below __MACOSX are shadows of the real files.
            members = [member for member in opened.namelist() if not member.startswith("__MACOSX")]
            by_name = {Path(member).name: member for member in reversed(members)}
            known = next((by_name[name] for name in _MOVIELENS_FILES if name in by_name), None)
            member = known or by_name[_only_table(list(by_name), str(archive))]
            size, free = opened.getinfo(member).file_size, shutil.disk_usage(folder).free
            if size > free:
                raise FastTowerError(
                    f"{shown(archive)}: {shown(member)} unpacks to {size:,} bytes, and {free:,} are free in"
                    f" {folder.parent}; set TMPDIR to a folder that has room"
                )
            return Path(opened.extract(member, folder)), f"{archive}/{member}"
    except BAD_ZIP as error:
        raise FastTowerError(
            f"{shown(archive)}: not a readable zip ({reason(error)}); download or pack it again"
        ) from error


BAD_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    UnicodeError,
)
"""What reading a damaged zip raises, or one that is encrypted or packed in an unknown way."""


def _only_table(names: list[str], where: str) -> str:
    tables = [name for name in names if _suffix(name) in (*_SEPARATORS, *_PARQUET)]
    if len(tables) == 1:
        return tables[0]
    found = listed(tables) or "none"
    raise FastTowerError(
        f"{shown(where)}: expected one of {', '.join(_MOVIELENS_FILES)} or a single table ({_KNOWN}), found"
        f" {found}; name the file itself"
    )


def _open_frame(frame: Any) -> Table:  # noqa: ANN401
    if isinstance(frame, pl.LazyFrame):
        rows = frame
    elif isinstance(frame, pl.DataFrame):
        rows = frame.lazy()
    elif type(frame).__module__.split(".")[0] == "pandas":
        try:
            rows = pl.from_pandas(frame).lazy()
        except Exception as error:  # pandas' and Arrow's own families: a column of mixed types
            raise FastTowerError(f"the frame: {reason(error)}; give each column one type") from error
    elif hasattr(frame, "__arrow_c_stream__"):
        rows = pl.DataFrame(frame).lazy()
    else:
        kind = shown(type(frame).__name__)
        raise FastTowerError(f"expected a path or a Polars, pandas or Arrow frame, found {kind}")
    return Table(lambda _: rows, "the frame")


def _open_text(files: tuple[Path, ...], suffix: str, name: str) -> Table:
    separator, header = _SEPARATORS[suffix], suffix not in _HEADERLESS
    fields = _first_line(files[0], name).split(separator)
    if len(fields) < 2:
        raise FastTowerError(
            f"{name}: found no {separator!r} in its first line, {quoted(fields[0], 60)};"
            f" expected the columns of a {suffix} file to be separated by it. Write it so, or read it with"
            " Polars or pandas and give the frame to fasttower.fit"
        )

    names = [field.strip().strip('"') for field in fields]
    if header and len(set(names)) < len(names):
        twice = next(field for field in names if names.count(field) > 1)
        raise FastTowerError(
            f"{name}: two columns are named {quoted(twice)}; rename one of them (or is its header missing?)"
        )

    def scan(types: Types) -> pl.LazyFrame:
        # Polars separates by one byte: between two colons is an empty column, to be stepped over.
        positions = {role: f"column_{1 + len(separator) * place}" for place, role in enumerate(POSITIONAL)}
        rows = pl.scan_csv(
            list(files),
            separator=separator[0],
            has_header=header,
            infer_schema=False,
            schema_overrides={
                column if header else positions[column]: kind for column, kind in types.items()
            },
            quote_char='"' if suffix in _QUOTED else None,
            glob=False,
        )
        if header:
            return rows
        there = rows.collect_schema().names()
        return rows.select(
            pl.col(column).alias(role) for role, column in positions.items() if column in there
        )

    return Table(scan, name, files, ord(separator[0]), "line", 2 if header else 1)


def check_fields(table: Table) -> None:
    """Raise at the first line of a text file that has more fields than the file's first line.

    Polars says that there is one, not which.

    Raises:
        FastTowerError: such a line.
    """
    for path in table.files if table.is_text else ():
        name = table.name if len(table.files) == 1 else shown(path)
        suffix = path.suffix.lower()
        apart = len(_SEPARATORS[suffix])
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            lines = csv.reader(
                file,
                delimiter=chr(table.separator),
                quoting=csv.QUOTE_MINIMAL if suffix in _QUOTED else csv.QUOTE_NONE,
            )
            try:
                expected = len(next(lines, []))
                found = next((len(fields) for fields in lines if len(fields) > expected), None)
            except csv.Error as error:
                raise FastTowerError(f"{name}, line {lines.line_num}: {reason(error)}; correct it") from error
            if found:
                raise FastTowerError(
                    f"{name}, line {lines.line_num}: {-(-found // apart)} fields, where the first line has "
                    f"{-(-expected // apart)}; correct or remove such lines"
                )


def _first_line(path: Path, name: str) -> str:
    with path.open("rb") as file:
        head = file.readline(1 << 16)
    if not head.strip():
        raise FastTowerError(f"{name}: empty, or its first line is; expected interactions")
    if head.startswith(b"\x1f\x8b"):
        raise FastTowerError(
            f"{name}: packed by gzip, though its name says {shown(path.suffix)}; call it"
            f" {shown(path.name + _PACKED)}"
        )
    if head.startswith((b"PK\x03\x04", b"PAR1")) or b"\0" in head:
        raise FastTowerError(
            f"{name}: not text, though its name says {shown(path.suffix)}; give it its right name"
        )
    try:
        return head.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise FastTowerError(f"{name}: not UTF-8 ({error.reason}); convert it first") from error


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Polars' and the system's complaints about a file as one line that names it."""
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise FastTowerError(f"{name}: cannot be read ({reason(error)})") from error


@contextlib.contextmanager
def _own_functions(frame: Any) -> Iterator[None]:  # noqa: ANN401
    """What the functions of a lazy frame raise as an error of the frame."""
    try:
        yield
    except (FastTowerError, pl.exceptions.PolarsError):
        raise
    except Exception as error:
        if not isinstance(frame, pl.LazyFrame):
            raise
        raise FastTowerError(
            f"the frame cannot be read: {type(error).__name__}, {reason(error)}; correct the function that"
            " raised it"
        ) from error
