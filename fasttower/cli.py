"""The command line: `fasttower COMMAND`, its flags made from dataclasses, its errors one line each."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from fasttower import __version__
from fasttower.errors import MESSAGE_LENGTH, FastTowerError, TrainingError, quoted, reason, shown
from fasttower.typed import in_words

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
    return guarded(_dispatch, sys.argv[1:] if arguments is None else arguments)


def script() -> NoReturn:
    """The whole of the process ``fasttower``."""
    end(main())


def end(code: int) -> NoReturn:
    """End the process with an exit code, which a Ctrl-C from here on does not change."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _dispatch(arguments: Sequence[str]) -> int:
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
        raise FastTowerError(
            f"there is no command {quoted(arguments[0])}; the commands are: {', '.join(COMMANDS)}."
        )
    found: int = importlib.import_module(COMMANDS[arguments[0]].module).run(arguments[1:])
    return found


def guarded(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run a command so that bad input ends in one line on stderr and an exit code, never in a traceback."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - until the process ends
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")  # a title in a terminal of another alphabet
    try:
        _check_surroundings(arguments)
        try:
            code = command(list(arguments))
        finally:  # of --help too, which leaves by SystemExit
            sys.stdout.flush()
    except FastTowerError as error:
        is_input = not isinstance(error, TrainingError)
        return fail(str(error), EXIT_BAD_INPUT if is_input else EXIT_TRAINING_FAILED)
    except KeyboardInterrupt:
        return fail("interrupted.", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away: nothing is left to say
        _discard_stdout()
        return 0
    except OSError as error:
        _discard_stdout()
        where = "" if error.filename is None else f" {shown(error.filename)}"
        return fail(f"reading or writing{where} failed: {reason(error)}.")
    except MemoryError as error:
        return fail(
            f"there is not enough memory ({str(error) or 'of the process'}); free some, or take less."
        )
    return code


def _check_surroundings(arguments: Sequence[str]) -> None:
    """Check what libraries would die of, or fill the screen for."""
    for argument in arguments:
        if argument.encode(errors="replace").decode() != argument:
            raise FastTowerError(f"the argument {quoted(argument)} is not UTF-8; write it so, or rename it.")
    threads = os.environ.get("POLARS_MAX_THREADS")
    if threads is not None and not (threads.isascii() and threads.isdigit() and int(threads[:9]) > 0):
        raise FastTowerError(
            f"POLARS_MAX_THREADS is {quoted(threads)}; expected a number of threads, or none."
        )


def _discard_stdout() -> None:
    """Send what is still in the buffer nowhere, so that Python does not complain of it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str, code: int = EXIT_BAD_INPUT) -> int:
    """Print an error's line; returns the exit code."""
    with contextlib.suppress(OSError):  # nobody is there to read it
        sys.stderr.write(f"fasttower: {shown(FastTowerError(message), MESSAGE_LENGTH)}\n")
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
    _check_values(flags, arguments)
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


def _check_values(flags: type[object], arguments: Sequence[str]) -> None:
    """Check the names of flags, and the values of those that take numbers or one of several words.

    tyro's own words for these name Python's types, and the choices in no order.
    """
    hints = get_type_hints(flags, include_extras=True)
    for place, argument in enumerate(arguments):
        name, given, value = argument.partition("=")
        if not name.startswith("--"):
            continue
        field = name.removeprefix("--").replace("-", "_")
        if field not in hints:
            if field.removeprefix("no_") not in hints and field != "help":
                near = get_close_matches(shown(name, 60), [_flag(known) for known in hints], 1, 0.75)
                hint = f"did you mean {near[0]}?" if near else "--help has all."
                raise FastTowerError(f"there is no flag {shown(name, 60)}; {hint}")
            continue
        hint = hints[field]
        if not given:
            if place + 1 == len(arguments):
                continue
            value = arguments[place + 1]
        if not _is_read_as(value, hint):
            raise FastTowerError(f"{name} is {quoted(value)}; expected {in_words(hint)}.")


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _is_read_as(value: str, hint: Any) -> bool:  # noqa: ANN401 - annotations have no type
    """Whether text is what a flag of numbers and choices takes; of other flags nothing is known here."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, UnionType, Annotated):
        return any(_is_read_as(value, part) for part in get_args(hint) if not isinstance(part, str))
    if hint is NoneType:
        return value == "None"
    if hint in (int, float):
        with contextlib.suppress(ValueError):
            return hint(value) is not None
        return False
    return True


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
