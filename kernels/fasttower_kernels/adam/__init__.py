"""Adam over the tables in one pass, which also zeroes their gradients; or, lazily, over the rows in use."""

from fasttower_kernels.adam.dense import adam_step
from fasttower_kernels.adam.lazy_reference import catch_up, lazy_adam_step
from fasttower_kernels.adam.reference import BETA_1, BETA_2, EPSILON

__all__ = ["BETA_1", "BETA_2", "EPSILON", "adam_step", "catch_up", "lazy_adam_step"]
