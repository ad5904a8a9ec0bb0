"""How what came from outside is shown in messages, and read from JSON."""

from dataclasses import dataclass
from typing import Annotated, Literal, NotRequired, TypedDict

import pytest

from fasttower import FastTowerError
from fasttower.console import literal
from fasttower.errors import listed, quoted, reason, shown
from fasttower.json_files import parse_object
from fasttower.typed import check_typed, in_words, is_of


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain [text] é漢", "plain [text] é漢"),
        ("a\x1b[31m\r\n\0", "a\\x1b[31m\\r\\n\\x00"),
        ("\u202e\udcff", "\\u202e\\udcff"),
        ("x" * 200, "x" * 200),
        (10**5000, "a number of thousands of digits"),
        (None, "None"),
    ],
    ids=["plain", "controls", "turned and halved", "just short", "digits", "None"],
)
def test_shown(value, text):
    assert shown(value) == text


def test_the_middle_of_what_is_long_is_left_out():
    name = "begin" + "x" * 1000 + "end"
    assert shown(name, 20) == "beginxxx ... xxxxend"
    assert len(shown(name, 21)) == 21
    assert len(shown("\n" * 150)) == 200  # the escapes count
    assert shown("/a/" + "b" * 30_000_000 + ".csv").endswith("b.csv")


def test_quoted_and_listed():
    assert quoted("a\n") == "'a\\n'"
    assert quoted(7) == "7"
    assert listed(["a", "b"]) == "a, b"
    assert listed(range(1000), 3) == "0, 1, 2 and 997 more"


def test_an_error_is_one_line():
    message = str(FastTowerError("first\n  second \x1b " + "x" * 1000 + " last"))
    assert message.startswith("first second \\x1b xxx")
    assert message.endswith("xxx last")
    assert len(message) == 500


def test_the_reason_of_an_error():
    assert (
        reason(FileNotFoundError(2, "No such file or directory", "x" * 1000)) == "No such file or directory"
    )
    assert reason(ValueError("first.\nsecond")) == "first"
    assert reason(MemoryError()) == "MemoryError"


def test_what_is_shown_on_a_terminal():
    assert literal("[bold]x[/]\x1b[31m") == "\\[bold]x\\[/]\\x1b[31m"


def test_json():
    assert parse_object(b'\xef\xbb\xbf{"a": [1, -2.5e3, "\\ud83d\\ude00", null]}') == {
        "a": [1, -2500, "😀", None]
    }
    assert parse_object(b'{"a": 18446744073709551615}') == {"a": 2**64 - 1}


class Inner(TypedDict):
    count: int
    note: NotRequired[str | None]


@dataclass
class Outer:
    inner: list[Inner]
    by_name: dict[str, float | None]
    kind: Literal["a", "b"] | Annotated[float, "seconds"]


GOOD = {
    "inner": [{"count": 1}, {"count": 2, "note": None, "more": []}],
    "by_name": {"x": 1, "y": None},
    "kind": "a",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"kind": 1.5}, None),
        ({"kind": "c"}, "it.kind is 'c'; expected a, b or seconds"),
        ({"kind": True}, "it.kind is True; expected a, b or seconds"),
        ({"kind": []}, r"it.kind is \[\]"),
        ({"inner": {}}, "it.inner is {}; expected a list"),
        ({"inner": [1]}, r"it.inner\[0\] is 1; expected an object"),
        ({"inner": [{}]}, r"it.inner\[0\] lacks count"),
        ({"inner": [{"count": True}]}, r"it.inner\[0\].count is True; expected a whole number"),
        ({"inner": [{"count": 1, "note": 1}]}, "note is 1; expected text"),
        ({"by_name": {"x": "1"}}, "it.by_name.x is '1'; expected a number"),
        ({"by_name": {"x": 10**400}}, "it.by_name.x is 1000"),
        ({"by_name": []}, r"it.by_name is \[\]; expected an object"),
        ({"more": 1}, "it has a field 'more' too many"),
    ],
)
def test_types(change, message):
    if message is None:
        check_typed(GOOD | change, Outer, "it")
        return
    with pytest.raises(ValueError, match=message):
        check_typed(GOOD | change, Outer, "it")


def test_words():
    assert in_words(Literal["a", "b"] | None) == "one of a, b"
    assert in_words(int | None) == "a whole number"
    assert is_of(None, int | None)
    assert not is_of(True, int | None)
    assert not is_of(["a"], Literal["a"])
