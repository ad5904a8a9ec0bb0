"""Products in registers: the same bits however many rows and lanes the CPU takes together."""

import numba
import numpy as np
import pytest

from fasttower_kernels.compiled import uint64
from fasttower_kernels.step.shared_negatives import tile_matmul_numba_cpu
from fasttower_kernels.step.shared_negatives.tile_matmul_numba_cpu import add_product


def product(blocking, c, a, b, transposed, monkeypatch):
    """``C + A B`` with so many rows and lanes together."""
    rows, columns = c.shape
    inner = len(b)
    monkeypatch.setattr(tile_matmul_numba_cpu, "_blocking", lambda features, columns: blocking)
    a_row, a_inner = (1, rows) if transposed else (inner, 1)

    @numba.njit
    def run(c, a, b):
        add_product(
            c,
            uint64(1),
            a,
            uint64(0),
            uint64(a_row),
            uint64(a_inner),
            b,
            uint64(0),
            uint64(rows),
            uint64(inner),
            columns,
        )

    out = np.full((rows + 2, columns), 7, dtype=np.float32)  # a row of others on either side
    out[1:-1] = c
    run(out.reshape(-1), np.ascontiguousarray(a.T if transposed else a).reshape(-1), b.reshape(-1))
    assert (out[[0, -1]] == 7).all()
    return out[1:-1]


@pytest.mark.parametrize(("rows", "inner", "columns"), [(16, 1, 4), (32, 37, 64), (16, 0, 16), (48, 64, 100)])
@pytest.mark.parametrize("transposed", [False, True])
def test_product(rows, inner, columns, transposed, monkeypatch):
    rng = np.random.default_rng(rows)
    c, a, b = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((rows, columns), (rows, inner), (inner, columns))
    )
    results = [
        product(blocking, c, a, b, transposed, monkeypatch) for blocking in ((4, 64), (8, 16), (16, 4))
    ]
    np.testing.assert_allclose(results[0], c + a.astype(np.float64) @ b, rtol=1e-4, atol=1e-5)
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
