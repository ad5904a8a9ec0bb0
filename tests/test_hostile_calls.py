"""What Python code may give the library: it gets what it asked for, or an error of one line."""

import dataclasses
import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from conftest import CONFIG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fasttower
from fasttower import Config, FastTowerError
from fasttower.data.readers import read_interactions
from fasttower.run.directory import FILES

ROWS = pl.DataFrame({"user_id": [1, 2, 3] * 20, "item_id": list(range(20)) * 3, "timestamp": list(range(60))})
BAD_TEXT = ("a\0b", "\ud800")


def raising(frame):
    raise ZeroDivisionError("my own")


def fit(data, **fields):
    return fasttower.fit(data, dataclasses.replace(CONFIG, **fields))


CALLS = [
    ("a lazy frame that raises", lambda run, to: fit(ROWS.lazy().map_batches(raising)), "my own"),
    ("a frame without columns", lambda run, to: fit(pl.DataFrame()), "no column of user ids"),
    ("a frame of lists", lambda run, to: fit(ROWS.with_columns(user_id=[[1]] * 60)), "user_id is List"),
    (
        "a frame of objects",
        lambda run, to: fit(pl.DataFrame({"user_id": [object()], "item_id": [1]})),
        "user_id is Ob",
    ),
    ("a frame of 128 bits", lambda run, to: fit(ROWS.cast({"user_id": pl.Int128})), "user_id is Int128"),
    ("data that are a number", lambda run, to: fit(7), "expected a path or a Polars"),
    ("data that are bytes", lambda run, to: fit(b"ml-1m"), "found bytes"),
    ("data with NUL", lambda run, to: fit("a\0b"), "--data is "),
    ("data with half a character", lambda run, to: fit("\ud800"), "--data is "),
    (
        "an observer that is none",
        lambda run, to: fasttower.fit(ROWS, CONFIG, observer="x"),
        "observer is a str",
    ),
    ("a configuration that is none", lambda run, to: fasttower.fit(ROWS, {"epochs": 1}), "config is a dict"),
    ("a rating of 400 digits", lambda run, to: Config(min_rating=10**400), "--min-rating is 1000"),
    (
        "a rating of 5,000 digits",
        lambda run, to: Config(min_rating=10**5000),
        "a number of thousands of digits",
    ),
    (
        "epochs of 5,000 digits",
        lambda run, to: Config(epochs=-(10**5000)),
        "--epochs is a number of thousands",
    ),
    (
        "a loss that is a list",
        lambda run, to: Config(loss=["bce"]),
        r"--loss is \['bce'\]; expected one of bce",
    ),
    (
        "a temperature of the dot",
        lambda run, to: Config(similarity="dot", temperature=1.0),
        "none with --similarity dot",
    ),
    (
        "k of 5,000 digits",
        lambda run, to: run.recommend(k=-(10**5000)),
        "k is a number of thousands of digits",
    ),
    ("an id of 100,000 digits", lambda run, to: run.recommend(["9" * 100_000]), r"999 \.\.\. 999"),
    ("ids that are bytes", lambda run, to: run.recommend([b"001"]), "user ids"),
    ("ids that are numbers", lambda run, to: run.recommend([1]), "convert them"),
    ("ids that are objects", lambda run, to: run.recommend([object()]), "user ids"),
    ("ids that are None", lambda run, to: run.similar_items(None), "are None"),
    ("no such scoring", lambda run, to: run.recommend(scoring="x" * 10_000), "scoring is 'xxx"),
    ("no such metric", lambda run, to: run.evaluate(ROWS, metrics=["AUC" * 1000]), "metrics are "),
    ("a device that is a list", lambda run, to: fasttower.load_run(to, ["cpu"]), "the device is"),
    ("a run that is a number", lambda run, to: fasttower.load_run(7), "the path is 7; expected"),
    ("a run that is bytes", lambda run, to: fasttower.load_run(b"runs/mine"), "the path is b'runs/mine'"),
    ("a run of nobody", lambda run, to: fasttower.load_run("~nobody-here/run"), "nobody-here"),
    ("an export of no format", lambda run, to: run.export(to / "e", "csv" * 1000), "the format is 'csvcsv"),
    ("an export of a list", lambda run, to: run.export(to / "e", ["csv"]), "the format is "),
    (
        "an update of strangers by number",
        lambda run, to: run.update(ROWS),
        "no type of 64 bits holds together|String",
    ),
]
for text in BAD_TEXT:
    CALLS += [
        (f"save to {text!r}", lambda run, to, text=text: run.save(f"{to}/{text}"), "the path"),
        (f"export to {text!r}", lambda run, to, text=text: run.export(f"{to}/{text}", "numpy"), "the path"),
        (f"load {text!r}", lambda run, to, text=text: fasttower.load_run(text), "the path"),
        (f"columns {text!r}", lambda run, to, text=text: Config(user_column=text), "--user-column is "),
        (f"update {text!r}", lambda run, to, text=text: run.update(text), "the path of the data"),
        (f"evaluate {text!r}", lambda run, to, text=text: run.evaluate(text), "the path of the data"),
    ]


def says(error):
    """The message of an error, which is one line that can be printed."""
    message = str(error)
    assert message.isprintable()
    assert len(message) <= 500
    return message


@pytest.mark.parametrize(("call", "pattern"), [call[1:] for call in CALLS], ids=[call[0] for call in CALLS])
def test_calls(run, tmp_path, call, pattern):
    with pytest.raises(FastTowerError, match=pattern) as error:
        call(run, tmp_path)
    says(error.value)


QUICK = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def mutations(draw):
    """A change of a run's directory: a file's name, and what becomes of its bytes and those of the others."""
    name = draw(st.sampled_from([*FILES, "manifest.json"]))
    kind = draw(st.sampled_from(["flip", "cut", "insert", "remove", "zero", "drop", "of another", "swap"]))
    place, length = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 64))
    other = draw(st.sampled_from([file for file in FILES if file != name]))
    return name, kind, place, length, other


def mutate(folder, mutation):
    """Apply it; returns whether a byte has changed."""
    name, kind, place, length, other = mutation
    path = folder / name
    old = path.read_bytes()
    at = int(place * len(old))
    new = {
        "flip": lambda: old[:at] + bytes([old[at] ^ (1 << length % 8)]) + old[at + 1 :],
        "cut": lambda: old[:at],
        "insert": lambda: old[:at] + bytes(range(length)) + old[at:],
        "remove": lambda: old[:at] + old[at + length :],
        "zero": lambda: old[:at] + bytes(len(old[at : at + length])) + old[at + length :],
        "of another": (folder / other).read_bytes,
        "swap": (folder / other).read_bytes,
    }
    if kind == "drop":
        path.unlink()
        return True
    path.write_bytes(new[kind]())
    if kind == "swap":
        (folder / other).write_bytes(old)
    return path.read_bytes() != old


@QUICK
@given(mutation=mutations())
def test_no_change_of_a_run_goes_unseen(saved, tmp_path_factory, mutation):
    folder = shutil.copytree(saved, tmp_path_factory.mktemp("forged") / "run")
    if not mutate(folder, mutation):
        return
    with pytest.raises(FastTowerError) as error:
        fasttower.load_run(folder)
    says(error.value)


@pytest.mark.slow
@settings(QUICK, max_examples=300)
@given(mutation=mutations())
def test_a_changed_run_that_is_trusted_is_refused_or_works(saved, tmp_path_factory, mutation):
    folder = shutil.copytree(saved, tmp_path_factory.mktemp("forged") / "run")
    mutate(folder, mutation)
    try:
        read = fasttower.load_run(folder, trust_files=True)
        recommended = read.recommend(k=3)  # vectors may be so large that their products are not finite
    except FastTowerError as error:
        says(error)
        return
    assert len(recommended) == 3 * len(read.users)


def test_a_run_may_be_moved_and_copied(run, tmp_path):
    run.save(tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "second[1]")
    shutil.copytree(tmp_path / "second[1]", tmp_path / "third")
    for name in ("second[1]", "third"):
        assert fasttower.load_run(tmp_path / name).recommend(k=3).equals(run.recommend(k=3))
    (tmp_path / "third" / "notes.txt").write_text("files that are not the run's do not matter")
    fasttower.load_run(tmp_path / "third")


def test_the_manifest_is_the_last_file_to_arrive(run, tmp_path, monkeypatch):
    from pathlib import Path

    moved, rename = [], Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: (moved.append(self.name), rename(self, to))[1])
    run.save(tmp_path / "run")
    assert moved[-1] == "manifest.json"
    assert sorted(moved[:-1]) == sorted(FILES)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["format"] == 4
    assert len(manifest["run"]) == 64
    assert set(manifest["files"]) == set(FILES)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**300, 10**301)
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
FIELDS = [field.name for field in dataclasses.fields(Config)]
NAMES = st.sampled_from([*FIELDS, "preset", "format", "device_requested", "backend_requested"]) | st.text(
    max_size=4
)


@settings(QUICK, max_examples=150)
@given(values=st.dictionaries(NAMES, VALUES, max_size=4))
def test_a_configuration_of_anything(values):
    try:
        config = Config.from_json(values)
    except FastTowerError as error:
        says(error)
        return
    text = json.dumps(config.to_json(device="cpu", backend="torch"), allow_nan=False)
    assert Config.from_json(json.loads(text)) == config


def columns(rows):
    kinds = [
        st.integers(-(2**63), 2**63 - 1),
        st.integers(0, 5),
        st.floats(),
        st.text(max_size=3),
        st.none() | st.integers(0, 3),
        st.booleans(),
        st.datetimes(),
        st.lists(st.integers(0, 1), max_size=2),
    ]
    return st.one_of(*(st.lists(kind, min_size=rows, max_size=rows) for kind in kinds))


@st.composite
def frames(draw):
    """Frames of a few rows, whose columns have usual names and any types."""
    rows = draw(st.integers(0, 30))
    names = draw(st.permutations(["user_id", "item_id", "rating", "timestamp", "else"]))
    return pl.DataFrame(
        {name: draw(columns(rows)) for name in names[: draw(st.integers(0, 5))]}, strict=False
    )


@settings(QUICK, max_examples=100)
@given(frame=frames())
def test_a_frame_of_anything_is_read_or_refused(frame):
    try:
        read = read_interactions(frame)
    except FastTowerError as error:
        says(error)
        return
    assert not any(column.null_count() for column in read.frame)
    assert len(read.frame) == len(frame)


@pytest.mark.slow
@settings(QUICK, max_examples=60)
@given(
    frame=frames(),
    split=st.sampled_from(["time", "random", "leave-last"]),
    search=st.sampled_from(["none", "quick"]),
)
def test_a_frame_of_anything_is_trained_on_or_refused(frame, split, search):
    config = dataclasses.replace(CONFIG, epochs=1, split=split, search=search, test_fraction=0.3)
    try:
        run = fasttower.fit(frame, config)
    except FastTowerError as error:
        says(error)
        return
    assert np.isfinite(run.recommendations["score"].to_numpy()).all()


def test_tensors_are_checked_once_for_all(run):
    from fasttower.run.checks import is_rows

    known = run.known_positives
    users, items = len(run.users), len(run.items)
    assert is_rows(known.indptr, known.items, users, items)
    empty = torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
    assert is_rows(*empty, 3, 5)
    one = torch.tensor([0, 0, 1, 1]), torch.tensor([4], dtype=torch.int32)
    assert is_rows(*one, 3, 5)
    assert not is_rows(*one, 3, 4)
    rows = torch.tensor([0, 2, 2, 4]), torch.tensor([3, 4, 0, 1], dtype=torch.int32)
    assert is_rows(*rows, 3, 5)
    assert not is_rows(torch.tensor([0, 3, 3, 4]), rows[1], 3, 5)
