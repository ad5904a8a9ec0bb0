"""Negatives: items drawn uniformly for each positive, by default from those that its user has not touched."""

from fasttower_kernels.negatives.reference import ATTEMPTS, sample_negatives

__all__ = ["ATTEMPTS", "sample_negatives"]
