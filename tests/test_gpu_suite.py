"""The GPU suite where there is no GPU: what it imports, what stages leave, and what it makes of a log."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fasttower.data.synthetic import Shape, generate_shape
from fasttower.device import cpu_threads
from fasttower_kernels.known_positives import KnownPositives

pytest.importorskip("triton")

from benchmarks.gpu import suite
from benchmarks.gpu.data import draw_shape
from benchmarks.gpu.results import Results
from benchmarks.gpu.sanitizer import judge

ROOT = Path(__file__).parent.parent
STAND_IN = Path(__file__).parent / "gpu_stand_in.py"

# What a GPU machine has: these and what they require; see `benchmarks/gpu_suite.sh`.
INSTALLED_THERE = ["torch", "triton", "numpy", "numba", "pytest", "pytest-benchmark", "pytest-xdist"]
OURS = ["fasttower", "fasttower_kernels", "benchmarks"]

# Everything else cannot be found, nor can its plugins. Run when an interpreter starts.
ONLY_INSTALLED_THERE = """
import re
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Only:
    @staticmethod
    def find_spec(name, path=None, target=None):
        there = name.partition(".")[0] in {modules!r} or name.startswith("_sysconfigdata_")
        return PathFinder.find_spec(name, path, target) if there else None

    @staticmethod
    def find_distributions(*context):
        found = PathFinder.find_distributions(*context)
        return (each for each in found if re.sub("[-_.]+", "-", each.name).lower() in {distributions!r})

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Only]
"""

# Imports whatever an import statement of these files names, also one within a function.
IMPORT_ALL = """
import ast, importlib, pathlib, sys
for file in [*pathlib.Path("benchmarks/gpu").glob("*.py"), *pathlib.Path("tests/gpu").glob("*.py")]:
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            importlib.import_module(name)
    if file.parts[0] == "benchmarks":
        importlib.import_module("benchmarks.gpu." + file.stem)
"""

COLLECT = """
import sys, pytest, torch
torch.cuda.is_available = lambda: True
sys.exit(pytest.main(["tests/gpu", "--collect-only", "-n", "0", "-p", "no:cacheprovider"]))
"""


def canonical(name):
    return re.sub("[-_.]+", "-", name).lower()


def with_requirements(names):
    """Distributions and all that they require here."""
    found, waiting = set(), list(names)
    while waiting:
        name = canonical(waiting.pop())
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or Python
        if name not in found:
            found.add(name)
            waiting += [re.match(r"[\w.-]+", line)[0] for line in requirements if "extra ==" not in line]
    return found


@pytest.fixture(scope="session")
def gpu_machine(tmp_path_factory):
    """The environment of an interpreter that finds only what a GPU machine has."""
    folder = tmp_path_factory.mktemp("gpu_machine")
    distributions = with_requirements(INSTALLED_THERE)
    modules = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if distributions & {canonical(owner) for owner in owners}
    }
    ours = {*OURS, *(file.stem for file in (ROOT / "tests").rglob("*.py"))}
    code = ONLY_INSTALLED_THERE.format(
        modules=modules | ours | set(sys.stdlib_module_names), distributions=distributions
    )
    (folder / "sitecustomize.py").write_text(code)
    paths = [str(folder), str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHON": sys.executable}


def python(environment, code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def run_suite(folder, **environment):
    return subprocess.run(
        [str(ROOT / "benchmarks" / "gpu_suite.sh"), str(folder)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_is_not_there_is_not_found(gpu_machine):
    for name in ("polars", "hypothesis", "rich"):
        assert f"No module named '{name}'" in python(gpu_machine, f"import {name}").stderr


def test_gpu_tests_are_collected_where_only_torch_and_its_like_are(gpu_machine):
    done = python(gpu_machine, COLLECT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "skipped" not in done.stdout
    for file in (ROOT / "tests" / "gpu").glob("test_*.py"):
        assert file.name in done.stdout


def test_the_suite_imports_only_torch_and_its_like(gpu_machine):
    code = f"import torch\ntorch.cuda.is_available = lambda: True\n{IMPORT_ALL}"
    done = python(gpu_machine, code)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(gpu_machine, tmp_path):
    done = run_suite(tmp_path / "results", **gpu_machine)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"gpu_suite: no GPU on this machine \(.*\): nothing was .*\n", done.stderr)
    assert not (tmp_path / "results").exists()


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A path where everything that a stage runs is the stand-in."""
    for name in ("ncu", "stand-in"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).symlink_to(STAND_IN)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "bin"


def test_a_suite_that_passes_leaves_every_file(stand_ins, tmp_path):
    done = run_suite(tmp_path / "results", PYTHON=str(stand_ins / "stand-in"))
    assert done.returncode == 0, done.stdout + done.stderr
    files = {file.name for file in (tmp_path / "results").iterdir()}
    assert files == {*suite.FILES, suite.LOG}
    assert len(files) <= 8
    assert all(re.fullmatch(r"[\w.-]+", name) for name in files)
    assert (tmp_path / "results" / "step.json").read_text() == "step\nstep_1m\n"


@pytest.mark.parametrize("stage", ["tests", "step", "ncu", "sanitizer", "step_1m"])
@pytest.mark.parametrize(
    ("fate", "ending"),
    [("fail", "failed: exit code 3"), ("crash", "crashed: SIGSEGV"), ("hang", "stopped after 1 s")],
)
def test_a_stage_stops_no_other(stand_ins, tmp_path, monkeypatch, stage, fate, ending):
    monkeypatch.setenv("GPU_STAND_IN", f"{stage}={fate}")
    monkeypatch.setattr(suite, "GRACE_S", 0.2)
    folder = tmp_path / "results"
    stages = suite.stages(folder, str(stand_ins / "stand-in"))
    if fate == "hang":
        stages = [replace(each, limit_s=1) if each.name == stage else each for each in stages]
    endings = suite.run_stages(stages, folder)
    assert endings == {each.name: ending if each.name == stage else "passed" for each in stages}
    assert {file.name for file in folder.iterdir()} == {*suite.FILES, suite.LOG}
    assert f"{stage}: {ending}\n" in (folder / suite.LOG).read_text()


def test_the_exit_code_tells_of_a_failed_stage(stand_ins, tmp_path):
    done = run_suite(tmp_path / "results", PYTHON=str(stand_ins / "stand-in"), GPU_STAND_IN="training=fail")
    assert done.returncode == 1
    assert "training: failed: exit code 3\n" in done.stdout


def test_files_of_an_earlier_run_go_and_others_stay(tmp_path):
    for name in ("step.json", "notes.txt"):
        (tmp_path / name).write_text("before")
    assert suite.run_stages([], tmp_path) == {}
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", suite.LOG}


def test_no_stage_begins_once_time_is_up(tmp_path):
    quick = suite.Stage("quick", [sys.executable, "-c", ""], 10)
    slow = suite.Stage("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 60)
    endings = suite.run_stages([quick, slow, quick], tmp_path, limit_s=2)
    assert endings["slow"].startswith("stopped after")
    assert endings["quick"] == "left out: no time was left"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_stage_started_ends_with_it(tmp_path):
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid)"
    suite.run_stages([suite.Stage("parent", [sys.executable, "-c", code], 10)], tmp_path)
    child = int((tmp_path / suite.LOG).read_text().splitlines()[1])
    end = time.monotonic() + 10  # it was sent the signal, and may still have to die of it
    while is_running(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_running(child)


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_tests_that_are_stopped_leave_their_results(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import time\ndef test_quick(): pass\ndef test_other(): pass\ndef test_slow(): time.sleep(60)\n"
    )
    xml = tmp_path / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(tmp_path),
        "-n",
        "2",
        "-c",
        os.devnull,
        f"--junitxml={xml}",
    ]
    suite.run_stages([suite.Stage("tests", command, 8)], tmp_path / "results")
    assert xml.exists(), (tmp_path / "results" / suite.LOG).read_text()
    assert 'name="test_quick"' in xml.read_text()


def test_results_are_whole_after_each_row(tmp_path):
    results = Results(tmp_path / "step.json")
    results.add(way="one", seconds=1.5)
    assert json.loads((tmp_path / "step.json").read_text())["rows"] == [{"way": "one", "seconds": 1.5}]
    assert not results.failed
    later = Results(tmp_path / "step.json")
    later.add(way="two", error="out of memory")
    content = json.loads((tmp_path / "step.json").read_text())
    assert [row["way"] for row in content["rows"]] == ["one", "two"]
    assert content["about"]["torch"] == torch.__version__
    assert later.failed
    assert [file.name for file in tmp_path.iterdir()] == ["step.json"]


FOUND = """========= COMPUTE-SANITIZER
done: dim 64, first
========= Invalid __global__ write of size 4 bytes
=========     at adam_kernel+0x1230 in triton_gpu.py:90
=========     by thread (3,0,0) in block (1,0,0)
=========     Address 0x7f00 is out of bounds
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0x70 in void at::native::sum<float>(float *)
"""
CLEAN = "========= COMPUTE-SANITIZER\ndone: dim 64, first\n"
SUMMARY = "========= ERROR SUMMARY: {} error{}\n"


@pytest.mark.parametrize(
    ("log", "code", "errors", "failed"),
    [
        (CLEAN + SUMMARY.format(0, "s"), 0, 0, False),
        (CLEAN, None, 0, False),  # time ran out, and nothing was found until then
        (FOUND, None, 2, True),  # time ran out, and the log has errors
        (FOUND + SUMMARY.format(2, "s"), 9, 2, True),
        (CLEAN + SUMMARY.format(1, ""), 9, 1, True),  # a kind of error that is not known by name
        (CLEAN + "Segmentation fault\n", 139, 0, True),
        ("========= COMPUTE-SANITIZER\n", None, 0, True),  # nothing was looked at
        ("========= Error: Device not supported\n", 1, 0, True),
    ],
)
def test_a_log_is_read_however_it_ends(log, code, errors, failed):
    row = judge(log, code)
    assert row["errors"] == errors
    assert ("error" in row) == failed
    assert row["stopped"] == (code is None)


def test_errors_are_counted_by_kernel():
    assert judge(FOUND, 9)["kernels"] == {"adam_kernel": 1, "at::native::sum": 1}


def test_drawn_positives_have_the_shape_and_the_skew():
    shape = Shape(users=300, items=200, ratings=9_000, min_ratings=5, popularity_offset=0.1)
    drawn = draw_shape("small", shape, torch.device("cpu"))
    users, items = drawn.interactions.user_index, drawn.interactions.item_index
    assert len(users) == 9_000
    assert int(drawn.known.degrees.min()) >= 5
    again = KnownPositives.from_pairs(users, items, 300, 200)  # sorted, and without repeats
    assert again.items.equal(drawn.known.items)
    assert again.indptr.equal(drawn.known.indptr)
    popular = torch.bincount(items, minlength=200).sort(descending=True).values
    assert int(popular[:20].sum()) > 0.4 * 9_000
    busy = drawn.known.degrees.sort(descending=True).values
    assert int(busy[:30].sum()) > 0.25 * 9_000


@pytest.fixture
def one_thread():
    with cpu_threads(1):
        yield


@pytest.mark.usefixtures("one_thread")
def test_training_is_compared(tmp_path, monkeypatch):
    pytest.importorskip("numba")
    from benchmarks.gpu import training

    shape = Shape(users=300, items=100, ratings=6_000, min_ratings=10)
    monkeypatch.setattr(training, "generate", lambda name, seed: generate_shape(shape, seed))
    results = Results(tmp_path / "training.json")
    split = training.Split.of("small")
    config = replace(training.CONFIG, epochs=2, embedding_dim=4, batch_size=512)
    training.compare_backends(results, split, config, device="cpu", backend="torch")
    assert not results.failed
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    repeated = next(row for row in rows if row.get("compared") == "torch deterministic, twice")
    assert repeated["relative difference"] == 0
    assert all(row["test_ndcg"] > 0.05 for row in rows if "way" in row)
    monkeypatch.setattr(training, "LOSS_BOUND", 0)
    one, other = (
        training.Comparison(results, split, replace(config, seed=seed)).train("torch", "cpu", backend="torch")
        for seed in (0, 1)
    )
    training.Comparison(results, split, config).compare("two seeds", one, other, bit_for_bit=True)
    assert results.failed
