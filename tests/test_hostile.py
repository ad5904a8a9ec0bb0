"""Whatever a command is given, it ends in time, with its exit code and one line on stderr."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_cases import CASES, SURROUNDINGS, Place

from fasttower.cli import main

ROOT = Path(__file__).parent.parent
SECONDS = 60


def texts(arguments):
    return [str(argument) for argument in arguments]


def check(case, code, err):
    """One line of at most 500 characters that says what the case expects, and no other."""
    if case.says is None:
        assert (code, err) == (0, "")
        return
    assert code == case.code, err[-2000:]
    assert re.fullmatch(r"fasttower: [^\n]{1,500}\n", err), err[-2000:]
    assert err.rstrip("\n").isprintable()
    assert re.search(case.says, err), err


def test_there_are_enough():
    assert len(CASES) >= 300
    assert sum(case.quick for case in CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.fixture
def alarm():
    """An error after some seconds: a command that hangs is to fail."""

    def ring(signum, frame):
        raise TimeoutError("the command did not end")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("case", [case for case in CASES if case.quick], ids=lambda case: case.name)
def test_in_this_process(case, saved, tmp_path, monkeypatch, capsys, alarm):
    monkeypatch.chdir(tmp_path)
    code = main(texts(case.make(Place(tmp_path, saved))))
    printed = capsys.readouterr()
    check(case, code, printed.err)
    assert case.says is None or printed.out == ""


@pytest.fixture(scope="module")
def server():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    with subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "hostile_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    ) as process:
        yield process
        process.stdin.close()


def answer(server, arguments, folder):
    arguments = [os.fsencode(text).decode("latin-1") for text in texts(arguments)]
    request = {"arguments": arguments, "folder": str(folder), "seconds": SECONDS}
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_in_a_process_of_its_own(case, server, saved, tmp_path):
    found = answer(server, case.make(Place(tmp_path, saved)), tmp_path)
    assert found["code"] is not None, "it did not end"
    check(case, found["code"], found["err"])
    assert case.says is None or found["out"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("case", SURROUNDINGS, ids=lambda case: case.name)
def test_in_its_surroundings(case, saved, tmp_path):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    variables = {name: value.format(folder=tmp_path) for name, value in case.variables.items()}
    done = subprocess.run(
        [
            "sh",
            "-c",
            case.shell,
            "sh",
            sys.executable,
            "-m",
            "fasttower",
            *texts(case.make(Place(tmp_path, saved))),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths} | variables,
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    check(case, done.returncode, done.stderr.decode(errors="replace"))


def test_ctrl_c_at_the_very_end_changes_nothing():
    code = """
import atexit, os, signal
from fasttower.cli import end
atexit.register(os.kill, os.getpid(), signal.SIGINT)
end(3)
"""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (3, b"")
