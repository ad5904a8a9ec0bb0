"""The family of errors, under the name that users of the library import."""

from fasttower_kernels.errors import FastTowerError, TrainingError

__all__ = ["FastTowerError", "TrainingError"]
