"""Every loss, proposal, similarity and backend against float64 autograd of the contract, written out.

Triton runs under its interpreter, in a process of its own: `test_triton_interpreter` runs this file there,
with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch
from step.oracle import KEY, STEP, make_batch, make_negatives, make_tables, oracle

from fasttower_kernels.settings import LossSettings, NegativeSettings
from fasttower_kernels.step.gradients import numba_cpu, reference

if os.environ.get("TRITON_INTERPRET") == "1":
    from step.large_programs import large_programs  # noqa: F401 - a fixture of every test

    from fasttower_kernels.step.gradients import triton_gpu

    BACKENDS = {"triton": triton_gpu}
else:
    BACKENDS = {"torch": reference, "numba": numba_cpu}

LOSSES = {
    "bce": LossSettings(user_l2=0.3, item_l2=0.2, bias_l2=0.1),
    "bce, pairs": LossSettings(scale="pairs"),
    "gbce": LossSettings("gbce", 0.8, item_l2=0.2),
    "bpr": LossSettings("bpr"),
    "softmax": LossSettings("softmax", user_l2=0.1),
    "softmax, cosine": LossSettings(
        "softmax", similarity="cosine", temperature=0.4, user_l2=0.1, item_l2=0.2
    ),
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


PAIRS = [(loss, negatives) for loss in LOSSES for negatives in NEGATIVES if goes_together(loss, negatives)]
SHAPES = [(3, 40, True, True), (16, 21, False, False)]  # dim, size, exclude, bias


# The interpreter redraws for seconds where users know nearly everything: each loss and each proposal once.
EXCLUDED_IN_THE_INTERPRETER = {
    ("bce", "uniform"),
    ("bce, pairs", "hard"),
    ("gbce", "hard"),
    ("bpr", "popularity"),
    ("softmax", "popularity"),
    ("softmax, cosine", "hard by popularity"),
    ("bce, cosine", "mixed"),
}


def quick(backend, loss, negatives, shape):
    """Plain torch always; of the other backends one shape for each loss and proposal, in turns.

    Lists of all kinds run the same code.
    """
    if backend == "triton":
        if negatives == "more than a chunk" and loss != "softmax":
            return False  # only numba has chunks
        return shape == SHAPES[(loss, negatives) not in EXCLUDED_IN_THE_INTERPRETER]
    turn = list(LOSSES).index(loss) + (NEGATIVES[negatives].proposal != "uniform")
    return backend == "torch" or shape == SHAPES[turn % 2]


CASES = [
    pytest.param(
        *case, marks=() if quick(*case) else pytest.mark.slow, id=f"{', '.join(case[:3])}-{case[3][0]}"
    )
    for case in ((backend, *pair, shape) for backend in BACKENDS for pair in PAIRS for shape in SHAPES)
]


@pytest.mark.parametrize(("backend", "loss", "negatives", "shape"), CASES)
def test_gradients(backend, loss, negatives, shape):
    dim, size, exclude, bias = shape
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
