"""Adam against torch's."""

import torch

from fasttower_kernels.adam import adam_step
from fasttower_kernels.tables import Tables


def random_tables(seed):
    generator = torch.Generator().manual_seed(seed)
    return Tables(*(torch.randn(shape, generator=generator) for shape in ((5, 4), (7, 4), (7,))))


def test_equals_torch_and_zeroes_gradients():
    ours = random_tables(0)
    theirs = [table.clone().requires_grad_() for table in ours]
    optimiser = torch.optim.Adam(theirs, lr=0.01)
    moments = ours.zeros_like(), ours.zeros_like()
    for count in range(1, 30):
        gradients = random_tables(count)
        if count % 3 == 0:
            gradients = gradients.zeros_like()  # Adam moves on without a gradient
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimiser.step()
        adam_step(ours, gradients, *moments, count=count, learning_rate=0.01)
        assert all(not gradient.any() for gradient in gradients)
    for mine, parameter in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, parameter.detach(), rtol=1e-6, atol=1e-7)
