"""Adam against torch's."""

import importlib.util

import pytest
import torch

from fasttower_kernels.adam import adam_step
from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.tables import Tables

needs_numba = pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="numba is not installed")
BACKENDS = ["torch", pytest.param("numba", marks=needs_numba)]


def random_tables(seed, bias=True):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 4), (7, 4)] + [(7,)] * bias
    return Tables(*(torch.randn(shape, generator=generator) for shape in shapes))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch_and_zeroes_gradients(backend, bias):
    ours = random_tables(0, bias)
    theirs = [table.clone().requires_grad_() for table in ours]
    optimiser = torch.optim.Adam(theirs, lr=0.01)
    moments = ours.zeros_like(), ours.zeros_like()
    for count in range(1, 30):
        gradients = random_tables(count, bias)
        if count % 3 == 0:
            gradients = gradients.zeros_like()  # Adam moves on without a gradient
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimiser.step()
        adam_step(ours, gradients, *moments, count=count, learning_rate=0.01, backend=backend)
        assert all(not gradient.any() for gradient in gradients)
    for mine, parameter in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, parameter.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gradients": random_tables(0, bias=False)}, "gradients are .*expected those of the parameters"),
        ({"count": 0}, "count is 0"),
        ({"learning_rate": 0.0}, "learning_rate 0.0"),
        ({"backend": "triton"}, "triton runs on cuda"),
    ],
)
def test_what_does_not_fit_is_said(change, said):
    names = ("parameters", "gradients", "moments_1", "moments_2")
    arguments = dict.fromkeys(names, random_tables(0)) | {"count": 1, "learning_rate": 0.1}
    with pytest.raises(FastTowerError, match=said):
        adam_step(**arguments | change)


@needs_numba
@pytest.mark.parametrize("change", [torch.Tensor.double, lambda t: t.T.contiguous().T])
def test_fused_backends_refuse_what_they_cannot_walk_through(change):
    tables = random_tables(0, bias=False)
    tables = [Tables(change(tables.users), change(tables.items))] * 4
    with pytest.raises(FastTowerError, match="choose backend torch"):
        adam_step(*tables, count=1, learning_rate=0.1, backend="numba")
