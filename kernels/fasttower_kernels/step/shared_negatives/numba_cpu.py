"""Shared negatives, compiled: the gradients of a batch, and its loss without them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttower_kernels.compiled import (
    SOURCES,
    Array,
    empty,
    entry_point,
    flat_arrays,
    float32,
    uint32,
    uint64,
)
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.losses.numba_cpu import NORMALISED, TILE
from fasttower_kernels.losses.scales_numba_cpu import factors_of, scales_of
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.negatives.reference import list_key
from fasttower_kernels.philox import Key
from fasttower_kernels.settings import LossSettings
from fasttower_kernels.step.shared_negatives.batch_numba_cpu import Lists, LossConstants, add_shared_batch
from fasttower_kernels.step.shared_negatives.block_list_numba_cpu import ListSampling
from fasttower_kernels.step.variant_numba_cpu import Variant, variant_of
from fasttower_kernels.tables import Interactions, Tables


def sampling_of(negatives: Negatives, key: Key) -> ListSampling:
    """What compiled code takes of the settings of the lists."""
    settings = negatives.settings
    rate, drawn_rate = negatives.list_rates
    k0, k1 = list_key(key)
    return ListSampling(
        uint64(settings.block_size),
        uint64(settings.drawn),
        settings.proposal != "shared",
        uint64(negatives.num_items),
        uint32(k0),
        uint32(k1),
        rate.numpy(),
        float32(drawn_rate),
    )


def constants_of(negatives: Negatives, loss: LossSettings) -> LossConstants:
    """What compiled code takes of the loss besides its variant."""
    beta = loss.shared_positive_weight(negatives.list_rates[1])
    return LossConstants(float32(loss.temperature), float32(beta))


def known_rows(known_positives: KnownPositives | None) -> tuple[Array, Array]:
    """What compiled code takes of known positives: indptr and items; empty arrays without them."""
    if known_positives is None:
        return empty(np.int64), empty(np.int32)
    return known_positives.indptr.numpy(), known_positives.items.numpy()


@lru_cache
def _compiled(variant: Variant, gathered: bool, sources: int = SOURCES) -> Any:
    width, has_bias, exclude, _, has_l2, similarity, _, loss = variant
    cosine, normalised = similarity == "cosine", loss in NORMALISED

    def run(
        parameters: Any,
        gradients: Any,
        user_index: Array,
        item_index: Array,
        first_block: int,
        known: Any,
        sampling: Any,
        constants: Any,
        step: int,
        factors: Any,
    ) -> float:
        _ = sources
        size = uint64(len(user_index))
        own = np.zeros((3, len(user_index) + 2 * TILE), dtype=np.uint32)
        for b in range(size):
            own[0, b] = b
            own[1, b] = user_index[b]
            own[2, b] = item_index[b]
        flags, heads = np.zeros(sampling.num_items, np.uint8), np.empty(sampling.num_items, np.uint32)
        lists = Lists(own[2], size, first_block, flags, heads)
        return add_shared_batch(
            parameters,
            gradients,
            own,
            size,
            lists,
            known,
            sampling,
            constants,
            step,
            scales_of(max(size, uint64(1)), factors),
            width,
            has_bias,
            exclude,
            has_l2,
            cosine,
            loss,
            normalised,
            gathered,
        )

    return entry_point(run)


def run_batch(
    parameters: Tables,
    gradients: Tables | None,
    batch: Interactions,
    negatives: Negatives,
    loss: LossSettings,
    *,
    key: Key,
    step: int,
    first_position: int = 0,
    gathered: bool = False,
) -> Tensor:
    """Add the gradients of a batch's loss, or none; see `own_negatives.numba_cpu.run_batch`."""
    total = _compiled(variant_of(parameters, negatives, loss), gathered)(
        flat_arrays(parameters),
        (empty(np.float32),) * 3 if gradients is None else flat_arrays(gradients),
        batch.user_index.numpy(),
        batch.item_index.numpy(),
        uint64(first_position // negatives.settings.block_size),
        known_rows(negatives.known_positives),
        sampling_of(negatives, key),
        constants_of(negatives, loss),
        uint32(step),
        factors_of(loss, negatives.settings.scored),
    )
    return torch.tensor(total, dtype=torch.float64)
