"""Files of results, to which several processes may add."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

from fasttower.versions import versions


def keep(file: Path, protocol: str, name: str, row: Any) -> dict[str, Any]:
    """Put a row in the place of the one of that name, in a file that may not be there yet.

    Returns:
        All that the file holds then: the versions, and by protocol and name the rows.
    """
    used = versions()
    with file.open("a+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # until the file is closed
        stream.seek(0)
        kept = json.loads(stream.read() or '{"data": {}}')
        kept["versions"] = used
        kept["data"].setdefault(protocol, {})[name] = row
        stream.truncate(0)
        stream.write(json.dumps(kept, indent=1) + "\n")
    return kept


def read(file: Path) -> dict[str, Any]:
    """All that a file holds; nothing where there is none."""
    return json.loads(file.read_text()) if file.exists() else {"data": {}}
