"""Every loss, proposal, similarity and backend against float64 autograd of the contract, written out."""

import pytest
import torch
from step.oracle import KEY, STEP, make_batch, make_negatives, make_tables, oracle

from fasttower_kernels.losses import LossSettings
from fasttower_kernels.negatives.settings import NegativeSettings
from fasttower_kernels.step import gradients_reference
from fasttower_kernels.step.shared_negatives import numba_cpu as shared_numba

BACKENDS = {"torch": gradients_reference, "numba": shared_numba}

LOSSES = {
    "bce": LossSettings(user_l2=0.3, item_l2=0.2, bias_l2=0.1),
    "bce, pairs": LossSettings(scale="pairs"),
    "gbce": LossSettings("gbce", 0.8, item_l2=0.2),
    "bpr": LossSettings("bpr"),
    "softmax": LossSettings("softmax", user_l2=0.1),
    "softmax, cosine": LossSettings("softmax", similarity="cosine", temperature=0.4, user_l2=0.1, item_l2=0.2),
    "bce, cosine": LossSettings(similarity="cosine", temperature=1.5),
}
NEGATIVES = {
    "uniform": NegativeSettings(count=10),
    "none": NegativeSettings(count=0),
    "more than a chunk": NegativeSettings(count=37),
    "popularity": NegativeSettings("popularity", count=5),
    "hard": NegativeSettings(count=3, pool=9),
    "hard by popularity": NegativeSettings("popularity", count=2, pool=7),
    "shared": NegativeSettings("shared", count=6, block_size=8),
    "in-batch": NegativeSettings("in-batch", block_size=16),
    "mixed": NegativeSettings("mixed", count=3, block_size=5),
}


def goes_together(loss, negatives):
    settings = LOSSES[loss], NEGATIVES[negatives]
    if settings[0].name == "gbce" and settings[1].proposal not in ("uniform", "shared"):
        return False
    return settings[0].scale == "positives" or not settings[1].is_shared


CASES = [
    (backend, loss, negatives)
    for backend in BACKENDS
    for loss in LOSSES
    for negatives in NEGATIVES
    if goes_together(loss, negatives) and (backend == "torch" or NEGATIVES[negatives].is_shared)
]


@pytest.mark.parametrize(("backend", "loss", "negatives"), CASES)
@pytest.mark.parametrize(("dim", "size", "exclude", "bias"), [(3, 40, True, True), (16, 21, False, False)])
def test_gradients(backend, loss, negatives, dim, size, exclude, bias):
    loss, negatives = LOSSES[loss], make_negatives(NEGATIVES[negatives], exclude=exclude)
    tables, batch = make_tables(dim, scale=0.7, bias=bias), make_batch(size)
    gradients = tables.zeros_like()
    value = BACKENDS[backend].add_gradients(tables, gradients, batch, negatives, loss, key=KEY, step=STEP)
    right_value, _, right = oracle(tables, batch, negatives, loss)
    torch.testing.assert_close(value.double(), right_value, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(gradients, right, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=2e-6)
    for table in gradients.users, gradients.items:
        assert not table[:, dim:].any()  # the padding
    again = BACKENDS[backend].loss_sum(tables, batch, negatives, loss, key=KEY, step=STEP)
    torch.testing.assert_close(again.double(), value.double(), rtol=1e-6, atol=1e-6)
