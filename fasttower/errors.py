"""The family of errors, under the name that users of the library import."""

import operator
from typing import Any

from fasttower_kernels.errors import (
    MESSAGE_LENGTH,
    FastTowerError,
    TrainingError,
    listed,
    quoted,
    reason,
    shown,
)

__all__ = [
    "MESSAGE_LENGTH",
    "FastTowerError",
    "TrainingError",
    "listed",
    "quoted",
    "reason",
    "shown",
    "whole_number",
]


def whole_number(name: str, value: Any) -> int:  # noqa: ANN401 - what it is, is looked at here
    """An argument as a Python integer of at least 1; numpy's integers are some too.

    Raises:
        FastTowerError: it is none.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < 1:
        raise FastTowerError(f"{name} is {quoted(value)}; expected a whole number, 1 or more.")
    return number
