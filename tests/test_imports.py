"""What each part may import, checked where the rest is not to be had."""

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

TRAIN_AND_RETRIEVE = """
import torch
from fasttower.config import TrainingConfig
from fasttower.data.synthetic import generate
from fasttower.training.data import TrainingData
from fasttower.training.trainer import Trainer
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.tables import Interactions
from fasttower_kernels.topk import top_k

data = generate("synthetic-100k", seed=0)
columns = (torch.from_numpy(ids) for ids in (data.user_id, data.item_id))
users, items = (ids.unique(return_inverse=True)[1].int() for ids in columns)
part = lambda rows: Interactions(users[rows].contiguous(), items[rows].contiguous())
known = KnownPositives.from_pairs(users, items, int(users.max()) + 1, int(items.max()) + 1)
parts = TrainingData(part(slice(0, None)), part(slice(0, None, 2)), part(slice(1, None, 50)), known)
config = TrainingConfig(epochs=1, embedding_dim=4, backend="torch", k=5).resolved(len(parts.fit))
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


def test_data_needs_no_torch():
    done = run(["torch"], "import fasttower.data.preparation, fasttower.data.synthetic")
    assert done.returncode == 0, done.stderr


def test_synthetic_needs_numpy_alone():
    done = run(["torch", *NOT_FOR_TRAINING], "import fasttower.data.synthetic")
    assert done.returncode == 0, done.stderr


def test_kernels_do_not_know_fasttower():
    program = """
    import importlib, pkgutil, fasttower_kernels
    for module in pkgutil.walk_packages(fasttower_kernels.__path__, "fasttower_kernels."):
        importlib.import_module(module.name)
    """
    done = run(["fasttower", *NOT_FOR_TRAINING], program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["torch", "polars", "replay", "numba", "tyro"])
def test_import_fasttower_is_light(module):
    done = run([], f"import fasttower; assert {module!r} not in sys.modules; fasttower.Config")
    assert done.returncode == 0, done.stderr


def test_the_block_blocks():
    assert "ModuleNotFoundError" in run(["polars"], "import polars").stderr
