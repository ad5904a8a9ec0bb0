"""An update of dense Adam over both tables, gradients zeroed: fasttower's one pass beside torch's."""

import numba
import numpy as np
import pytest
import torch

from fasttower_kernels.adam.numba_cpu import adam_range, step_scales
from fasttower_kernels.adam.reference import adam_step
from fasttower_kernels.compiled import flat_arrays, uint64
from fasttower_kernels.step import TrainState
from fasttower_kernels.tables import Tables

DIM, LEARNING_RATE = 64, 1e-3
SHAPES = {"ML-1M's tables": (6_040, 3_706, 100), "ML-20M's tables": (138_493, 26_744, 8)}  # the last: rounds


def random_tables(users, items, scale):
    generator = torch.Generator().manual_seed(0)
    return Tables(*(torch.randn(rows, DIM, generator=generator) * scale for rows in (users, items)))


@numba.njit(nogil=True)
def adam_tables(parameters, gradients, moments_1, moments_2, step_size, inverse_root):
    for table in range(2):
        n = uint64(len(parameters[table]))
        columns = parameters[table], gradients[table], moments_1[table], moments_2[table]
        adam_range(*columns, uint64(0), n, step_size, inverse_root)


def fasttower_way(parameters):
    """The compiled pass as the training step calls it on one thread."""
    state = TrainState.start(parameters)
    arrays = [flat_arrays(part) for part in (parameters, state.gradients, state.moments_1, state.moments_2)]
    count = 0

    def update():
        nonlocal count
        count += 1
        step_size, inverse_root = step_scales(np.array([count]), LEARNING_RATE)[0]
        adam_tables(*arrays, step_size, inverse_root)

    return update, state.gradients


def reference_way(parameters):
    state = TrainState.start(parameters)
    count = 0

    def update():
        nonlocal count
        count += 1
        moments = state.moments_1, state.moments_2
        adam_step(parameters, state.gradients, *moments, count=count, learning_rate=LEARNING_RATE)

    return update, state.gradients


def torch_way(**options):
    def way(parameters):
        leaves = [torch.nn.Parameter(table) for table in parameters]
        gradients = parameters.zeros_like()
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimiser = torch.optim.Adam(leaves, lr=LEARNING_RATE, **options)

        def update():
            optimiser.step()
            optimiser.zero_grad(set_to_none=False)

        return update, gradients

    return way


WAYS = {
    "fasttower": fasttower_way,
    "fasttower_reference": reference_way,
    "torch_fused": torch_way(fused=True),
    "torch_foreach": torch_way(foreach=True),
}


def start(way, users, items):
    """An update and what fills its gradients, for Adam leaves them zero."""
    parameters, source = random_tables(users, items, 0.1), random_tables(users, items, 1e-3)
    update, gradients = WAYS[way](parameters)

    def fill():
        for gradient, values in zip(gradients, source, strict=True):
            gradient.copy_(values)

    return parameters, gradients, update, fill


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_adam(benchmark_in, way, shape):
    results = []
    for name in (way, "torch_fused" if way != "torch_fused" else "torch_foreach"):
        parameters, gradients, update, fill = start(name, 101, 53)
        for _ in range(3):
            fill()
            update()
            assert not any(gradient.any() for gradient in gradients)
        results.append(parameters)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)

    users, items, rounds = SHAPES[shape]
    _, _, update, fill = start(way, users, items)
    benchmark_in(f"Adam, {shape}", users=users, items=items, dim=DIM).pedantic(
        update, setup=fill, rounds=rounds, warmup_rounds=2
    )
