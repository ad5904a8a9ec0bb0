"""fasttower: fast two-tower (dot-product) recommenders, from a ratings file to an evaluated top-10.

The names below are imported when they are first used, so that ``import fasttower`` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasttower.config import PRESETS, Config
    from fasttower.errors import FastTowerError, TrainingError
    from fasttower.model import TwoTower
    from fasttower.pipeline import FitObserver, fit
    from fasttower.run import Run, load_run
    from fasttower.run.evaluate import Evaluation
    from fasttower.tuning.tune import Tuned, TuneObserver, tune

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "Config",
    "Evaluation",
    "FastTowerError",
    "FitObserver",
    "Run",
    "TrainingError",
    "TuneObserver",
    "Tuned",
    "TwoTower",
    "fit",
    "load_run",
    "tune",
]

_HOMES = {
    "PRESETS": "config",
    "Config": "config",
    "Evaluation": "run.evaluate",
    "FastTowerError": "errors",
    "Run": "run",
    "FitObserver": "pipeline",
    "TrainingError": "errors",
    "TuneObserver": "tuning.tune",
    "Tuned": "tuning.tune",
    "TwoTower": "model",
    "fit": "pipeline",
    "load_run": "run",
    "tune": "tuning.tune",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOMES.keys())
