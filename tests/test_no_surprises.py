"""What the package never does: run what it reads, start other programs, or use the network but for data."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "fasttower").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# Modules that run what they read, start programs, or talk to others.
MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "yaml", "subprocess", "multiprocessing", "socket"}
MODULES |= {"urllib", "http", "requests", "ftplib", "smtplib", "code", "runpy", "pty", "ctypes", "cffi"}
CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "execv", "execvp", "spawnv", "startfile"}

ALLOWED = {
    ("fasttower/data/catalog.py", "pooch"),  # the download of a named set, checked by its hash
}


def uses(path):
    """What a source uses of the above, by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in CALLS:
                yield f"{function.id}()"
            elif isinstance(function, ast.Attribute):
                of = function.value.id if isinstance(function.value, ast.Name) else ""
                loads = function.attr == "load" and of in ("torch", "np", "numpy")
                if loads or (of in ("os", "builtins") and function.attr in CALLS):
                    yield f"{of}.{function.attr}()"
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if (keyword.arg, value) in {("shell", True), ("allow_pickle", True)}:
                    yield f"{keyword.arg}={value}"


FORBIDDEN = MODULES | {"pooch"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_does_none_of_it(path):
    name = str(path.relative_to(ROOT))
    found = {use for use in uses(path) if use in FORBIDDEN or "(" in use or "=" in use}
    assert found <= {use for file, use in ALLOWED if file == name}


def test_it_would_be_found(tmp_path):
    source = (
        "import pickle\nfrom urllib.request import urlopen\nimport os, torch\neval('1')\nos.system('x')\n"
    )
    source += "torch.load('f')\nrun(shell=True)\n"
    path = tmp_path / "bad.py"
    path.write_text(source)
    assert {"pickle", "urllib", "eval()", "os.system()", "torch.load()", "shell=True"} <= set(uses(path))
