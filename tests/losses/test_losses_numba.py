"""The compiled losses, a tile at a time, against float64 autograd of the plain ones."""

from functools import lru_cache

import numpy as np
import pytest
import torch

from fasttower_kernels.compiled import SOURCES, entry_point, uint64
from fasttower_kernels.losses.numba_cpu import NORMALISED, TILE, accumulate, begin_tile, new_tile, slopes
from fasttower_kernels.losses.reference import Scores, loss_values
from fasttower_kernels.settings import LossSettings

LOSSES = ("bce", "gbce", "bpr", "softmax")


@lru_cache
def compiled(loss, sources=SOURCES):
    normalised = loss in NORMALISED

    def run(logits, chunk, weight, beta, values, out):
        _ = sources
        tile = new_tile()
        tile.weight[:] = weight
        tile.beta[:] = beta
        x = np.empty((1 + chunk) * TILE, dtype=np.float32)
        x[:TILE] = logits[0]
        begin_tile(x, tile)
        count = len(logits) - 1
        for sweep in range(2):
            if sweep == 0 and not normalised:
                continue
            first = 0
            while True:
                here = min(chunk, count - first)
                for k in range(here):
                    x[(1 + k) * TILE : (2 + k) * TILE] = logits[1 + first + k]
                if sweep == 0:
                    accumulate(loss)(x, uint64(1 + here), tile)
                else:
                    last = first + chunk >= count
                    slopes(loss)(x, uint64(1 + here), last, tile)
                    for k in range(here):
                        out[1 + first + k] = x[(1 + k) * TILE : (2 + k) * TILE]
                    for w in range(TILE):
                        values[w] += tile.value[w]
                    if last:
                        out[0] = x[:TILE]
                first += chunk
                if first >= count:
                    break

    return entry_point(run)


@pytest.mark.parametrize(("count", "chunk"), [(0, 4), (1, 4), (10, 32), (37, 8), (200, 200), (200, 64)])
@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_slopes(loss, count, chunk):
    rng = np.random.default_rng(count)
    logits = (4 * rng.standard_normal((1 + count, TILE))).astype(np.float32)
    logits[1:][rng.random((count, TILE)) < 0.1] = -np.inf  # what counts for nothing
    logits[1:, 5] = -np.inf
    logits[0, 1], logits[0, 2] = 60, -60
    weight, beta = rng.random(TILE).astype(np.float32), rng.random(TILE).astype(np.float32)
    values, out = np.zeros(TILE), np.full_like(logits, np.nan)
    compiled(loss)(logits, chunk, weight, beta, values, out)

    counted = torch.from_numpy(logits[1:].T) > -torch.inf
    leaves = [
        torch.from_numpy(part).double().requires_grad_()
        for part in (logits[0], np.maximum(logits[1:].T, -99))
    ]
    scores = Scores(*leaves, counted, torch.zeros(()), torch.from_numpy(beta).double())
    right = loss_values(scores, LossSettings(loss))
    torch.testing.assert_close(torch.from_numpy(values), right.detach(), rtol=1e-5, atol=1e-6)
    (right * torch.from_numpy(weight)).sum().backward()
    torch.testing.assert_close(torch.from_numpy(out[0]).double(), leaves[0].grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.from_numpy(out[1:].T).double(), leaves[1].grad, rtol=1e-5, atol=1e-6)
    assert not out[1:][logits[1:] == -np.inf].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_nan_shows(loss):
    logits = np.zeros((3, TILE), dtype=np.float32)
    logits[1, 3] = logits[0, 4] = np.nan
    values, out = np.zeros(TILE), np.zeros_like(logits)
    compiled(loss)(logits, 8, np.ones(TILE, dtype=np.float32), np.ones(TILE, dtype=np.float32), values, out)
    assert np.isnan(values[[3, 4]]).all()
    assert np.isnan(out[:, [3, 4]]).any(axis=0).all()
    assert np.isfinite(out[:, 5]).all()


def test_many_logits_of_zero_do_not_overflow():
    """The product whose logarithm is taken would be 2**200."""
    logits = np.zeros((201, TILE), dtype=np.float32)
    ones, values = np.ones(TILE, dtype=np.float32), np.zeros(TILE)
    compiled("bce")(logits, 200, ones, ones, values, np.zeros_like(logits))
    np.testing.assert_allclose(values, 201 * np.log(2), rtol=1e-6)
