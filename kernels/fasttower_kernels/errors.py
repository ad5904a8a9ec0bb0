"""The one family of errors that fasttower raises on purpose, and how names are shown in them."""

import os
import re
from collections.abc import Iterable

NAME_LENGTH, MESSAGE_LENGTH = 200, 500
"""Characters of a name in a message, and of a whole message; what is longer is cut in its middle."""


class FastTowerError(Exception):
    """Bad input, a bad flag, or something that this machine cannot do.

    The message is one line of at most 500 characters: what was found, what was expected, what to do. The
    command line prints it without a traceback and exits with 2.
    """

    def __init__(self, message: str) -> None:
        # Line ends come from libraries; a name has none after `shown`.
        super().__init__(shown(re.sub(r"\s*[\r\n]+\s*", " ", message[: 1 << 16].strip()), MESSAGE_LENGTH))


class TrainingError(FastTowerError):
    """Training itself went wrong (a loss that is not finite); the command line exits with 3."""


def shown(value: object, length: int = NAME_LENGTH) -> str:
    """A name or a value for a message: control characters as escapes, the middle left out of long ones.

    Args:
        value: what is shown as its text.
        length: characters that it may take.
    """
    try:
        text = str(value)
    except ValueError:  # Python prints whole numbers up to some thousand digits
        text = "a number of thousands of digits"
    ends = text if len(text) <= 2 * length else text[:length] + text[-length:]  # no more of it is seen
    if not ends.isprintable():
        ends = "".join(
            letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in ends
        )
    if max(len(text), len(ends)) <= length:
        return ends
    end = (length - 5) // 2
    return f"{ends[: length - 5 - end]} ... {ends[-end:]}"


def quoted(value: object, length: int = NAME_LENGTH) -> str:
    """A value for a message as Python writes it, text in quotes; see `shown`."""
    return shown(repr(value) if isinstance(value, str | bytes | os.PathLike) else value, length)


def reason(error: BaseException) -> str:
    """What an error of the system or of a library says, for a message that names the file itself."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shown(text.strip().split("\n", maxsplit=1)[0].rstrip(".") or type(error).__name__)


def listed(names: Iterable[object], most: int = 10) -> str:
    """Names for a message, between commas; of many the first, and how many more there are."""
    found = list(names)
    text = ", ".join(shown(name, 60) for name in found[:most])
    return text if len(found) <= most else f"{text} and {len(found) - most:,} more"
