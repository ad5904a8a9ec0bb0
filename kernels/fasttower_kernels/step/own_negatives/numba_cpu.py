"""Positives with negatives of their own, compiled: a tile at a time, from the draws to the gradients.

A tile's draws, logits and slopes lie negative by negative with its positives side by side, so that Philox,
exp and log vectorise over the positives. Negatives are handled in chunks: no buffer grows with N, but with
the pool of hard ones, which is chosen from as a whole.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttower_kernels.compiled import (
    FAST,
    OPTIONS,
    SOURCES,
    Array,
    empty,
    entry_point,
    flat_arrays,
    float32,
    njit,
    uint32,
    uint64,
)
from fasttower_kernels.losses.numba_cpu import NORMALISED, TILE, accumulate, begin_tile, new_tile, slopes
from fasttower_kernels.losses.scales_numba_cpu import factors_of, scales_of
from fasttower_kernels.membership import known_arrays, prefetch_bits
from fasttower_kernels.negatives.numba_cpu import Draws, count_free, draw_tile, draws_of, redraw_touched
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.philox import Key
from fasttower_kernels.settings import LossSettings
from fasttower_kernels.step.own_negatives.hard_numba_cpu import keep_largest
from fasttower_kernels.step.own_negatives.tile_numba_cpu import gradient_tile, score_tile
from fasttower_kernels.step.variant_numba_cpu import Variant, variant_of
from fasttower_kernels.tables import Interactions, Tables

CHUNK = 32
"""Negatives of a positive that are handled together, a multiple of 4."""


class Sampling(NamedTuple):
    """What a step is told of its negatives and its loss besides the variant.

    Attributes:
        draws: as many for each positive as are scored.
        kept: N, those with the largest logits, int64; all that are drawn where there is no pool.
        chunk: uint64: negatives that are handled together, a multiple of 4: all of them where some are kept.
        temperature: of cosine similarity, float32.
        calibration: of gbce, float32; 0 for other losses.
    """

    draws: Draws
    kept: int
    chunk: int
    temperature: float
    calibration: float


@njit(fastmath=FAST, **OPTIONS)
def _subtract_log_q(
    x: Array,
    items: Array,
    users: Array,
    free: Array,
    start: int,
    size: int,
    count: int,
    draws: Any,
    hits: Array,
    by_rank: int,
    popularity: bool,
) -> None:
    """Take log q off the logits of a chunk's negatives; see `log_expected` of the reference."""
    tile = uint64(TILE)
    log_count = np.log(float32(draws.count))
    for w in range(size):
        uniform = log_count - np.log(float32(max(free[w], uint32(1))))
        other = log_count - draws.log_free_mass[uint64(users[start + w])] if popularity else float32(0)
        for k in range(uint64(1), count + uint64(1)):
            slot = k * tile + w
            x[slot] -= other + draws.log_p[uint64(items[slot])] if popularity else uniform
    if popularity:
        for i in range(by_rank):
            slot = uint64(hits[i])
            w = slot & uint64(TILE - 1)
            other = log_count - draws.log_free_mass[uint64(users[start + w])]
            uniform = log_count - np.log(float32(free[w]))
            x[slot] += other + draws.log_p[uint64(items[slot])] - uniform


# Its branches are the seams, chosen when it is compiled; cut up, each part would take a dozen arrays.
@njit(fastmath=FAST, **OPTIONS)
def add_batch(
    parameters: Any,
    gradients: Any,
    batch: Array,
    size: int,
    known: Any,
    sampling: Any,
    step: int,
    scales: Any,
    width: int,
    has_bias: bool,
    exclude: bool,
    exact: bool,
    has_l2: bool,
    similarity: str,
    proposal: str,
    loss: str,
    normalised: bool,
    gathered: bool,
) -> float:
    """Add the gradients of some positives; return the sum of their losses as float64.

    Args:
        parameters: users (U * P,), items (I * P,), item bias (I,) or empty, float32.
        gradients: the same, or all empty for the losses only; no option of the compiler, so that training and
            the validation loss share the compiled code.
        batch: (3, size + 2 * TILE), uint32: positions in the batch, users, items. What lies beyond ``size``
            is ignored, but the users there are valid: they are prefetched.
        size: uint64: how many positives.
        known: of `known_arrays`.
        sampling: a `Sampling`.
        step: t as uint32.
        scales: of `scales_of`.
        width: of a `Variant`; this one and the next are literals.
        has_bias: the same.
        exclude: the same.
        exact: the same.
        has_l2: the same.
        similarity: the same.
        proposal: the same.
        loss: the same.
        normalised: whether the loss is one of NORMALISED.
        gathered: whether row b of the user table belongs to position b of the batch, whoever the user is.
    """
    draws, kept, chunk, temperature, calibration = sampling
    positions, users, positives = batch[0], batch[1], batch[2]
    rows = positions if gathered else users
    tile = uint64(TILE)
    drawn_count = uint64(draws.count)
    hard = uint64(kept) < drawn_count

    room = (uint64(1) + chunk) * tile
    items = np.empty(room + uint64(3) * tile, dtype=np.uint32)
    hits = np.empty(room, dtype=np.uint32)
    drawn = np.empty(room, dtype=np.uint32)
    x = np.empty(room, dtype=np.float32)
    norms = np.empty(uint64(2) * room if similarity == "cosine" else uint64(0), dtype=np.float32)
    free = np.empty(TILE, dtype=np.uint32)
    state = new_tile()
    weight = state.weight
    for i in range(len(x)):
        x[i] = float32(0)
    total = 0.0
    for start in range(uint64(0), size, tile):
        here = min(tile, size - start)
        for w in range(tile):
            weight[w] = scales.weight if w < here else float32(0)
            items[w] = positives[start + w]
            free[w] = uint32(draws.num_items)
        if exclude:
            count_free(free, users, start, here, draws.num_items, known)
            for w in range(here):
                if free[w] == uint32(0):
                    weight[w] = float32(0)
            prefetch_bits(known, users, start + tile, here)
        if loss == "gbce":
            for w in range(here):
                share = min(float32(kept) / float32(max(free[w], uint32(1))), float32(1))
                state.beta[w] = float32(1) - calibration * (float32(1) - share)

        # A loss that is normalised needs all logits before the first slope: with several chunks it draws and
        # scores twice. Row 0, the positive's, is scored first and scattered in the last chunk.
        sweeps = uint64(2) if normalised and drawn_count > chunk else uint64(1)
        for sweep in range(sweeps):
            first = uint64(0)
            while True:
                count = min(chunk, drawn_count - first)
                last = first + count == drawn_count
                begin = uint64(0) if first == uint64(0) else uint64(1)
                draw_tile(proposal)(items, positions, start, first, count, draws, step)
                by_rank = uint64(0)
                if exclude:
                    by_rank = redraw_touched(
                        proposal,
                        items,
                        positions,
                        users,
                        free,
                        start,
                        here,
                        first,
                        count,
                        draws,
                        step,
                        known,
                        exact,
                        hits,
                        drawn,
                    )
                score_tile(similarity)(
                    x,
                    norms,
                    items,
                    rows,
                    start,
                    here,
                    begin,
                    uint64(1) + count,
                    parameters,
                    temperature,
                    width,
                    has_bias,
                )
                if hard:
                    count = uint64(kept)
                    by_rank = keep_largest(x, norms, items, drawn_count, count, hits, by_rank)
                if normalised:
                    _subtract_log_q(
                        x,
                        items,
                        users,
                        free,
                        start,
                        here,
                        count,
                        draws,
                        hits,
                        by_rank,
                        proposal == "popularity",
                    )
                end = uint64(1) + count
                if sweep == uint64(0):
                    if first == uint64(0):
                        begin_tile(x, state)
                    accumulate(loss)(x, end, state)
                if sweep == sweeps - uint64(1):
                    slopes(loss)(x, end, last, state)
                    for w in range(here):
                        if weight[w] != float32(0):
                            total += state.value[w]
                    if len(gradients[0]):
                        gradient_tile(similarity)(
                            x,
                            norms,
                            items,
                            rows,
                            start,
                            here,
                            uint64(0) if last else uint64(1),
                            end,
                            weight,
                            parameters,
                            gradients,
                            scales,
                            temperature,
                            width,
                            has_bias,
                            has_l2,
                        )
                first += chunk
                if last:
                    break
    return total


def sampling_of(negatives: Negatives, loss: LossSettings, key: Key) -> Sampling:
    """What compiled code takes of negatives and loss besides the variant."""
    settings = negatives.settings
    whole_pool = -(-settings.pool // 4) * 4
    return Sampling(
        draws_of(settings.drawn, negatives.num_items, key, negatives.popularity),
        settings.count,
        uint64(whole_pool or CHUNK),
        float32(loss.temperature),
        float32(loss.calibration if loss.name == "gbce" else 0),
    )


@lru_cache
def _compiled(variant: Variant, gathered: bool, sources: int = SOURCES) -> Any:
    width, has_bias, exclude, exact, has_l2, similarity, proposal, loss = variant
    normalised = loss in NORMALISED

    def run(
        parameters: Any,
        gradients: Any,
        user_index: Array,
        item_index: Array,
        first_position: int,
        known: Any,
        sampling: Any,
        step: int,
        factors: Any,
    ) -> float:
        _ = sources
        size = uint64(len(user_index))
        batch = np.zeros((3, len(user_index) + 2 * TILE), dtype=np.uint32)
        for b in range(size):
            batch[0, b] = uint64(first_position) + b
            batch[1, b] = user_index[b]
            batch[2, b] = item_index[b]
        return add_batch(
            parameters,
            gradients,
            batch,
            size,
            known,
            sampling,
            step,
            scales_of(max(size, uint64(1)), factors),
            width,
            has_bias,
            exclude,
            exact,
            has_l2,
            similarity,
            proposal,
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
    """Add the gradients of a batch's loss, or none; return the sum of its values, float64.

    With ``gathered`` the user table has a row for each positive of the batch, (B, P), and the users' indices
    say what negatives leave out, nothing else.
    """
    total = _compiled(variant_of(parameters, negatives, loss), gathered)(
        flat_arrays(parameters),
        (empty(np.float32),) * 3 if gradients is None else flat_arrays(gradients),
        batch.user_index.numpy(),
        batch.item_index.numpy(),
        first_position,
        known_arrays(negatives.known_positives),
        sampling_of(negatives, loss, key),
        uint32(step),
        factors_of(loss, negatives.settings.scored),
    )
    return torch.tensor(total, dtype=torch.float64)
