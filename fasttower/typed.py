"""Whether a value is of an annotated type, and the type in words."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import NoneType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from fasttower.errors import quoted, shown


def check_typed(value: object, hint: Any, name: str) -> None:  # noqa: ANN401 - annotations have no type
    """Check a value that came from JSON, and what it holds, against an annotation.

    Args:
        value: of numbers, text, lists and objects.
        hint: a class, Literal, union, list, dict with text as its keys, TypedDict, or the dataclass to be
            made of an object's fields. An object may hold more than a TypedDict names.
        name: of the value, for messages.

    Raises:
        ValueError: what is wrong, and where.
    """
    if is_typeddict(hint) or dataclasses.is_dataclass(hint):
        _check_fields(value, hint, name)
    elif get_origin(hint) is list and isinstance(value, list):
        for place, part in enumerate(value):
            check_typed(part, get_args(hint)[0], f"{name}[{place}]")
    elif get_origin(hint) is dict and isinstance(value, dict):
        for key, part in value.items():
            check_typed(part, get_args(hint)[1], f"{name}.{shown(key, 60)}")
    elif not is_of(value, hint):
        raise ValueError(f"{name} is {quoted(value, 60)}; expected {in_words(hint)}")


def _check_fields(value: object, hint: Any, name: str) -> None:  # noqa: ANN401
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {quoted(value, 60)}; expected an object")  # noqa: TRY004
    hints = get_type_hints(hint, include_extras=True)
    if dataclasses.is_dataclass(hint) and (extra := next((key for key in value if key not in hints), None)):
        raise ValueError(f"{name} has a field {quoted(extra, 60)} too many")
    for field, kind in hints.items():
        optional = get_origin(kind) is NotRequired
        if field in value:
            check_typed(value[field], get_args(kind)[0] if optional else kind, f"{name}.{field}")
        elif not optional:
            raise ValueError(f"{name} lacks {field}")


def is_of(value: object, hint: Any) -> bool:  # noqa: ANN401
    """Whether a value is of a class, a Literal, or one of a union of them."""
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) in (list, dict):
        return False
    if get_args(hint):  # a union's, or what is annotated
        return any(is_of(value, part) for part in get_args(hint) if not isinstance(part, str))
    if isinstance(value, bool):  # an int to Python, and not to anybody else
        return hint is bool
    if hint is float:
        return isinstance(value, float) or (isinstance(value, int) and abs(value) <= sys.float_info.max)
    return isinstance(value, hint)


def in_words(hint: Any) -> str:  # noqa: ANN401
    """What a value of an annotation is, for a message: choices in their order, None left out."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if get_origin(hint) is Annotated:
        return str(get_args(hint)[1])
    if get_origin(hint) in (list, dict):
        return "a list" if get_origin(hint) is list else "an object"
    if parts := [part for part in get_args(hint) if part is not NoneType]:
        words = [in_words(part) for part in parts]
        # "one of a or b or a number" would be choices of choices.
        return " or ".join(words) if len(words) == 1 else " or ".join(words).removeprefix("one of ")
    known = {
        int: "a whole number",
        float: "a number",
        str: "text",
        Path: "a path",
        bool: "true or false",
        dict: "an object",
    }
    return known.get(hint, hint.__name__)
