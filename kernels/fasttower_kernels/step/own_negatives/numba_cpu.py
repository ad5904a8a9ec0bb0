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
from fasttower_kernels.negatives.membership_numba_cpu import Membership, membership_of
from fasttower_kernels.negatives.numba_cpu import (
    Sampling,
    draw_ahead,
    look_up,
    redraw_touched,
    sampling_of,
    tile_draws,
)
from fasttower_kernels.negatives.proposal import Negatives
from fasttower_kernels.philox import Key
from fasttower_kernels.settings import LossSettings
from fasttower_kernels.step.own_negatives.hard_numba_cpu import keep_largest
from fasttower_kernels.step.own_negatives.tile_numba_cpu import Ahead, gradient_tile, score_tile
from fasttower_kernels.step.variant_numba_cpu import Variant, variant_of
from fasttower_kernels.tables import Interactions, Tables

CHUNK = 32
"""Negatives of a positive that are handled together, a multiple of 4."""


class Candidates(NamedTuple):
    """What a step is told of its negatives and its loss besides the variant.

    Attributes:
        sampling: of the draws, as many for each positive as are scored.
        kept: N, those with the largest logits, int64; all that are drawn where there is no pool.
        chunk: uint64: negatives that are handled together, a multiple of 4: all of them where some are kept.
        temperature: of cosine similarity, float32.
        calibration: of gbce, float32; 0 for other losses.
    """

    sampling: Sampling
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
    sampling: Any,
    hits: Array,
    by_rank: int,
    popularity: bool,
) -> None:
    """Take log q off the logits of a chunk's negatives; see `log_expected` of the reference."""
    tile = uint64(TILE)
    log_count = np.log(float32(sampling.count))
    for w in range(size):
        uniform = log_count - np.log(float32(max(free[w], uint32(1))))
        other = log_count - sampling.log_free_mass[uint64(users[start + w])] if popularity else float32(0)
        for k in range(uint64(1), count + uint64(1)):
            slot = k * tile + w
            x[slot] -= other + sampling.log_p[uint64(items[slot])] if popularity else uniform
    if popularity:
        for i in range(by_rank):
            slot = uint64(hits[i])
            w = slot & uint64(TILE - 1)
            other = log_count - sampling.log_free_mass[uint64(users[start + w])]
            uniform = log_count - np.log(float32(free[w]))
            x[slot] += other + sampling.log_p[uint64(items[slot])] - uniform


# Its branches are the seams, chosen when it is compiled; cut up, each part would take a dozen arrays.
@njit(fastmath=FAST, **OPTIONS)
def add_batch(
    parameters: Any,
    gradients: Any,
    batch: Array,
    size: int,
    known: Membership,
    candidates: Any,
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
        known: the membership.
        candidates: a `Candidates`.
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
    sampling, kept, chunk, temperature, calibration = candidates
    positions, users, positives = batch[0], batch[1], batch[2]
    rows = positions if gathered else users
    tile = uint64(TILE)
    num_drawn = uint64(sampling.count)
    hard = uint64(kept) < num_drawn
    # A loss that is normalised needs all logits before the first slope: with several chunks it draws and
    # scores twice.
    sweeps = uint64(2) if normalised and num_drawn > chunk else uint64(1)

    draws, ahead = tile_draws(chunk), tile_draws(chunk)
    room = (uint64(1) + chunk) * tile
    hits = np.empty(room, dtype=np.uint32)
    drawn = np.empty(room, dtype=np.uint32)
    x = np.empty(room, dtype=np.float32)
    norms = np.empty(uint64(2) * room if similarity == "cosine" else uint64(0), dtype=np.float32)
    state = new_tile()
    weight, beta, value = state.weight, state.beta, state.value
    for i in range(len(x)):
        x[i] = float32(0)
    draws.free[:] = uint32(sampling.num_items)
    ahead.free[:] = uint32(sampling.num_items)
    total = 0.0
    # The chunk at (start, sweep, first) is computed, and the next one's negatives are drawn.
    start, sweep, first, count = uint64(0), uint64(0), uint64(0), min(chunk, num_drawn)
    found = uint64(0)
    if size:
        draw_ahead(
            proposal, ahead, positions, users, start, first, count, sampling, step, known, exclude, exact
        )
        found = look_up(
            proposal,
            ahead,
            hits,
            drawn,
            positions,
            users,
            start,
            min(tile, size),
            first,
            count,
            sampling,
            step,
            known,
            exclude,
            exact,
        )
    while start < size:
        draws, ahead = ahead, draws
        items, free = draws.items, draws.free
        here = min(tile, size - start)
        last = first + count == num_drawn
        if first == uint64(0) and sweep == uint64(0):
            for w in range(tile):
                weight[w] = scales.weight if w < here and free[w] != uint32(0) else float32(0)
            if loss == "gbce":
                for w in range(here):
                    share = min(float32(kept) / float32(max(free[w], uint32(1))), float32(1))
                    beta[w] = float32(1) - calibration * (float32(1) - share)
        for w in range(tile):  # row 0 is the positive's: scored first, and scattered in the last chunk
            items[w] = positives[start + w]
        by_rank = redraw_touched(
            proposal,
            draws,
            hits,
            found,
            drawn,
            positions,
            users,
            start,
            first,
            sampling,
            step,
            known,
            exact,
        )

        next_start, next_sweep, next_first = start, sweep, first + chunk
        if last:
            next_sweep, next_first = sweep + uint64(1), uint64(0)
        if next_sweep == sweeps:
            next_start, next_sweep = start + tile, uint64(0)
        next_count = uint64(0)
        if next_start < size:
            next_count = min(chunk, num_drawn - next_first)
            draw_ahead(
                proposal,
                ahead,
                positions,
                users,
                next_start,
                next_first,
                next_count,
                sampling,
                step,
                known,
                exclude,
                exact,
            )

        score_tile(similarity)(
            x,
            norms,
            items,
            Ahead(ahead, next_count, users[start + uint64(2) * tile :], known),
            rows,
            start,
            here,
            uint64(0) if first == uint64(0) else uint64(1),
            uint64(1) + count,
            parameters,
            temperature,
            width,
            has_bias,
            exclude,
            exact,
        )
        scored = count
        if hard:
            scored = uint64(kept)
            by_rank = keep_largest(x, norms, items, num_drawn, scored, hits, by_rank)
        if normalised:
            _subtract_log_q(
                x,
                items,
                users,
                free,
                start,
                here,
                scored,
                sampling,
                hits,
                by_rank,
                proposal == "popularity",
            )
        end = uint64(1) + scored
        if sweep == uint64(0):
            if first == uint64(0):
                begin_tile(x, state)
            accumulate(loss)(x, end, state)
        computes = sweep + uint64(1) == sweeps
        if computes:
            slopes(loss)(x, end, last, state)
            for w in range(here):
                if weight[w] != float32(0):
                    total += value[w]
        if next_start < size:
            found = look_up(
                proposal,
                ahead,
                hits,
                drawn,
                positions,
                users,
                next_start,
                min(tile, size - next_start),
                next_first,
                next_count,
                sampling,
                step,
                known,
                exclude,
                exact,
            )
        if computes and len(gradients[0]):
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
        start, sweep, first, count = next_start, next_sweep, next_first, next_count
    return total


def candidates_of(negatives: Negatives, loss: LossSettings, key: Key) -> Candidates:
    """What compiled code takes of negatives and loss besides the variant."""
    settings = negatives.settings
    whole_pool = -(-settings.pool // 4) * 4
    return Candidates(
        sampling_of(settings.drawn, negatives.num_items, key, negatives.popularity),
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
        known: Membership,
        candidates: Any,
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
            candidates,
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
        membership_of(negatives.known_positives)[0],
        candidates_of(negatives, loss, key),
        uint32(step),
        factors_of(loss, negatives.settings.scored),
    )
    return torch.tensor(total, dtype=torch.float64)
