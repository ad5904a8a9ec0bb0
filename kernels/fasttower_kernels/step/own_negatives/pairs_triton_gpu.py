"""Gradients in a fixed order, from the items and coefficients that the fused kernel leaves of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasttower_kernels.settings import LossSettings
from fasttower_kernels.step.segments_triton_gpu import reduce_pairs
from fasttower_kernels.tables import Tables


class PairBuffers(NamedTuple):
    """What the deterministic mode holds of a batch.

    Attributes:
        users: (B,), int32.
        items: (B, 1 + N), int32, flat.
        coefficients: (B, 1 + N), float32, flat.
    """

    users: Tensor
    items: Tensor
    coefficients: Tensor

    @staticmethod
    def empty(batch_size: int, num_negatives: int, device: torch.device) -> PairBuffers:
        """Buffers of that size."""
        size = batch_size * (1 + num_negatives)
        return PairBuffers(
            torch.empty(batch_size, dtype=torch.int32, device=device),
            torch.empty(size, dtype=torch.int32, device=device),
            torch.empty(size, dtype=torch.float32, device=device),
        )

    def first(self, batch_size: int, num_negatives: int) -> PairBuffers:
        """The part of a shorter batch."""
        size = batch_size * (1 + num_negatives)
        return PairBuffers(self.users[:batch_size], self.items[:size], self.coefficients[:size])


def add_pair_gradients(
    parameters: Tables, gradients: Tables, pairs: PairBuffers, loss: LossSettings, num_negatives: int
) -> None:
    """Add the gradients of a batch's pairs in a fixed order, without floating-point atomics."""
    num_pairs = 1 + num_negatives
    divisor = loss.divisor(len(pairs.users), num_negatives)
    reduce_pairs(
        keys=pairs.items,
        coefficients=pairs.coefficients,
        terms=1,
        others=pairs.users,
        pairs_per_other=num_pairs,
        other_vectors=parameters.users,
        own_vectors=parameters.items,
        gradients=gradients.items,
        bias_gradients=gradients.item_bias,
        own_scale=4 / num_pairs * loss.item_l2 / divisor,
    )
    reduce_pairs(
        keys=pairs.users,
        coefficients=pairs.coefficients,
        terms=num_pairs,
        others=pairs.items,
        pairs_per_other=1,
        other_vectors=parameters.items,
        own_vectors=parameters.users,
        gradients=gradients.users,
        bias_gradients=None,
        own_scale=2 * loss.user_l2 / divisor,
    )
