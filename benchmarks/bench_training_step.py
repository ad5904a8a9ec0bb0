"""The training step beside well-written torch loops; the ways, and some more, are in `training_step.py`.

torch.optim.SparseAdam is another optimiser, not a fast version of Adam: see there. The DataLoader way draws
its negatives row by row, as notebooks do.
"""

import pytest
import torch

from benchmarks import torch_baselines
from benchmarks import training_step as ways
from fasttower_kernels.negatives import Negatives, sample_negatives
from fasttower_kernels.philox import seed_key
from fasttower_kernels.settings import LossSettings, NegativeSettings, StepSettings
from fasttower_kernels.step import Step, TrainState, loss_sum

NEGATIVES = NegativeSettings(count=ways.NUM_NEGATIVES)
POSITIVES_PER_ROUND = 16_384
STEPS_PER_ROUND = 32  # over large tables; as one call, at whose end the lazy optimiser updates every row
FASTTOWER = {
    # backend, with exact exclusion and an item bias
    "fasttower": ("numba", False),
    "fasttower_exclusion": ("numba", True),
    "fasttower_reference": ("torch", False),
    "fasttower_reference_exclusion": ("torch", True),
}
LOSSES = {"torch_eager_mulsum": ways.loss_mulsum, "torch_eager_bmm": ways.loss_bmm}
TORCH = [
    *LOSSES,
    "torch_sparse_adam",
    "torch_dataloader",
    pytest.param("torch_compile", marks=pytest.mark.slow),
    pytest.param("torch_manual_compile", marks=pytest.mark.slow),
]


def trained(backend, dim, batch_size, data, known):
    """The tables after three steps."""
    state = TrainState.start(ways.make_tables(dim, data, item_bias=known is not None))
    settings = StepSettings(ways.LEARNING_RATE, batch_size, seed=1, negatives=NEGATIVES)
    negatives = Negatives(NEGATIVES, data.num_users, data.num_items, known)
    Step(state, data.interactions, negatives, settings, backend=backend).run(0, 3)
    return state.parameters


def assert_right_tables(dim, batch_size, data, known):
    """Compiled and plain steps end at the same tables."""
    ours, right = (trained(name, dim, batch_size, data, known) for name in ("numba", "torch"))
    for one, other in zip(ours, right, strict=True):
        # Adam's first steps have the size of the learning rate whatever the gradient's: where that is next to
        # zero, rounding shows at that scale.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0.01 * ways.LEARNING_RATE)


@pytest.mark.parametrize(("dim", "batch_size"), ways.SHAPES)
@pytest.mark.parametrize("way", [*FASTTOWER, *TORCH])
def test_training_step(benchmark_in, way, dim, batch_size, ml_1m_shape, known):
    data = ml_1m_shape
    if way in FASTTOWER:
        backend, exclusion = FASTTOWER[way]
        left_out = known if exclusion else None
        steps = ways.fasttower_way(backend, dim, batch_size, data, left_out)
        if backend == "numba":
            assert_right_tables(dim, batch_size, data, left_out)
    else:
        steps = torch_steps(way, dim, batch_size, data)
    benchmark = benchmark_in(
        f"training step, dim {dim}, batch {batch_size}",
        users=data.num_users,
        items=data.num_items,
        negatives=ways.NUM_NEGATIVES,
        positives_per_round=POSITIVES_PER_ROUND,
    )
    benchmark(steps, POSITIVES_PER_ROUND // batch_size)


@pytest.mark.parametrize(("dim", "batch_size"), [(64, 1024)])
@pytest.mark.parametrize("way", ["fasttower", "torch_eager_mulsum", "torch_sparse_adam"])
def test_large_tables(benchmark_in, way, dim, batch_size, ml_20m_tables):
    """Where dense Adam takes nearly all of the time: fasttower is lazy, SparseAdam another optimiser."""
    data = ml_20m_tables
    if way == "fasttower":
        steps = ways.fasttower_way("numba", dim, batch_size, data)
        assert_right_tables(dim, batch_size, data, None)
    else:
        steps = torch_steps(way, dim, batch_size, data)
    benchmark = benchmark_in(
        f"training step, ML-20M's tables, dim {dim}, batch {batch_size}",
        users=data.num_users,
        items=data.num_items,
        negatives=ways.NUM_NEGATIVES,
        steps_per_round=STEPS_PER_ROUND,
    )
    benchmark.pedantic(steps, args=(STEPS_PER_ROUND,), rounds=3)


def torch_steps(way, dim, batch_size, data):
    """A torch loop, warm and with the right loss."""
    if way == "torch_sparse_adam":

        def loss_of(users, items, *batch):
            embeddings = (torch.nn.Embedding.from_pretrained(table) for table in (users, items))
            return torch_baselines.loss_sparse(*embeddings, *batch)

        assert_right_loss(loss_of, dim, batch_size, data)
        steps = ways.sparse_adam_way(dim, batch_size, data)
    elif way == "torch_dataloader":
        assert_right_loss(ways.loss_mulsum, dim, batch_size, data)
        steps = ways.dataloader_way(dim, batch_size, data)
    elif way == "torch_manual_compile":

        def loss_of(users, items, *batch):
            gradients = torch.zeros_like(users), torch.zeros_like(items)
            loss = torch_baselines.gradients_by_hand(users, items, *gradients, *batch)
            parameters = users.clone().requires_grad_(), items.clone().requires_grad_()
            right = torch.autograd.grad(ways.loss_mulsum(*parameters, *batch), parameters)
            torch.testing.assert_close(gradients, right)
            return loss

        assert_right_loss(loss_of, dim, batch_size, data)
        steps = ways.manual_compiled_way(dim, batch_size, data)
    else:
        loss_of = LOSSES.get(way) or torch.compile(ways.loss_mulsum, dynamic=False)
        assert_right_loss(loss_of, dim, batch_size, data)
        steps = ways.torch_way(loss_of, dim, batch_size, data)
    steps(2)
    return steps


def assert_right_loss(loss_of, dim, batch_size, data):
    """The loop's loss is the reference's, given the reference's negatives."""
    tables, key = ways.make_tables(dim, data), seed_key(1)
    batch = data.batch(batch_size)
    users = batch.user_index.long()
    negatives = sample_negatives(users, ways.NUM_NEGATIVES, data.num_items, key=key, step=0)
    labels = torch.zeros(batch_size, 1 + ways.NUM_NEGATIVES)
    labels[:, 0] = 1
    item_index = torch.cat([batch.item_index.long()[:, None], negatives], dim=1)
    plain = Negatives(NEGATIVES, data.num_users, data.num_items)
    right = loss_sum(tables, batch, plain, LossSettings(), key=key, step=0, backend="torch")
    mean = loss_of(tables.users, tables.items, users, item_index, labels)
    assert float(mean) * labels.numel() == pytest.approx(float(right), rel=1e-5)
