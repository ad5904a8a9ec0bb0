"""The terminal."""

from __future__ import annotations

import os
import sys

import rich.console
from rich.markup import escape

from fasttower.errors import shown


class Console(rich.console.Console):
    """A console that falls silent when its reader goes away.

    Args:
        stderr: write there instead of to stdout.
        quiet: write nothing.
        wide: leave lines as long as they are.
    """

    def __init__(self, *, stderr: bool = False, quiet: bool = False, wide: bool = False) -> None:
        super().__init__(stderr=stderr, quiet=quiet, soft_wrap=wide, highlight=False, emoji=False)

    def on_broken_pipe(self) -> None:
        """Show nothing more."""
        self.quiet = True
        stream = sys.stderr if self.stderr else sys.stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def literal(value: object) -> str:
    """What came from outside, for the terminal: its brackets are no markup, its escapes are visible."""
    return escape(shown(value, 1 << 20))


def counted_noun(count: int, noun: str) -> str:
    """A count and its noun: "1 epoch", "2 epochs", "1,000 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
