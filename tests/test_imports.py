"""What each part may import: read from its files, and tried where the rest cannot be imported."""

import ast
import graphlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# None of these is on a machine that has only what training needs.
NOT_FOR_TRAINING = [
    "polars",
    "pandas",
    "pyarrow",
    "replay",
    "sklearn",
    "safetensors",
    "rich",
    "tyro",
    "pooch",
]

# A module that is None cannot be imported, and looks to a library that probes for it as if it were not there.
BLOCK = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
"""

IMPORT_ALL = """
import importlib, pkgutil, {package}
for module in pkgutil.walk_packages({package}.__path__, "{package}."):
    importlib.import_module(module.name)
"""

TRAIN_AND_RETRIEVE = """
import torch
from fasttower.config import TrainingConfig
from fasttower.data.synthetic import generate
from fasttower.training.data import Cut, TrainingData
from fasttower.training.trainer import Trainer
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.tables import Interactions
from fasttower_kernels.topk import top_k

data = generate("synthetic-100k", seed=0)
columns = (torch.from_numpy(ids) for ids in (data.user_id, data.item_id))
users, items = (ids.unique(return_inverse=True)[1].int() for ids in columns)
part = lambda rows: Interactions(users[rows].contiguous(), items[rows].contiguous())
known = KnownPositives.from_pairs(users, items, int(users.max()) + 1, int(items.max()) + 1)
parts = TrainingData(part(slice(0, None)), known, (Cut(part(slice(0, None, 2)), part(slice(1, None, 50))),))
config = TrainingConfig(epochs=1, embedding_dim=4, l2=0.1, backend="torch", k=5)
model = Trainer(parts, config).train().model
assert top_k(model.infer_users(), model.infer_items(), k=5).items.shape == (int(users.max()) + 1, 5)
"""


def run(blocked, program):
    code = BLOCK.format(blocked=blocked) + textwrap.dedent(program)
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | paths, capture_output=True, text=True, check=False
    )


def test_training_and_kernels_need_torch_and_numpy_alone():
    done = run(NOT_FOR_TRAINING, TRAIN_AND_RETRIEVE)
    assert done.returncode == 0, done.stderr


def test_a_cpu_needs_no_triton():
    done = run(["triton"], TRAIN_AND_RETRIEVE.replace('backend="torch", ', ""))
    assert done.returncode == 0, done.stderr


def test_data_needs_no_torch():
    done = run(["torch"], IMPORT_ALL.format(package="fasttower.data"))
    assert done.returncode == 0, done.stderr


def test_synthetic_needs_numpy_alone():
    done = run(["torch", *NOT_FOR_TRAINING], "import fasttower.data.synthetic")
    assert done.returncode == 0, done.stderr


def test_kernels_do_not_know_fasttower():
    done = run(["fasttower", *NOT_FOR_TRAINING], IMPORT_ALL.format(package="fasttower_kernels"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["torch", "polars", "replay", "numba", "tyro", "optuna"])
def test_import_fasttower_is_light(module):
    done = run([], f"import fasttower; assert {module!r} not in sys.modules; fasttower.Config")
    assert done.returncode == 0, done.stderr


def test_the_block_blocks():
    assert "ModuleNotFoundError" in run(["polars"], "import polars").stderr


def imports(folder):
    """For each module of a package, by name, the modules that its file imports.

    All imports count: those for type checkers and those in functions too. One of a name is one of its module;
    of a module outside the package, the name as it is written. That a module's own packages run first is not
    counted.
    """
    files = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for module, path in files.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} has a relative import"
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                named.update(name if name in files else node.module for name in names)
        graph[module] = named
    return graph


@pytest.mark.parametrize("folder", ["fasttower", "kernels/fasttower_kernels"])
def test_no_module_imports_itself_by_way_of_others(folder):
    # Raises CycleError, which names the circle.
    graphlib.TopologicalSorter(imports(ROOT / folder)).prepare()


def test_no_file_of_the_kernels_names_fasttower_and_none_of_the_data_names_torch():
    kernels = imports(ROOT / "kernels/fasttower_kernels")
    assert not [
        name for name, named in kernels.items() if {n.partition(".")[0] for n in named} & {"fasttower"}
    ]
    everything = imports(ROOT / "fasttower")
    data = {name: named for name, named in everything.items() if name.startswith("fasttower.data")}
    assert "fasttower.data.readers" in data
    assert not [name for name, named in data.items() if {n.partition(".")[0] for n in named} & {"torch"}]


@pytest.mark.parametrize(
    "upper",
    ["from package import lower", "def f():\n    import package.lower", "from package.lower import X"],
)
def test_a_circle_is_seen_however_it_is_imported(tmp_path, upper):
    (tmp_path / "package").mkdir()
    for name, text in {"__init__": "", "upper": upper, "lower": "import package.upper\nX = 1"}.items():
        (tmp_path / "package" / f"{name}.py").write_text(text)
    with pytest.raises(graphlib.CycleError, match=r"package\.lower"):
        graphlib.TopologicalSorter(imports(tmp_path / "package")).prepare()
