"""What compiled code would read or write beside its arrays is refused at the public functions."""

import pytest
import torch

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.settings import LossSettings, NegativeSettings, StepSettings
from fasttower_kernels.step import Step, TrainState, add_gradients, loss_sum
from fasttower_kernels.tables import Interactions, Tables

UNIFORM = NegativeSettings(count=2)
SETTINGS = StepSettings(0.05, 4, seed=9, negatives=UNIFORM)
BACKENDS = pytest.mark.parametrize("backend", ["torch", "numba"])


def tables(users=5, items=3, width=4):
    generator = torch.Generator().manual_seed(0)
    return Tables(
        torch.randn(users, width, generator=generator),
        torch.randn(items, width, generator=generator),
        torch.zeros(items),
    )


def pairs(*rows):
    users, items = torch.tensor(rows, dtype=torch.int32).T
    return Interactions(users, items)


def uniform(parameters, known=None):
    return Negatives(UNIFORM, len(parameters.users), len(parameters.items), known)


def gradients_of(parameters, batch, negatives=None, *, step=0, gradients=None, backend="auto"):
    gradients = parameters.zeros_like() if gradients is None else gradients
    negatives = negatives or uniform(parameters)
    call = {"key": (1, 2), "step": step, "backend": backend}
    add_gradients(parameters, gradients, batch, negatives, LossSettings(), **call)


def sum_of(parameters, batch, negatives=None, *, step=0, backend="auto"):
    call = {"key": (1, 2), "step": step, "backend": backend}
    loss_sum(parameters, batch, negatives or uniform(parameters), LossSettings(), **call)


def steps_of(parameters, batch, negatives=None, *, step=0, backend="auto"):
    state = TrainState.start(parameters)
    Step(state, batch, negatives or uniform(parameters), SETTINGS, backend=backend).run(step, 1)


CALLS = pytest.mark.parametrize("call", [gradients_of, sum_of, steps_of])


def test_columns_of_a_matrix_are_taken_as_arrays():
    matrix = torch.tensor([[0, 1, 7], [4, 2, 7], [2, 0, 7]], dtype=torch.int32)
    batch = Interactions(matrix[:, 0], matrix[:, 1])
    assert batch.user_index.is_contiguous()
    assert batch.item_index.is_contiguous()
    known = KnownPositives(torch.tensor([[0, 9], [2, 9]])[:, 0], matrix[0, :2].repeat(2)[::2], 3)
    assert known.indptr.is_contiguous()
    assert known.items.is_contiguous()


def test_known_positives_of_other_dtypes_are_refused():
    with pytest.raises(FastTowerError, match="expected int64 and int32"):
        KnownPositives(torch.tensor([0, 1]), torch.tensor([0]), 3)


@CALLS
@BACKENDS
@pytest.mark.parametrize("rows", [[(0, 3)], [(5, 0)], [(-1, 0)], [(0, 0), (1, -1)]])
def test_indices_outside_the_tables_are_refused(rows, backend, call):
    with pytest.raises(FastTowerError, match="indices reach"):
        call(tables(), pairs(*rows), backend=backend)


@CALLS
@BACKENDS
@pytest.mark.parametrize(("users", "items"), [(4, 3), (6, 3), (5, 2), (5, 4)])
def test_known_positives_of_other_tables_are_refused(users, items, backend, call):
    known = KnownPositives.from_pairs(torch.tensor([0]), torch.tensor([0]), users, items)
    with pytest.raises(FastTowerError, match="known positives are of"):
        call(tables(), pairs((0, 0)), uniform(tables(), known), backend=backend)


@CALLS
@BACKENDS
@pytest.mark.parametrize(("users", "items"), [(4, 3), (6, 3), (5, 2), (5, 4)])
def test_negatives_of_other_tables_are_refused(users, items, backend, call):
    negatives = Negatives(UNIFORM, users, items)
    with pytest.raises(FastTowerError, match=r"the negatives are of \d (items|users); expected [35]"):
        call(tables(), pairs((0, 0)), negatives, backend=backend)


@CALLS
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (Tables(torch.randn(4, 5).T, torch.randn(3, 4), None), "contiguous float32"),
        (Tables(torch.randn(5, 4).double(), torch.randn(3, 4).double(), None), "contiguous float32"),
        (Tables(torch.randn(5, 3), torch.randn(3, 3), None), "a multiple of 4"),
        (Tables(torch.randn(5, 4), torch.randn(3, 8), None), "have the shapes"),
        (Tables(torch.randn(5, 4), torch.randn(3, 4), torch.zeros(2)), "have the shapes"),
    ],
)
def test_tables_that_compiled_code_cannot_take_are_refused(parameters, message, call):
    pytest.importorskip("numba")
    with pytest.raises(FastTowerError, match=message):
        call(parameters, pairs((0, 0)))


def test_gradients_of_other_shapes_are_refused():
    with pytest.raises(FastTowerError, match="gradients are"):
        gradients_of(tables(), pairs((0, 0)), gradients=tables(items=2))
    state = TrainState(tables(), tables(users=4), tables(), tables())
    with pytest.raises(FastTowerError, match="gradients are"):
        Step(state, pairs((0, 0)), uniform(tables()), SETTINGS)


@CALLS
@pytest.mark.parametrize("number", [-1, 2**32])
def test_steps_beyond_their_word_are_refused(number, call):
    with pytest.raises(FastTowerError, match="step is"):
        call(tables(), pairs((0, 0)), step=number)


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        (LossSettings("gbce"), NegativeSettings("in-batch"), "gbce is calibrated for uniform negatives"),
        (LossSettings(scale="pairs"), NegativeSettings("shared"), "loss scale pairs"),
    ],
)
def test_a_loss_and_negatives_that_do_not_go_together_are_refused(loss, settings, message):
    negatives = Negatives.of(settings, pairs((0, 0)), 5, 3, None)
    with pytest.raises(FastTowerError, match=message):
        add_gradients(tables(), tables(), pairs((0, 0)), negatives, loss, key=(1, 2), step=0)
    with pytest.raises(FastTowerError, match=message):
        loss_sum(tables(), pairs((0, 0)), negatives, loss, key=(1, 2), step=0)
    with pytest.raises(FastTowerError, match=message):
        StepSettings(0.05, 4, seed=9, loss=loss, negatives=settings)


def test_nothing_to_train_on_is_refused():
    nothing = Interactions(torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32))
    with pytest.raises(FastTowerError, match="no interactions"):
        steps_of(tables(), nothing)
