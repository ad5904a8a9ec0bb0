"""numba's cache on disk: what cannot be read is compiled anew, and what anybody may write is not read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")
ROOT = Path(__file__).parent.parent

ADD = """
import sys
sys.path.insert(0, {folder!r})
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from adding import add
    assert add(1, 2) == 3
found = sum(add.stats.cache_hits.values())
print(found, *("anybody" for line in caught if "anybody may write to numba's cache" in str(line.message)))
"""


@pytest.fixture
def add(tmp_path):
    """Compiles a function in a new process; returns the hits of the cache and a word for a warning."""
    source = [
        "from fasttower_kernels.compiled import entry_point",
        "@entry_point",
        "def add(a, b):",
        "  return a + b",
    ]
    (tmp_path / "adding.py").write_text("\n".join(source))

    def run():
        variables = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT / "kernels")}
        code = ADD.format(folder=str(tmp_path))
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | variables,
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.split()

    return run


def files(folder, pattern):
    return list((folder / "cache").rglob(pattern))


@pytest.mark.slow
def test_a_damaged_cache_is_replaced(add, tmp_path):
    assert add() == ["0"]
    assert add() == ["1"]
    for pattern in ("*.nbi", "*.nbc"):  # the index, and the code
        for file in files(tmp_path, pattern):
            file.write_bytes(b"\x80\x04garbage")
        assert add() == ["0"]
    assert add() == ["1"]


@pytest.mark.slow
def test_a_cache_that_anybody_may_write_is_not_read(add, tmp_path):
    add()
    folder = files(tmp_path, "*.nbi")[0].parent
    folder.chmod(0o777)
    for file in files(tmp_path, "*.nb?"):
        file.write_bytes(b"garbage")
    assert add() == ["0", "anybody"]
    assert {file.read_bytes() for file in files(tmp_path, "*.nb?")} == {b"garbage"}
