"""`fasttower export`: a run's vectors for other software."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fasttower.cli import parse
from fasttower.commands.inputs import RunFlags
from fasttower.commands.output import say
from fasttower.json_files import read_object
from fasttower.run.export import Format

DESCRIPTION = (
    "Write the vectors, the item bias as one more dimension: the inner product is the score.\n\n"
    "Example: fasttower export runs/mine --to index --format faiss"
)


@dataclass(frozen=True, kw_only=True)
class Flags(RunFlags):
    """What to write, and where."""

    to: Path
    """The folder to write to; one that is not empty is refused."""
    format: Format = "parquet"
    """faiss: a flat index; hnswlib: a graph; numpy: .npy arrays; parquet: ids and vectors."""


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(Flags, arguments, prog="fasttower export", description=DESCRIPTION)
    for path in flags.load().export(flags.to, flags.format):
        say(f"{path}  {path.stat().st_size:,} bytes")
    about = read_object(flags.to / "about.json")
    for name in about:
        if name.startswith("recall"):
            say(f"{name} {about[name]:.4f} of the exact ranking, with set_ef({about['ef']})")
    return 0
