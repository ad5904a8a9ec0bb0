"""JSON that comes from outside: read by one reader, which takes what JSON's standard says and no more."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fasttower.errors import quoted, shown
from fasttower.files import open_regular

MOST_BYTES = 1 << 26
"""A history of some hundred thousand epochs."""

_MOST_DIGITS = 20  # of the integers of 64 bits


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        FastTowerError: not a regular file, or larger than 64 MiB.
        ValueError: no JSON, or not an object; numbers that are not finite or past 64 bits, names that are
            there twice, text that is not UTF-8.
        OSError: it is not there, or cannot be read.
    """
    with open_regular(path, most_bytes=MOST_BYTES) as file:
        return parse_object(file.read())


def parse_object(data: bytes) -> dict[str, Any]:
    """The object that some JSON holds; raises ValueError as `read_object` does."""
    try:
        text = data.decode("utf-8-sig")
        values = json.loads(
            text,
            parse_constant=_refuse,
            parse_int=_integer,
            parse_float=_float,
            object_pairs_hook=_object,
        )
        if "\\u" in text:
            json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeError:
        raise ValueError("it is not UTF-8") from None
    if not isinstance(values, dict):
        raise ValueError(f"it holds {_KINDS.get(type(values), 'a number')}, not an object")  # noqa: TRY004
    return values


def write_object(path: Path, values: Mapping[str, object]) -> None:
    """Write an object as people read it."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


_KINDS: dict[type, str] = {list: "a list", str: "text", bool: "true or false", type(None): "null"}


def _refuse(number: str) -> float:
    raise ValueError(f"it holds {number}, which is no number of JSON")


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"it holds a number of {len(digits):,} digits")
    number = int(digits)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"it holds {digits}, which is past 64 bits")
    return number


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"it holds {shown(digits, 40)}, which is too large a number")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {quoted(twice, 60)} twice")
    return found
