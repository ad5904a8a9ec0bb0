"""The family of errors, under the name that users of the library import."""

import operator
from typing import Any

from fasttower_kernels.errors import FastTowerError, TrainingError

__all__ = ["FastTowerError", "TrainingError", "whole_number"]


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
        raise FastTowerError(f"{name} is {value!r}; expected a whole number, 1 or more.")
    return number
