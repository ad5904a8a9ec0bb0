"""The command line: `fasttower COMMAND`, its flags made from dataclasses, its errors one line each."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tyro

from fasttower import __version__
from fasttower.errors import FastTowerError, TrainingError

Flags = TypeVar("Flags")


@dataclass(frozen=True)
class Command:
    """A command: what the usage says of it, and the module whose ``run(arguments)`` returns the exit code."""

    text: str
    module: str


# A module is imported only when its command is called.
COMMANDS = {
    "train": Command("train on interactions, recommend to the users trained on, evaluate", "fasttower.train"),
    "tune": Command("search for better settings for longer, with optuna", "fasttower.commands.tune"),
    "recommend": Command(
        "recommend from a run, to some users, all, or new ones", "fasttower.commands.recommend"
    ),
    "similar": Command("items or users alike", "fasttower.commands.similar"),
    "evaluate": Command("measure a run against interactions that came later", "fasttower.commands.evaluate"),
    "export": Command("write the vectors for faiss, hnswlib, numpy or parquet", "fasttower.commands.export"),
    "info": Command("what a run is, and how good", "fasttower.commands.info"),
}

EXIT_BAD_INPUT, EXIT_TRAINING_FAILED, EXIT_INTERRUPTED = 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--version"]:
        _say(f"fasttower {__version__}")
        return 0
    usage = "usage: fasttower COMMAND [--help]\n\n" + "".join(
        f"  {name:12s}{command.text}\n" for name, command in COMMANDS.items()
    )
    if arguments[:1] in ([], ["--help"], ["-h"]):
        _say(usage)
        return 0 if arguments else EXIT_BAD_INPUT
    if arguments[0] not in COMMANDS:
        return fail(f"there is no command {arguments[0]!r}; the commands are: {', '.join(COMMANDS)}.")
    command = COMMANDS[arguments[0]]
    return guarded(lambda rest: importlib.import_module(command.module).run(rest), arguments[1:])


def guarded(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run a command so that bad input ends in one line on stderr and an exit code, never in a traceback."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - until the process ends
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")  # a title in a terminal of another alphabet
    try:
        code = command(arguments)
        sys.stdout.flush()
    except TrainingError as error:
        return fail(str(error), EXIT_TRAINING_FAILED)
    except FastTowerError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return fail("interrupted.", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away: nothing is left to say
        _discard_stdout()
        return 0
    except OSError as error:
        _discard_stdout()
        return fail(f"reading or writing failed: {error}.")
    return code


def _discard_stdout() -> None:
    """Send what is still in the buffer nowhere, so that Python does not complain of it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str, code: int = EXIT_BAD_INPUT) -> int:
    """Print an error's line; returns the exit code."""
    sys.stderr.write(f"fasttower: {' '.join(message.split())}\n")
    return code


def parse(
    flags: type[Flags],
    arguments: Sequence[str],
    *,
    prog: str,
    description: str,
    default: Flags | None = None,
) -> Flags:
    """Read flags into a dataclass; the fields' own defaults count where no other is given.

    Raises:
        FastTowerError: an unknown flag or a value of the wrong type, in one line.
        SystemExit: with 0, after ``--help``.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            found: Flags | None = tyro.cli(
                flags, args=list(arguments), prog=prog, default=default, description=description
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise FastTowerError(_first_paragraph(printed.getvalue())) from None
    assert found is not None  # tyro's types allow for a default of None
    return found


def _first_paragraph(box: str) -> str:
    """The message of tyro's error: what stands behind its title, up to the next rule.

    tyro draws a box around it where the terminal has the characters, and rules of dashes where it has not.
    """
    lines: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip("│╭╮╰╯ ")
        is_rule = bool(text) and set(text) <= {"─", "-"}
        if is_rule and lines:
            break
        if text and not is_rule:
            lines.append(text)
    return " ".join(lines) or box.strip() or "the flags could not be read; see --help."


def _say(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")
