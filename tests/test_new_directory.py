"""A directory that comes about: one writer, and nothing of a killed one in the way."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fasttower import FastTowerError
from fasttower.run.new_directory import all_or_nothing, reserved

ROOT = Path(__file__).parent.parent


def test_a_directory_is_kept_for_one(tmp_path):
    path = tmp_path / "runs" / "mine"
    with reserved(path) as made:
        assert made == path
        with pytest.raises(FastTowerError, match="mine is in use") as error, reserved(path):
            pass
        assert "\n" not in str(error.value)
    assert not list(path.iterdir())
    with reserved(path):  # it is there and empty
        pass
    assert path.exists()


@pytest.mark.parametrize("exists", [False, True])
def test_a_block_that_fails_leaves_what_was_there(tmp_path, exists):
    path = tmp_path / "mine"
    if exists:
        path.mkdir()
    with pytest.raises(ZeroDivisionError), reserved(path):
        raise ZeroDivisionError
    assert path.exists() == exists
    assert not exists or not list(path.iterdir())


def test_a_name_that_is_taken_gets_a_number(tmp_path):
    with (
        reserved(tmp_path / "r.1", numbered=True) as first,
        reserved(tmp_path / "r.1", numbered=True) as second,
    ):
        assert (first.name, second.name) == ("r.1", "r.1-2")
    with reserved(tmp_path / "r.1", numbered=True) as third:
        assert third.name == "r.1-3"
    (file := tmp_path / "file").touch()
    with pytest.raises(FastTowerError, match="cannot be written"), reserved(file / "r", numbered=True):
        pass


def test_who_waited_for_a_lock_that_was_taken_away_does_not_get_it(tmp_path, monkeypatch):
    from fasttower.run import new_directory

    original = new_directory._lock

    def lock_late(file):
        (tmp_path / ".lock").unlink()  # as its owner did in the meantime
        original(file)

    monkeypatch.setattr(new_directory, "_lock", lock_late)
    with pytest.raises(FastTowerError, match="in use"), reserved(tmp_path):
        pass


def test_what_a_killed_process_left_is_no_content(tmp_path):
    code = f"""
import os, pathlib, signal
from fasttower.run.new_directory import all_or_nothing, reserved
path = pathlib.Path({str(tmp_path)!r})
with reserved(path), all_or_nothing(path) as folder:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    with reserved(tmp_path), all_or_nothing(tmp_path) as folder:
        (folder / "whole").write_text("whole")
    assert [file.name for file in tmp_path.iterdir()] == ["whole"]
    with pytest.raises(FastTowerError, match="not empty"), reserved(tmp_path):
        pass
