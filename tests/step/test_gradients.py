"""The gradients of a batch beyond the contract's values: how they add up, weights of users, large logits."""

import importlib.util

import pytest
import torch
from step.oracle import KEY, NUM_ITEMS, make_batch, make_known, make_negatives, make_tables

from fasttower_kernels.negatives import Negatives
from fasttower_kernels.settings import LossSettings, NegativeSettings
from fasttower_kernels.step import add_gradients, loss_sum
from fasttower_kernels.step.gradients import numba_cpu, reference
from fasttower_kernels.step.own_negatives import numba_cpu as own_numba
from fasttower_kernels.step.own_negatives import reference as own_reference
from fasttower_kernels.step.shared_negatives import numba_cpu as shared_numba
from fasttower_kernels.step.shared_negatives import reference as shared_reference
from fasttower_kernels.tables import Interactions, Tables

needs_numba = pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="numba is not installed")
BACKENDS = ["torch", pytest.param("numba", marks=needs_numba)]
LOSS = LossSettings(user_l2=0.3, item_l2=0.2, bias_l2=0.1)  # compiled once for all of this file
UNIFORM = NegativeSettings(count=3, block_size=1)  # a part of a sum is whole blocks
IN_BATCH = NegativeSettings("in-batch", block_size=16)
PROPOSALS = pytest.mark.parametrize("settings", [UNIFORM, IN_BATCH], ids=["own", "shared"])


def pairs(users, items):
    return Interactions(torch.tensor(users, dtype=torch.int32), torch.tensor(items, dtype=torch.int32))


@pytest.mark.parametrize("backend", BACKENDS)
@PROPOSALS
def test_gradients_are_added(backend, settings):
    tables, batch, negatives = make_tables(3), make_batch(40), make_negatives(settings)
    once, twice = tables.zeros_like(), tables.zeros_like()
    for gradients in (once, twice, twice):
        add_gradients(tables, gradients, batch, negatives, LOSS, key=KEY, step=0, backend=backend)
    for one, two in zip(once, twice, strict=True):
        assert one.any()
        torch.testing.assert_close(two, 2 * one)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", [UNIFORM, NegativeSettings("shared", count=3)], ids=["own", "shared"])
def test_a_user_without_free_items_adds_nothing_but_counts_in_the_batch(backend, settings):
    tables, negatives = make_tables(3), Negatives(settings, 7, NUM_ITEMS, make_known())
    first, second = tables.zeros_like(), tables.zeros_like()
    call = {"key": KEY, "step": 0, "backend": backend}
    value = add_gradients(tables, first, pairs([4], [2]), negatives, LOSS, **call)
    both = add_gradients(tables, second, pairs([4, 0], [2, 2]), negatives, LOSS, **call)
    torch.testing.assert_close(both, value)
    for one, two in zip(first, second, strict=True):
        assert one.any()
        torch.testing.assert_close(two, one / 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logit", [1e-3, 1.0, 20.0, 88.0, 150.0, 1e4])
@pytest.mark.parametrize("sign", [1, -1])
def test_stable_for_large_logits(backend, logit, sign):
    """One negative, of the same logit as the positive."""
    tables, batch = make_tables(3), make_batch(64)
    for table in tables:
        table.zero_()
    tables.users[:, 0], tables.items[:, 0] = logit, sign
    gradients, negatives = tables.zeros_like(), make_negatives(NegativeSettings(count=1))
    loss = LossSettings(user_l2=0.3, item_l2=0.3)
    value = add_gradients(tables, gradients, batch, negatives, loss, key=KEY, step=0, backend=backend)
    weight = float((batch.user_index != 0).sum())
    x = torch.tensor(sign * logit, dtype=torch.float64)
    softplus = torch.nn.functional.softplus
    assert float(value) == pytest.approx(weight * float(softplus(x) + softplus(-x)), rel=1e-6)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    coefficient = float(torch.sigmoid(x) - torch.sigmoid(-x)) / 64
    assert float(gradients.item_bias.double().sum()) == pytest.approx(
        weight * coefficient, rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_losses_are_not_lost(backend):
    tables, batch = make_tables(3), make_batch(130)
    for table in tables:
        table.zero_()
    tables.users[:, 0], tables.items[:, 0] = 20.0, 1.0
    negatives = make_negatives(NegativeSettings(count=0))
    value = loss_sum(tables, batch, negatives, LOSS, key=KEY, step=0, backend=backend)
    count = int((batch.user_index != 0).sum())
    assert float(value) == pytest.approx(count * torch.tensor(-20.0).double().exp().log1p().item(), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@PROPOSALS
def test_a_diverged_run_shows_in_the_loss(backend, value, settings):
    tables, batch = make_tables(3), make_batch(200)
    tables.users[5] = value
    call = {"key": KEY, "step": 0, "backend": backend}
    total = add_gradients(tables, tables.zeros_like(), batch, make_negatives(settings), LOSS, **call)
    assert not total.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@PROPOSALS
def test_a_long_sum_is_that_of_its_parts_in_float64(backend, settings, monkeypatch):
    """Parts of 70 positives at most, whole blocks of 16 where blocks share."""
    tables, batch, negatives = make_tables(3), make_batch(300), make_negatives(settings)
    whole = float(loss_sum(tables, batch, negatives, LOSS, key=KEY, step=3, backend=backend))
    module, name = {"numba": (numba_cpu, "_PART_ROWS"), "torch": (reference, "_ROWS_AT_A_TIME")}[backend]
    dataflow, run = {
        ("numba", False): (own_numba, "run_batch"),
        ("numba", True): (shared_numba, "run_batch"),
        ("torch", False): (own_reference, "batch_loss"),
        ("torch", True): (shared_reference, "batch_loss"),
    }[backend, settings.is_shared]
    scored, unpatched = [], getattr(dataflow, run)

    def recorded(*arguments, first_position, **options):
        (part,) = (argument for argument in arguments if isinstance(argument, Interactions))
        scored.append((first_position, len(part)))
        return unpatched(*arguments, first_position=first_position, **options)

    monkeypatch.setattr(dataflow, run, recorded)
    monkeypatch.setattr(module, name, 70)
    cut = loss_sum(tables, batch, negatives, LOSS, key=KEY, step=3, backend=backend)
    size = 64 if settings.is_shared else 70
    assert scored == [(first, min(size, 300 - first)) for first in range(0, 300, size)]
    assert cut.dtype == torch.float64
    assert float(cut) == pytest.approx(whole, rel=1e-6 if backend == "torch" else 1e-12)


def test_the_users_row_is_updated_by_a_single_positive():
    """``-(1 - sigmoid(-1e4)) * -100`` without negatives, worked out by hand."""
    tables = Tables(torch.tensor([[100.0, 0, 0, 0]]), torch.tensor([[100.0, 0, 0, 0], [-100.0, 0, 0, 0]]))
    gradients, negatives = tables.zeros_like(), Negatives(NegativeSettings(count=0), 1, 2)
    call = {"key": KEY, "step": 0, "backend": "torch"}
    value = add_gradients(tables, gradients, pairs([0], [1]), negatives, LossSettings(), **call)
    assert float(value) == pytest.approx(1e4)
    assert gradients.users[0, 0] == 100
