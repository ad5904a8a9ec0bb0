"""Sampled BCE of the Triton steps, which have no other loss yet; see `step` for all."""

from fasttower_kernels.sampled_bce.settings import LossSettings

__all__ = ["LossSettings"]
