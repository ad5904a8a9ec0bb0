"""Sampled BCE: a positive and its drawn negatives, scored by dot product, against labels 1 and 0."""

from fasttower_kernels.sampled_bce.reference import bce_sum, train_step
from fasttower_kernels.sampled_bce.settings import LossSettings

__all__ = ["LossSettings", "bce_sum", "train_step"]
