"""What a hostile or an unlucky user does, as data: what is made, the command, and what its one line says.

A case has ``make(place) -> arguments``: it puts into ``place.folder`` what the command meets. ``says`` is
a pattern that the line on stderr matches; None where the command must succeed.
"""

import gzip
import io
import json
import os
import shutil
import socket
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file, save, save_file

from fasttower.run.directory import FILES as RUN_FILES
from fasttower.run.manifest import MANIFEST


@dataclass
class Place:
    """Where a case happens.

    Attributes:
        folder: empty, and the current directory of the command.
        saved: a run's directory, to be copied from.
    """

    folder: Path
    saved: Path

    def run(self, name="run"):
        """A copy of the run."""
        return Path(shutil.copytree(self.saved, self.folder / name))

    def file(self, name, content=b""):
        """A file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def ratings(self, name="ratings.csv", rows=200):
        """A file that can be trained on."""
        return self.file(name, ratings(rows))


class Case(NamedTuple):
    name: str
    make: object
    says: str | None
    code: int = 2
    quick: bool = False


def ratings(rows=200):
    lines = [f"{i * 7 % 13},{i * 5 % 17},{1 + i % 5},{i}" for i in range(rows)]
    return "\n".join(["user_id,item_id,rating,timestamp", *lines]) + "\n"


FAST = ("--search", "none", "--epochs", "1", "--backend", "torch", "--threads", "1", "--quiet")


def train(place, *arguments):
    return ["train", "--run-dir", place.folder / "out", *FAST, *arguments]


# Flags.

WHOLE = ("seed", "seeds", "num-negatives", "negative-pool", "block-size", "k", "min-user-interactions")
WHOLE += ("min-item-interactions", "embedding-dim", "batch-size", "epochs", "threads")
REAL = ("init-scale", "calibration", "popularity-power", "l2", "item-l2", "bias-l2", "learning-rate")
REAL += ("test-fraction", "valid-fraction", "temperature", "search")
RATINGS = ("min-rating", "test-min-rating")
CHOICES = (
    "split",
    "loss",
    "similarity",
    "negatives",
    "loss-scale",
    "optimiser",
    "table-dtype",
    "backend",
    "device",
)
CHOICES += ("prefer", "preset")


def flag(name, value, *, quick=False):
    title = value if len(value) < 20 else f"{value[:3]} and so on"
    pattern = rf"^fasttower: --{name} is .*; expected "
    return Case(f"--{name}={title}", lambda place: ["train", f"--{name}={value}"], pattern, quick=quick)


def flags():
    for name in WHOLE:
        for value in ("-1", "1.5", "x", "", "nan", "9" * 5000):
            yield flag(
                name, value, quick=(name, value) in {("seed", "-1"), ("k", "9" * 5000), ("epochs", "")}
            )
    for name in REAL:
        for value in ("-1", "nan", "inf", "x", "", "1e999"):
            quick = (name, value) in {("l2", "nan"), ("learning-rate", "1e999"), ("search", "-1")}
            yield flag(name, value, quick=quick)
    for name in RATINGS:
        for value in ("nan", "inf", "x", "1e999"):
            yield flag(name, value)
    for name in CHOICES:
        for value in ("", "z" * 300):
            yield flag(name, value, quick=(name, value) in {("loss", ""), ("device", "z" * 300)})


def in_train(name, arguments, says, *, quick=False):
    return Case(name, lambda place: ["train", *arguments], says, quick=quick)


COMMAND_LINES = [
    in_train(
        "search misspelled",
        ["--search", "fast"],
        r"^fasttower: --search is 'fast'; expected none, quick, thorough or seconds above 0\.$",
        quick=True,
    ),
    in_train(
        "loss misspelled",
        ["--loss", "bse"],
        r"^fasttower: --loss is 'bse'; expected one of bce, gbce, bpr, softmax\.$",
        quick=True,
    ),
    in_train(
        "a temperature of the dot product",
        ["--similarity", "dot", "--temperature", "0.5"],
        r"^fasttower: --temperature is 0.5; expected none with --similarity dot",
        quick=True,
    ),
    in_train(
        "an unknown flag",
        ["--embeding-dim", "4"],
        "no flag --embeding-dim; did you mean --embedding-dim",
        quick=True,
    ),
    in_train(
        "an unknown flag of 100,000 letters",
        ["--" + "x" * 100_000],
        r"no flag --x{20,} \.\.\. x{20,}; --help has all",
        quick=True,
    ),
    in_train("a thousand unknown flags", [f"--x{i}" for i in range(1000)], "no flag --x0; ", quick=True),
    in_train("a flag without its value", ["--seed"], "--seed"),
    in_train("a value without a flag", ["ml-1m"], "ml-1m"),
    in_train("an empty path of data", ["--data", ""], "--data is ''; expected some text", quick=True),
    in_train("an empty file of validation rows", ["--valid-data", ""], "--valid-data is ''"),
    in_train("an empty file of test rows", ["--test-data", ""], "--test-data is ''"),
    in_train(
        "no timestamps, no test part",
        ["--valid-data", "", "--test-fraction", "0"],
        "--valid-data is ''; expected some text",
    ),
    in_train("an empty column", ["--user-column", ""], "--user-column is ''"),
    in_train("data of that name are not there", ["--data", "ml-2m"], "no such file or folder: ml-2m"),
    in_train("data of 300 letters", ["--data", "d" * 300], r"d{20,} \.\.\. d{20,}", quick=True),
    in_train("data of 30 million letters", ["--data", "d" * 30_000_000], r"d{20,} \.\.\. d{20,}"),
    in_train("data with escapes", ["--data", "a\x1b[31mred\r\nb"], r"a\\x1b\[31mred\\r\\nb", quick=True),
    in_train("data that turn the writing round", ["--data", "a\u202etxt.csv"], r"a\\u202etxt\.csv"),
    in_train("data of a user who is not there", ["--data", "~nobody-here/x.csv"], "nobody-here"),
    in_train("data behind a bad byte", ["--data", "\udcff.csv"], r"'\\udcff\.csv' is not UTF-8", quick=True),
    in_train("a run directory behind a bad byte", ["--run-dir", "\udcff"], r"'\\udcff' is not UTF-8"),
    in_train("a run directory in a file", ["--run-dir", "/etc/passwd/x"], "/etc/passwd/x"),
    in_train("a run directory of 300 letters", ["--run-dir", "r" * 300], "name too long"),
    in_train("a run directory in /proc", ["--run-dir", "/proc/x/y"], "cannot be written"),
    in_train("preset misspelled", ["--preset", "fast"], "--preset is 'fast'"),
    in_train("too many threads", ["--threads", "100000"], "--threads is 100000; this machine has"),
    Case("no command", lambda place: ["trian"], "there is no command 'trian'", quick=True),
    Case("a command of escapes", lambda place: ["\x1b]0;x\x07"], r"there is no command '\\x1b\]0;x\\x07'"),
    Case("a command behind a bad byte", lambda place: ["\udcfe"], "is not UTF-8"),
    Case("an empty command", lambda place: [""], "there is no command ''"),
]

# Configurations in files.

DEEP = "[" * 100_000 + "]" * 100_000
CONFIGS = [
    ("empty", b"", "cannot be read as JSON"),
    ("a list", "[]", "it holds a list, not an object"),
    ("a number", "1", "it holds a number, not an object"),
    ("null", "null", "it holds null, not an object"),
    ("text", '"x"', "it holds text, not an object"),
    ("cut off", '{"seed": 1', "cannot be read as JSON"),
    ("something behind", '{"seed": 1} x', "cannot be read as JSON"),
    ("a comma too many", '{"seed": 1,}', "cannot be read as JSON"),
    ("not UTF-8", b'{"data": "\xff"}', "it is not UTF-8"),
    ("UTF-16", '{"seed": 1}'.encode("utf-16"), "it is not UTF-8"),
    ("bytes of nothing", b"\0" * 100, "cannot be read as JSON"),
    ("nested deep", DEEP, "it is nested too deep"),
    ("objects nested deep", '{"seed":' * 50_000 + "1" + "}" * 50_000, "it is nested too deep"),
    ("a number of 400 digits", '{"min_rating": 1' + "0" * 400 + "}", "it holds a number of 401 digits"),
    ("a number of 5,000 digits", '{"seed": 1' + "0" * 5000 + "}", "it holds a number of 5,001 digits"),
    ("NaN", '{"l2": NaN}', "it holds NaN, which is no number of JSON"),
    ("Infinity", '{"l2": Infinity}', "it holds Infinity"),
    ("-Infinity", '{"min_rating": -Infinity}', "it holds -Infinity"),
    ("a number too large", '{"l2": 1e999}', "it holds 1e999, which is too large a number"),
    ("a field twice", '{"seed": 1, "seed": 2}', "it has 'seed' twice"),
    ("half a surrogate pair", '{"data": "\\ud800"}', "it is not UTF-8"),
    ("half a pair as a name", '{"\\udfff": 1}', "it is not UTF-8"),
    ("NUL in data", '{"data": "a\\u0000b"}', r"--data is 'a\\x00b'; expected some text"),
    ("NUL in the root", '{"data_root": "a\\u0000b"}', "--data-root is "),
    ("the preset a list", '{"preset": []}', r"the preset is \[\]; expected one of default, notebook"),
    ("the preset a number", '{"preset": 1}', "the preset is 1"),
    ("the preset an object", '{"preset": {"default": 1}}', "the preset is "),
    ("the preset misspelled", '{"preset": "fast"}', "the preset is 'fast'"),
    ("an unknown field", '{"embeding_dim": 4}', "no field embeding_dim; did you mean embedding_dim"),
    ("a thousand unknown fields", json.dumps({f"x{i}": 1 for i in range(1000)}), "and 997 more"),
    ("an unknown field of a million letters", json.dumps({"x" * 1_000_000: 1}), r"x{20,} \.\.\. x{20,}"),
    ("an unknown field of escapes", '{"\\u001b[31m": 1}', r"no field \\x1b\[31m"),
    ("seed a text", '{"seed": "1"}', "--seed is '1'; expected a whole number"),
    ("seed true", '{"seed": true}', "--seed is True"),
    ("seed 1.5", '{"seed": 1.5}', "--seed is 1.5"),
    ("seed null", '{"seed": null}', "--seed is None"),
    ("seed an object", '{"seed": {}}', "--seed is {}"),
    ("seed of 20 digits", '{"seed": 10000000000000000000}', "--seed is 1000"),
    ("epochs a list", '{"epochs": [1]}', r"--epochs is \[1\]"),
    ("loss a list", '{"loss": ["bce"]}', "--loss is "),
    ("loss an object", '{"loss": {}}', "--loss is {}"),
    ("split a number", '{"split": 1}', "--split is 1"),
    ("item_bias a number", '{"item_bias": 1}', "--item-bias is 1; expected true or false"),
    ("refit a text", '{"refit": "no"}', "--refit is 'no'"),
    ("data a number", '{"data": 1}', "--data is 1"),
    ("data null", '{"data": null}', "--data is None"),
    ("data_root a list", '{"data_root": []}', "--data-root is "),
    ("data_root a number", '{"data_root": 1}', "--data-root is 1"),
    ("search a list", '{"search": [1]}', "--search is .*expected none, quick, thorough or seconds above 0"),
    ("search zero", '{"search": 0}', "--search is 0; expected none, quick, thorough or seconds above 0"),
    ("device a list", '{"device": []}', "--device is "),
    ("l2 of two texts", '{"l2": ["a"]}', "--l2 is 'a'"),
    ("device_requested a list", '{"device_requested": [], "device": "cpu"}', "--device is "),
    ("a temperature of the dot product", '{"similarity": "dot", "temperature": 0.5}', "--temperature is 0.5"),
    ("text of a megabyte", json.dumps({"loss": "x" * 1_000_000}), r"--loss is 'x+ \.\.\. x+'"),
]
QUICK_CONFIGS = (
    "nested deep",
    "NaN",
    "a field twice",
    "half a surrogate pair",
    "the preset a list",
    "not UTF-8",
)
QUICK_CONFIGS += ("a number of 400 digits", "a thousand unknown fields")


def configs():
    for name, content, says in CONFIGS:
        yield Case(
            f"config: {name}",
            lambda place, content=content: ["train", "--config", place.file("c.json", content)],
            says,
            quick=name in QUICK_CONFIGS,
        )
    for name, put, says in ODD_FILES:
        yield Case(
            f"config: {name}",
            lambda place, put=put: ["train", "--config", put(place, "c.json")],
            says,
            quick=name in {"a pipe", "a device"},
        )
    yield Case(
        "config: 100 MB",
        lambda place: ["train", "--config", sparse(place, "c.json")],
        "bytes; expected at most",
    )


# What is no file, under a file's name.


def pipe(place, name):
    os.mkfifo(place.folder / name)
    return place.folder / name


def link(target):
    def put(place, name):
        (place.folder / name).symlink_to(target)
        return place.folder / name

    return put


def folder(place, name):
    (place.folder / name).mkdir()
    return place.folder / name


def listening(place, name):
    here = Path.cwd()
    os.chdir(place.folder)  # the path of a socket may have some hundred letters
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(name)
    finally:
        os.chdir(here)
    return place.folder / name


def sparse(place, name):
    path = place.file(name)
    os.truncate(path, 100_000_000)
    return path


ODD_FILES = [
    ("a pipe", pipe, "is a pipe; expected a regular file"),
    (
        "a link to a pipe",
        lambda place, name: link(pipe(place, "pipe"))(place, name),
        "is a pipe; expected a regular",
    ),
    ("a device", link("/dev/zero"), "is a device; expected a regular file"),
    ("a silent device", link("/dev/null"), "is a device; expected a regular file"),
    ("a socket", listening, "is a socket|No such device"),
    (
        "a loop of links",
        lambda place, name: link(name)(place, name),
        "Too many levels of symbolic links|no such file",
    ),
    ("a link to nothing", link("nowhere"), "[Nn]o such file"),
    ("not there", lambda place, name: place.folder / name, "[Nn]o such file"),
]

# Data.

MOVIES = "1::A::Drama\n2::B::Drama\n"
DAT = "\n".join(f"{i * 7 % 13}::{i * 5 % 17}::{1 + i % 5}::{i}" for i in range(200)) + "\n"


def zipped(members, method=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def damaged(data, share=0.5, byte=0xFF):
    """Data with 40 other bytes behind a share of it."""
    at = int(len(data) * share)
    return data[:at] + bytes([byte]) * 40 + data[at + 40 :]


def patched(data, signature, offset, value):
    """A zip with another number of 16 bits behind each signature of its headers."""
    data, at = bytearray(data), 0
    while (at := data.find(signature, at)) >= 0:
        data[at + offset : at + offset + 2] = value.to_bytes(2, "little")
        at += 4
    return bytes(data)


def every_header(data, offset, value):
    return patched(patched(data, b"PK\x03\x04", offset, value), b"PK\x01\x02", offset + 2, value)


def parquet(**columns):
    file = io.BytesIO()
    pl.DataFrame(columns).write_parquet(file)
    return file.getvalue()


RATINGS_PARQUET = parquet(
    user_id=list(range(50)) * 4, item_id=[i % 9 for i in range(200)], timestamp=list(range(200))
)
HEADER = "user_id,item_id,rating,timestamp\n"
ROWS = ratings().removeprefix(HEADER)
LZMA_ZIP = zipped({"ratings.dat": DAT * 20}, zipfile.ZIP_LZMA)
ZIP = zipped({"ratings.dat": DAT * 20})
DATA = [
    ("empty", "r.csv", b"", "empty"),
    ("only a header", "r.csv", HEADER, "no rows"),
    ("only line ends", "r.csv", "\n\n\n", "empty, or its first line is"),
    ("no header", "r.csv", ROWS, "is its header missing"),
    ("one column", "r.csv", "user_id\n1\n", "found no ','"),
    (
        "two columns of one name",
        "r.csv",
        "user_id,user_id,item_id\n1,2,3\n",
        "two columns are named 'user_id'",
    ),
    ("a column of escapes", "r.csv", "a\x1b[31m,b\n1,2\n", r"\\x1b\[31m"),
    ("a column of a megabyte", "r.csv", "x" * 60_000 + ",b\n1,2\n", "no column of user ids"),
    ("a thousand columns", "r.csv", ",".join(f"c{i}" for i in range(1000)) + "\n", "and 980 more"),
    ("too many fields", "r.csv", HEADER + "1,2,3,4,5\n", "line 2: 5 fields"),
    (
        "a rating that is text",
        "r.csv",
        HEADER + "1,2,good,4\n",
        "rating is missing or unreadable .found 'good'",
    ),
    ("a rating that is NaN", "r.csv", HEADER + "1,2,nan,4\n", "rating is not a number"),
    ("a rating that is infinite", "r.csv", HEADER + "1,2,inf,4\n", "rating is infinite"),
    ("a user id that is missing", "r.csv", HEADER + ",2,3,4\n", "user_id is missing"),
    ("a rating of a megabyte", "r.csv", HEADER + "1,2," + "g" * 1_000_000 + ",4\n", "found 'ggg.* ... ggg"),
    ("units mixed", "r.csv", HEADER + "1,2,3,1500000000\n1,3,3,1500000000000\n", "where others are in"),
    ("an open quote", "r.csv", HEADER + '1,"2,3,4\n' + ROWS, "r.csv"),
    ("not UTF-8 in the header", "r.csv", b"us\xffer,item\n1,2\n", "not UTF-8"),
    ("not UTF-8 in an id", "r.csv", HEADER.encode() + b"1\xff,2,3,4\n", "cannot be read"),
    ("UTF-16", "r.csv", ratings().encode("utf-16"), "not text, though its name says .csv"),
    ("NUL in the header", "r.csv", b"user_id\0,item_id\n1,2\n", "not text"),
    ("a gzip called csv", "r.csv", gzip.compress(ratings().encode()), "packed by gzip"),
    ("a zip called csv", "r.csv", ZIP, "not text, though its name says .csv"),
    ("a parquet called csv", "r.csv", RATINGS_PARQUET, "not text, though its name says .csv"),
    ("an unknown kind", "r.xlsx", ratings(), "unknown kind of file '.xlsx'"),
    ("no kind", "r", ratings(), "unknown kind of file ''"),
    ("a kind of 200 letters", "r." + "x" * 200, ratings(), "unknown kind of file"),
    ("a csv called parquet", "r.parquet", ratings(), "cannot be read"),
    ("an empty parquet", "r.parquet", b"", "cannot be read"),
    ("a parquet cut off", "r.parquet", RATINGS_PARQUET[:-20], "cannot be read"),
    ("a parquet damaged", "r.parquet", damaged(RATINGS_PARQUET, 0.02), "cannot be read"),
    ("a parquet with a damaged foot", "r.parquet", damaged(RATINGS_PARQUET, 0.9), "cannot be read"),
    ("a parquet of no rows", "r.parquet", parquet(user_id=[], item_id=[], timestamp=[]), "no rows|is Null"),
    (
        "a parquet of lists",
        "r.parquet",
        parquet(user_id=[[1]], item_id=[1], timestamp=[1]),
        "user_id is List",
    ),
    (
        "a parquet of floats",
        "r.parquet",
        parquet(user_id=[1.5], item_id=[1], timestamp=[1]),
        "user_id is Float64",
    ),
    (
        "a parquet with a null",
        "r.parquet",
        parquet(user_id=[1, None], item_id=[1, 2], timestamp=[1, 2]),
        "missing",
    ),
    ("a gzip that is none", "r.csv.gz", ratings(), "not a readable gzip"),
    ("an empty gzip", "r.csv.gz", b"", "empty"),
    ("a gzip cut off", "r.csv.gz", gzip.compress(ratings(5000).encode())[:-300], "not a readable gzip"),
    ("a gzip damaged", "r.csv.gz", damaged(gzip.compress(ratings(5000).encode())), "not a readable gzip"),
    ("a zip that is none", "r.zip", ratings(), "not a readable zip"),
    ("an empty zip", "r.zip", b"", "not a readable zip"),
    ("a zip of nothing", "r.zip", zipped({}), "found none"),
    (
        "a zip of two tables",
        "r.zip",
        zipped({"a.csv": "x", "b.csv": "y"}),
        "found b.csv, a.csv; name the file",
    ),
    ("a zip of a thousand tables", "r.zip", zipped({f"{i}.csv": "x" for i in range(1000)}), "and 990 more"),
    ("a zip cut off", "r.zip", ZIP[:-100], "not a readable zip"),
    ("a zip damaged", "r.zip", damaged(ZIP), "not a readable zip"),
    ("a zip of lzma, damaged", "r.zip", damaged(LZMA_ZIP, 0.3), "not a readable zip"),
    (
        "a zip of bzip2, damaged",
        "r.zip",
        damaged(zipped({"ratings.dat": DAT}, zipfile.ZIP_BZIP2), 0.3),
        "cannot be read",
    ),
    ("a zip encrypted", "r.zip", every_header(ZIP, 6, 1), "not a readable zip .*encrypted"),
    ("a zip packed in an unknown way", "r.zip", every_header(ZIP, 8, 97), "not a readable zip"),
    ("a zip whose table is empty", "r.zip", zipped({"ratings.dat": ""}), "empty"),
    ("a zip that would climb out", "r.zip", zipped({"../../up.csv": "user_id;item_id\n"}), "found no ','"),
    ("a zip whose table has escapes", "r.zip", zipped({"a\x1b[31m.csv": ""}), r"a\\x1b\[31m\.csv: empty"),
    ("a zip that says to be huge", "r.zip", None, "unpacks to 1,099,511,627,776 bytes"),
]
DATA_THAT_WORKS = [
    ("titles encrypted", "r.zip", None),
    ("titles packed in an unknown way", "r.zip", None),
    ("titles damaged", "r.zip", None),
    (
        "ids of titles past 64 bits",
        "r.zip",
        zipped({"ratings.dat": DAT, "movies.dat": "9" * 30 + "::A::B\n"}),
    ),
    (
        "ids of titles of 5,000 digits",
        "r.zip",
        zipped({"ratings.dat": DAT, "movies.dat": "9" * 5000 + "::A::B\n"}),
    ),
    ("ids of titles that are text", "r.zip", zipped({"ratings.dat": DAT, "movies.dat": "x::A::B\n"})),
    ("titles of nothing", "r.zip", zipped({"ratings.dat": DAT, "movies.dat": ""})),
    ("brackets", "g[1].csv", ratings()),
    ("a star", "g*.csv", ratings()),
    ("a question mark", "g?.csv", ratings()),
    ("markup", "[bold]x[/].csv", ratings()),
    ("brackets, parquet", "g[1].parquet", RATINGS_PARQUET),
    ("brackets, gzip", "g[1].csv.gz", gzip.compress(ratings().encode())),
    ("brackets, zip", "g[1].zip", ZIP),
    ("a line end", "g\n1.csv", ratings()),
    ("letters past ASCII", "gé漢.csv", ratings()),
    ("quotes and a blank", "g 'x\".csv", ratings()),
]
QUICK_DATA = ("a zip of lzma, damaged", "a zip encrypted", "a parquet cut off", "a zip that says to be huge")
QUICK_DATA += (
    "a gzip cut off",
    "a rating that is NaN",
    "a column of escapes",
    "a thousand columns",
    "no header",
)


def titles(change):
    """A zip whose titles come second, with a change of the bytes that are about them."""
    data = zipped({"ratings.dat": DAT, "movies.dat": MOVIES * 50})
    second = data.index(b"PK\x03\x04", 4)
    first_entry = data.index(b"PK\x01\x02")
    second_entry = data.index(b"PK\x01\x02", first_entry + 4)
    entries = data[first_entry:second_entry]
    return data[:second] + change(data[second:first_entry]) + entries + change(data[second_entry:])


SPECIAL = {
    "titles encrypted": titles(lambda part: every_header(part, 6, 1)),
    "titles packed in an unknown way": titles(lambda part: every_header(part, 8, 97)),
    "titles damaged": titles(lambda part: damaged(part, 0.4) if part.startswith(b"PK\x03\x04") else part),
}


def huge_zip():
    """A zip that says of its table that it has a terabyte, in the number of 64 bits that comes with ZIP64."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        information = zipfile.ZipInfo("ratings.dat")
        archive.writestr(information, DAT)
        information.file_size = 1 << 40
    return file.getvalue()


def data():
    for name, file, content, says in DATA:
        written = huge_zip() if content is None else content
        yield Case(
            f"data: {name}",
            lambda place, file=file, content=written: train(place, "--data", place.file(file, content)),
            says,
            quick=name in QUICK_DATA,
        )
    for name, file, content in DATA_THAT_WORKS:
        written = SPECIAL[name] if content is None else content
        yield Case(
            f"data: {name}",
            lambda place, file=file, content=written: train(place, "--data", place.file(file, content)),
            None,
            code=0,
        )
    for suffix in ("csv", "parquet", "zip", "csv.gz", "dat"):
        for name, put, says in ODD_FILES:
            yield Case(
                f"data: {name}, .{suffix}",
                lambda place, put=put, suffix=suffix: train(place, "--data", put(place, f"r.{suffix}")),
                says,
                quick=name == "a pipe",
            )
    for name, put, _ in ODD_FILES[:3]:
        yield Case(
            f"data: a folder with {name}",
            lambda place, put=put: [*train(place), "--data", in_folder(place, put)],
            "is a (pipe|device); expected a regular file",
        )
    yield Case(
        "data: a folder of nothing", lambda place: train(place, "--data", folder(place, "d")), "found none"
    )
    yield Case(
        "data: a folder called csv",
        lambda place: train(place, "--data", folder(place, "d.csv")),
        "found none",
    )
    yield Case("data: the root", lambda place: train(place, "--data", "/"), "^fasttower: /: expected one of")
    yield Case(
        "data: a pattern of nothing", lambda place: train(place, "--data", "n*.csv"), "no such file or folder"
    )
    yield Case("data: /dev/stdin", lambda place: train(place, "--data", "/dev/stdin"), "is a device")
    yield Case(
        "data: NUL in a pattern of a frame", lambda place: train(place, "--data", "[" * 200), "no such file"
    )


def in_folder(place, put):
    inner = replace(place, folder=folder(place, "d"))
    put(inner, "r.csv")
    return inner.folder


# Run directories.

FILES = (*RUN_FILES, MANIFEST)


def replaced(name, content):
    def make(place):
        run = place.run()
        old = (run / name).read_bytes()
        (run / name).write_bytes(content(old) if callable(content) else content)
        return ["info", run]

    return make


def moved(name, put):
    def make(place):
        run = place.run()
        (run / name).unlink()
        put(replace(place, folder=run), name)
        return ["info", run]

    return make


CONTENTS = [
    ("empty", b""),
    ("cut off", lambda old: old[: len(old) // 2]),
    ("a byte longer", lambda old: old + b" "),
    ("one bit flipped", lambda old: old[:-3] + bytes([old[-3] ^ 1]) + old[-2:]),
    ("garbage", b"\xffgarbage" * 100),
]
ODD_IN_RUNS = [(name, put) for name, put, _ in ODD_FILES if name in ("a pipe", "a device", "a loop of links")]
ODD_IN_RUNS += [("not there", lambda place, name: None), ("a folder", folder)]


def forged():
    for file in FILES:
        for name, content in CONTENTS:
            yield Case(
                f"run: {file} {name}",
                replaced(file, content),
                file.replace(".", r"\."),
                quick=(file, name) in {("users.parquet", "one bit flipped"), ("manifest.json", "empty")},
            )
        for name, put in ODD_IN_RUNS:
            yield Case(
                f"run: {file} {name}",
                moved(file, put),
                file.replace(".", r"\.") if name != "not there" else "not there|has no manifest.json",
                quick=(file, name) in {("model.safetensors", "a pipe"), ("manifest.json", "not there")},
            )


def trusted(change, *command):
    def make(place):
        run = place.run()
        change(run)
        return [*(command or ("info",)), run, "--trust-files"]

    return make


def tensors(name, change):
    def apply(run):
        found = load_file(run / name)
        change(found)
        (run / name).write_bytes(save({key: value.contiguous() for key, value in found.items()}))

    return apply


def put(name, key, value):
    return tensors(name, lambda found: found.update({key: value(found[key])}))


def frame(name, change):
    return lambda run: change(pl.read_parquet(run / name)).write_parquet(run / name)


def wrapped(indptr):
    """Row limits whose differences wrap around 64 bits, so that none of them is negative."""
    out = indptr.clone()
    out[1], out[2] = 2**63 - 1, -(2**63) + int(indptr[3]) + 1
    return out


MODEL, KNOWN = "model.safetensors", "known_positives.safetensors"
TRUSTED = [
    ("limits that wrap around", put(KNOWN, "indptr", wrapped), "does not hold rows"),
    ("limits that fall", put(KNOWN, "indptr", lambda t: t.flip(0)), "does not hold rows"),
    ("limits too few", put(KNOWN, "indptr", lambda t: t[:-1]), "does not hold rows"),
    ("limits too many", put(KNOWN, "indptr", lambda t: torch.cat([t, t[-1:]])), "does not hold rows"),
    ("limits negative", put(KNOWN, "indptr", lambda t: t - 1), "does not hold rows"),
    ("limits of 32 bits", put(KNOWN, "indptr", lambda t: t.int()), "holds indptr torch.int32"),
    ("limits of two dimensions", put(KNOWN, "indptr", lambda t: t[None]), "does not hold rows"),
    ("limits of none", put(KNOWN, "indptr", lambda t: t[:0]), "does not hold rows"),
    ("pairs past the catalogue", put(KNOWN, "items", lambda t: t + 1), "does not hold rows"),
    ("pairs far past the catalogue", put(KNOWN, "items", lambda t: t * 0 + 2**31 - 1), "does not hold rows"),
    ("pairs negative", put(KNOWN, "items", lambda t: t - 1), "does not hold rows"),
    ("pairs of floats", put(KNOWN, "items", lambda t: t.float()), "items torch.float32"),
    ("pairs out of order", put(KNOWN, "items", lambda t: t.flip(0)), "does not hold rows"),
    ("pairs twice", put(KNOWN, "items", lambda t: t * 0), "does not hold rows"),
    ("pairs too few", put(KNOWN, "items", lambda t: t[:-1]), "does not hold rows"),
    ("pairs of two dimensions", put(KNOWN, "items", lambda t: t[:, None]), "does not hold rows"),
    ("a tensor of pairs missing", tensors(KNOWN, lambda t: t.pop("items")), "expected indptr torch.int64"),
    ("a tensor of pairs too many", tensors(KNOWN, lambda t: t.update(x=torch.zeros(1))), "expected indptr"),
    (
        "NaN among the vectors",
        put(MODEL, "user_embedding", lambda t: t.index_fill(0, torch.tensor(3), np.nan)),
        "not finite",
    ),
    ("infinity among the vectors", put(MODEL, "item_embedding", lambda t: t / 0), "not finite"),
    ("NaN among the biases", put(MODEL, "item_bias", lambda t: t * np.nan), "not finite"),
    (
        "complex vectors",
        put(MODEL, "user_embedding", lambda t: t.to(torch.complex64)),
        "in torch.complex64; expected",
    ),
    ("vectors of 64 bits", put(MODEL, "user_embedding", lambda t: t.double()), "in torch.float64"),
    ("vectors of 16 bits", put(MODEL, "item_embedding", lambda t: t.half()), "in torch.float16"),
    ("vectors of whole numbers", put(MODEL, "item_embedding", lambda t: t.int()), "in torch.int32"),
    ("vectors too few", put(MODEL, "user_embedding", lambda t: t[:-1]), "users.parquet has 40 rows"),
    ("vectors of no dimensions", put(MODEL, "user_embedding", lambda t: t[:, :0]), "the weights are"),
    ("vectors of one dimension", put(MODEL, "item_embedding", lambda t: t[0]), "the weights are"),
    ("biases too few", put(MODEL, "item_bias", lambda t: t[:-1]), "the weights are"),
    ("no vectors", tensors(MODEL, lambda t: t.pop("user_embedding")), "the weights are"),
    ("no biases", tensors(MODEL, lambda t: t.pop("item_bias")), "of another model"),
    (
        "users in another order",
        frame("users.parquet", lambda f: f.with_columns(pl.col("user_id").reverse())),
        "out of order",
    ),
    (
        "items in another order",
        frame("items.parquet", lambda f: f.with_columns(pl.col("item_id").reverse())),
        "out of order",
    ),
    ("users turned round", frame("users.parquet", lambda f: f.reverse()), "not in the order of user_index"),
    ("a user too few", frame("users.parquet", lambda f: f[:-1]), "has 39 rows"),
    ("no users", frame("users.parquet", lambda f: f.clear()), "has 0 rows"),
    ("a user twice", frame("users.parquet", lambda f: f.with_columns(user_id=pl.lit("a"))), "there twice"),
    (
        "a user without an id",
        frame("users.parquet", lambda f: f.with_columns(user_id=pl.lit(None))),
        "missing",
    ),
    (
        "users by floats",
        frame("users.parquet", lambda f: f.with_columns(pl.col("user_id").cast(pl.Float64))),
        "of type Float64",
    ),
    (
        "indices of 64 bits",
        frame("users.parquet", lambda f: f.with_columns(pl.col("user_index").cast(pl.Int64))),
        "not in the order",
    ),
    (
        "indices of text",
        frame("items.parquet", lambda f: f.with_columns(pl.col("item_index").cast(pl.String))),
        "not in the order",
    ),
    (
        "columns in another order",
        frame("users.parquet", lambda f: f.select("user_index", "user_id")),
        "has the columns",
    ),
    ("a column too many", frame("items.parquet", lambda f: f.with_columns(x=1)), "has the columns"),
    (
        "a column of escapes",
        frame("items.parquet", lambda f: f.rename({"item_id": "\x1b[31m"})),
        r"columns \\x1b\[31m",
    ),
    ("titles that are numbers", frame("items.parquet", lambda f: f.with_columns(title=1)), "titles of type"),
    (
        "recommendations to strangers",
        frame("recommendations.parquet", lambda f: f.with_columns(user_id=pl.lit("?"))),
        "does not know",
    ),
    (
        "recommendations of strangers",
        frame("recommendations.parquet", lambda f: f.with_columns(item_id=pl.lit("?"))),
        "does not know",
    ),
    (
        "scores that are NaN",
        frame("recommendations.parquet", lambda f: f.with_columns(score=pl.lit(np.nan, pl.Float32))),
        "not finite",
    ),
    (
        "scores of 64 bits",
        frame("recommendations.parquet", lambda f: f.with_columns(pl.col("score").cast(pl.Float64))),
        "has the columns",
    ),
    (
        "ranks from 0",
        frame("recommendations.parquet", lambda f: f.with_columns(pl.col("rank") - 1)),
        "ranks below 1",
    ),
    ("no scores", frame("recommendations.parquet", lambda f: f.drop("score")), "has the columns"),
    (
        "a user recommended to twice",
        frame("recommendations.parquet", lambda f: f.with_columns(user_id=None)),
        "has the columns",
    ),
]


def content(name, change):
    """Another content of an object in a file of a run."""

    def apply(run):
        lines = (run / name).read_text().splitlines() if name.endswith("l") else [(run / name).read_text()]
        values = json.loads(lines[0])
        change(values)
        lines[0] = json.dumps(values)
        (run / name).write_text("\n".join(lines) + "\n")

    return apply


METRICS = (
    "test",
    "popularity",
    "test_users",
    "settings",
    "best_epoch",
    "interrupted",
    "timing_s",
    "device",
    "backend",
)
HISTORY = (
    "phase",
    "settings",
    "epoch",
    "step",
    "train_loss",
    "valid",
    "epoch_s",
    "positives_per_s",
    "elapsed_s",
)
CONFIG = (
    "device",
    "backend",
    "data",
    "seed",
    "embedding_dim",
    "item_bias",
    "loss",
    "l2",
    "batch_size",
    "k",
    "split",
)


def fields():
    for file, names in (("metrics.json", METRICS), ("history.jsonl", HISTORY), ("config.json", CONFIG)):
        for name in names:
            title = f"run, trusted: {file}, {name}"
            for kind, value in (("a list", []), ("null", None), ("an object of text", {"a": "b"})):
                # A configuration may leave open whatever is in it.
                says = f"{name}|leaves open|another model|--{name.replace('_', '-')}"
                change = content(file, lambda values, name=name, value=value: values.update({name: value}))
                quick = (name, kind) in {("test", "a list"), ("step", "null")}
                yield Case(f"{title} {kind}", trusted(change), says, quick=quick)
            if file != "config.json":
                change = content(file, lambda values, name=name: values.pop(name))
                yield Case(f"{title} missing", trusted(change), f"lacks {name}")
    odd = [
        ("metrics.json", "search", [{"settings": 1}], r"metrics.json.search\[0\]"),
        ("metrics.json", "search", {}, "metrics.json.search is {}; expected a list"),
        ("metrics.json", "updates", [1], r"metrics.json.updates\[0\] is 1; expected an object"),
        ("metrics.json", "versions", {"torch": 2}, "metrics.json.versions.torch is 2; expected text"),
        ("metrics.json", "test", {"NDCG@5": "high"}, "metrics.json.test.NDCG@5 is 'high'; expected a number"),
        ("metrics.json", "test", {"\x1b[31m": 1}, r"lacks \\x1b\[31m of popularity"),
        ("metrics.json", "test_users", -1, "fewer users or epochs than none"),
        ("history.jsonl", "step", 1.5, "step is 1.5; expected a whole number"),
        ("history.jsonl", "surprise", 1, "a field 'surprise' too many"),
        ("config.json", "format", 0, "its format is 0"),
        ("config.json", "format", "4", "its format is '4'"),
        ("config.json", "format", [], r"its format is \[\]"),
        ("config.json", "format", 10**18, "newer fasttower"),
        ("config.json", "surprise", 1, "no field surprise"),
        ("config.json", "embedding_dim", 5, "of another model"),
        ("config.json", "embedding_dim", 0, "--embedding-dim is 0"),
        ("config.json", "similarity", "cosine", "user_table"),
        ("config.json", "l2", -1, "--l2 is -1"),
        ("config.json", "seed", 2**64, "it holds a number of 20 digits|--seed is "),
    ]
    for file, name, value, says in odd:
        change = content(file, lambda values, name=name, value=value: values.update({name: value}))
        yield Case(f"run, trusted: {file}, {name} {str(value)[:30]}", trusted(change), says)


def runs():
    yield from forged()
    for name, change, says in TRUSTED:
        quick = name in {"limits that wrap around", "users in another order", "complex vectors"}
        yield Case(f"run, trusted: {name}", trusted(change), says, quick=quick)
    yield Case(
        "recommend, trusted: limits that wrap around",
        trusted(TRUSTED[0][1], "recommend"),
        "does not hold rows",
    )
    yield from fields()

    def of_two_runs(name):
        def make(place):
            run = place.run()
            update_of(run / name)
            return ["recommend", run]

        return make

    for name in FILES[:-1]:
        yield Case(
            f"run: {name} of another run",
            of_two_runs(name),
            f"{name} is not the file that the run was written with",
        )
    yield Case("run: format 3", old, r"of format 3, which has none; --trust-files", quick=True)
    yield Case("run: format 3, trusted", lambda place: [*old(place), "--trust-files"], None, code=0)
    yield Case(
        "run: nothing",
        lambda place: ["info", place.folder / "no"],
        "there is nothing of that name",
        quick=True,
    )
    yield Case("run: a file", lambda place: ["info", place.file("f")], "is not a run directory: it is a file")
    yield Case("run: an empty folder", lambda place: ["info", folder(place, "d")], "is not a run directory")
    yield Case("run: a loop of links", lambda place: ["info", link("a")(place, "a")], "a")
    yield Case("run: a pipe", lambda place: ["info", pipe(place, "p")], "is not a run directory")
    yield Case("run: a device", lambda place: ["info", "/dev/null"], "is not a run directory")
    yield Case("run: behind a bad byte", lambda place: ["info", "\udcff"], "is not UTF-8")
    yield Case("run: a name of 5,000 letters", lambda place: ["info", "r" * 5000], r"r{20,} \.\.\. r{20,}")
    for name in ("g[1]", "[bold]x[/]", "g*", "g?", "é漢", "a b", "a'b", "a\nb", "-x"):
        for command in (["info"], ["recommend", "--k", "2"], ["similar", "--user", "001"]):
            yield Case(
                f"{command[0]}: a run called {name!r}",
                lambda place, name=name, command=command: [*command[:1], place.run(name), *command[1:]],
                None,
                code=0,
            )
    yield Case(
        "train: a run called g[1]",
        lambda place: ["train", "--run-dir", "g[1]", *FAST, "--data", place.ratings()],
        None,
        0,
    )


def update_of(path):
    """Change a file of a run to one of the same kind, as another run has it."""
    if path.suffix == ".parquet":
        frame = pl.read_parquet(path)
        frame.with_columns(frame.to_series(0).reverse()).write_parquet(path)
    elif path.suffix == ".safetensors":
        found = load_file(path)
        save_file({name: tensor.flip(0).contiguous() for name, tensor in found.items()}, path)
    else:
        path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))


def old(place):
    run = place.run()
    (run / "manifest.json").unlink()
    content("config.json", lambda values: values.update(format=3))(run)
    return ["info", run]


# What commands are given besides runs.


def using(command, *arguments):
    """A command on a run, with arguments, or what makes them."""

    def make(place):
        return [command, place.run(), *(a(place) if callable(a) else a for a in arguments)]

    return make


def ids(name, text):
    return lambda place: place.file(name, text)


def uses():
    rows = [
        ("k 0", using("recommend", "--k", "0"), "k is 0"),
        ("k -1", using("recommend", "--k=-1"), "k is -1"),
        ("k x", using("recommend", "--k", "x"), "--k is 'x'; expected a whole number"),
        (
            "unknown misspelled",
            using("recommend", "--unknown", "ignore"),
            "--unknown is 'ignore'; expected one of raise, skip",
        ),
        ("scoring misspelled", using("recommend", "--scoring", "int8"), "--scoring is 'int8'"),
        ("scoring of a GPU", using("recommend", "--scoring", "tf32"), "tf32"),
        (
            "device misspelled",
            using("recommend", "--device", "gpu"),
            "--device is 'gpu'; expected one of auto, cpu, cuda, mps",
        ),
        ("budget misspelled", using("recommend", "--memory-budget", "lots"), "--memory-budget is 'lots'"),
        (
            "budget of 5,000 digits",
            using("recommend", "--memory-budget", "9" * 5000),
            None,
        ),
        ("budget of nothing", using("recommend", "--memory-budget", "0"), "--memory-budget is 0"),
        (
            "an unknown user",
            using("recommend", "--user", "nobody"),
            "1 of 1 user ids are not in the run: 'nobody'",
        ),
        ("an unknown user of 100,000 letters", using("recommend", "--user", "9" * 100_000), "999 ... 999"),
        ("an unknown user of escapes", using("recommend", "--user", "a\x1b[31m"), r"a\\x1b\[31m"),
        ("a user behind a bad byte", using("recommend", "--user", "\udcff"), "is not UTF-8"),
        (
            "a hundred unknown users",
            using("recommend", "--user", *(f"x{i}" for i in range(100))),
            "100 of 100 user ids",
        ),
        ("users and newcomers", using("recommend", "--user", "001", "--new", "x.csv"), "give one of them"),
        (
            "users in an empty file",
            using("recommend", "--users", ids("u.csv", "")),
            "cannot be read as a list of ids",
        ),
        (
            "users without a name",
            using("recommend", "--users", ids("u.csv", "001\n002\n")),
            "its first line should name",
        ),
        (
            "users that are no text",
            using("recommend", "--users", ids("u.txt", b"\xff\xfe")),
            "cannot be read as a list",
        ),
        (
            "users in a parquet cut off",
            using("recommend", "--users", ids("u.parquet", RATINGS_PARQUET[:50])),
            "cannot be read as",
        ),
        (
            "users in a parquet of numbers",
            using("recommend", "--users", ids("u.parquet", RATINGS_PARQUET)),
            "holds integers",
        ),
        ("an output of no kind", using("recommend", "--output", "out"), "expected a name that ends in"),
        (
            "an output of another kind",
            using("recommend", "--output", "out.xlsx"),
            "expected a name that ends in",
        ),
        ("an output in no folder", using("recommend", "--output", "no/out.csv"), "there is no folder for it"),
        (
            "an output in a file",
            using("recommend", "--output", "/etc/passwd/out.csv"),
            "there is no folder for it",
        ),
        (
            "an output that is a folder",
            using("recommend", "--output", lambda p: folder(p, "o.csv")),
            "is a folder",
        ),
        ("an output that is a pipe", using("recommend", "--output", lambda p: pipe(p, "o.csv")), "is a pipe"),
        (
            "an output that is a device",
            using("recommend", "--output", lambda p: link("/dev/full")(p, "o.csv")),
            "is a device",
        ),
        ("an output in a loop", using("recommend", "--output", lambda p: link("o.csv")(p, "o.csv")), None),
        ("an output in /proc", using("recommend", "--output", "/proc/o.csv"), "cannot be written"),
        (
            "an output of 300 letters",
            using("recommend", "--output", "o" * 300 + ".csv"),
            "cannot be written|too long",
        ),
        ("an output behind a bad byte", using("recommend", "--output", "\udcff.csv"), "is not UTF-8"),
        ("newcomers not there", using("recommend", "--new", "no.csv"), "no such file or folder: no.csv"),
        (
            "newcomers of numbers",
            using("recommend", "--new", ids("n.csv", ratings())),
            "convert|those of the run are",
        ),
        (
            "nothing allowed",
            using("recommend", "--allow", ids("a.txt", "nothing\n")),
            "the run knows none of its items",
        ),
        (
            "a column that is not there",
            using("recommend", "--new", ids("n.csv", ratings()), "--user-column", "x"),
            "no column 'x'",
        ),
        ("similar to nothing", using("similar"), "give the ids of items"),
        ("similar to both", using("similar", "--item", "item 1", "--user", "001"), "give the ids of items"),
        ("similar to an unknown", using("similar", "--item", "x"), "1 of 1 item ids are not in the run"),
        ("similar, k 0", using("similar", "--user", "001", "--k", "0"), "k is 0"),
        ("evaluate without a file", using("evaluate"), "--test"),
        ("evaluate on nothing", using("evaluate", "--test", "no.csv"), "no such file or folder"),
        (
            "evaluate on strangers",
            using("evaluate", "--test", ids("t.csv", "user_id,item_id\nx,y\n")),
            "nothing to evaluate",
        ),
        (
            "evaluate by no metric",
            using("evaluate", "--test", ids("t.csv", "user_id,item_id\n"), "--metrics", "AUC"),
            "AUC",
        ),
        (
            "evaluate, k 0",
            using("evaluate", "--test", ids("t.csv", "user_id,item_id\n001,item 1\n"), "--k", "0"),
            "k is 0",
        ),
        ("export to a file", using("export", "--to", ids("f", "")), "cannot be written"),
        ("export to a full folder", using("export", "--to", "run"), "is not empty"),
        ("export to /proc", using("export", "--to", "/proc/x"), "cannot be written"),
        ("export behind a bad byte", using("export", "--to", "\udcff"), "is not UTF-8"),
        (
            "export of no format",
            using("export", "--to", "o", "--format", "csv"),
            "--format is 'csv'; expected one of faiss",
        ),
        ("info without a run", lambda place: ["info"], "info|required|missing|PATH|run"),
        ("info on two runs", lambda place: ["info", "a", "b"], "b"),
    ]
    quick = ("k x", "an unknown user of escapes", "an output that is a pipe", "users that are no text")
    quick += ("export of no format", "nothing allowed")
    for name, make, says in rows:
        yield Case(f"uses: {name}", make, says, 0 if says is None else 2, quick=name in quick)
    for flag, command in (
        ("--users", "recommend"),
        ("--new", "recommend"),
        ("--deny", "recommend"),
        ("--test", "evaluate"),
    ):
        for suffix in ("csv", "parquet", "txt") if flag != "--test" else ("csv",):
            for name, put, says in ODD_FILES[:3]:
                if (flag, suffix) == ("--new", "txt"):
                    continue
                yield Case(
                    f"uses: {flag}, .{suffix}, {name}",
                    using(command, flag, lambda place, put=put, suffix=suffix: put(place, f"x.{suffix}")),
                    says,
                )


CASES = [*flags(), *COMMAND_LINES, *configs(), *data(), *runs(), *uses()]


# Surroundings: the limits, the variables and the streams of a process.


class Surroundings(NamedTuple):
    """A case in a process of its own.

    Attributes:
        shell: what a shell does with the command, ``"$@"``.
        variables: of the environment; what is in ``{folder}`` is the case's folder.
    """

    name: str
    make: object
    says: str | None
    code: int = 2
    shell: str = 'exec "$@"'
    variables: Mapping[str, str] = MappingProxyType({})


def packed(place):
    return train(place, "--data", place.file("r.csv.gz", gzip.compress(ratings(20_000).encode())))


def large(place):
    """Tables of 200 MB, of many users."""
    path = place.folder / "large.parquet"
    users = np.arange(200_000)
    pl.DataFrame({"user_id": users, "item_id": users % 100, "timestamp": users}).write_parquet(path)
    return train(place, "--data", path, "--embedding-dim", "512", "--test-fraction", "0")


def on_a_small_disk(place):
    return train(place, "--data", place.ratings(), "--embedding-dim", "512")


def named(place, name):
    """A run and its data whose names are past ASCII."""
    return ["train", "--run-dir", name, *FAST, "--data", place.ratings(f"{name}.csv")]


SURROUNDINGS = [
    Surroundings(
        "no threads for Polars",
        using("info"),
        "POLARS_MAX_THREADS is '0'; expected a number",
        variables={"POLARS_MAX_THREADS": "0"},
    ),
    Surroundings(
        "many threads for Polars",
        using("info"),
        "POLARS_MAX_THREADS is 'many'",
        variables={"POLARS_MAX_THREADS": "many"},
    ),
    Surroundings(
        "a full disk, --version", lambda place: ["--version"], "No space left", shell='exec "$@" >/dev/full'
    ),
    Surroundings(
        "a full disk, --help", lambda place: ["--help"], "No space left", shell='exec "$@" >/dev/full'
    ),
    Surroundings(
        "a full disk, train --help",
        lambda place: ["train", "--help"],
        "No space left",
        shell='exec "$@" >/dev/full',
    ),
    Surroundings("a full disk, info", using("info"), "No space left", shell='exec "$@" >/dev/full'),
    Surroundings("no output, --version", lambda place: ["--version"], None, 0, shell='exec "$@" >&-'),
    Surroundings("no output, info", using("info"), None, 0, shell='exec "$@" >&-'),
    Surroundings("no input, info", using("info"), None, 0, shell='exec "$@" <&-'),
    Surroundings("a reader that leaves", using("recommend"), None, 0, shell='"$@" | head -c 1'),
    Surroundings(
        "a temporary folder that is not there",
        packed,
        r"no folder can be made in TMPDIR, \S+/no, \(No such file or directory\); set TMPDIR",
        variables={"TMPDIR": "{folder}/no"},
    ),
    Surroundings(
        "a temporary folder that is a file", packed, "in TMPDIR", variables={"TMPDIR": "/etc/passwd"}
    ),
    Surroundings(
        "no room to unpack", packed, "cannot be unpacked into .*set TMPDIR", shell='ulimit -f 64; exec "$@"'
    ),
    Surroundings(
        "no room for the run", on_a_small_disk, "cannot be written", shell='ulimit -f 16; exec "$@"'
    ),
    Surroundings(
        "no room for recommendations",
        using("recommend", "--k", "40", "--no-filter-seen", "--output", "o.csv"),
        "--output .* cannot be written",
        shell='ulimit -f 8; exec "$@"',
    ),
    Surroundings(
        "no room for an export",
        using("export", "--to", "e"),
        "cannot be written",
        shell='ulimit -f 1; exec "$@"',
    ),
    Surroundings(
        "too little memory",
        large,
        "ran out of memory|not enough memory",
        shell='ulimit -v 2000000; exec "$@"',
    ),
    Surroundings(
        "nothing compiled",
        lambda place: [*train(place, "--data", place.ratings()), "--backend", "numba"],
        "backend numba cannot compile, for NUMBA_DISABLE_JIT is set",
        variables={"NUMBA_DISABLE_JIT": "1"},
    ),
    Surroundings(
        "a name past ASCII in an ASCII world",
        lambda place: named(place, "é漢"),
        None,
        0,
        variables={"LC_ALL": "C"},
    ),
    Surroundings("no home", using("info"), None, 0, shell='unset HOME; exec "$@"'),
]
