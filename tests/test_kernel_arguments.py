"""What compiled code would read or write beside its arrays is refused at the public functions."""

import pytest
import torch

from fasttower_kernels.errors import FastTowerError
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.sampled_bce import LossSettings, bce_sum, train_step
from fasttower_kernels.tables import Interactions, Tables
from fasttower_kernels.train_steps import StepSettings, TrainState, run_steps

SETTINGS = StepSettings(LossSettings(2), learning_rate=0.05, batch_size=4, seed=9)


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


def step(parameters, batch, known=None, *, number=0, gradients=None):
    gradients = parameters.zeros_like() if gradients is None else gradients
    train_step(parameters, gradients, batch, known, LossSettings(2), key=(1, 2), step=number)


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


@pytest.mark.parametrize("rows", [[(0, 3)], [(5, 0)], [(-1, 0)], [(0, 0), (1, -1)]])
def test_indices_outside_the_tables_are_refused(rows):
    with pytest.raises(FastTowerError, match="indices reach"):
        step(tables(), pairs(*rows))
    with pytest.raises(FastTowerError, match="indices reach"):
        bce_sum(tables(), pairs(*rows), None, LossSettings(2), key=(1, 2), step=0)
    with pytest.raises(FastTowerError, match="indices reach"):
        run_steps(TrainState.start(tables()), pairs(*rows), None, SETTINGS, first_step=0, num_steps=1)


@pytest.mark.parametrize(("users", "items"), [(4, 3), (6, 3), (5, 2), (5, 4)])
def test_known_positives_of_other_tables_are_refused(users, items):
    known = KnownPositives.from_pairs(torch.tensor([0]), torch.tensor([0]), users, items)
    with pytest.raises(FastTowerError, match="known positives are of"):
        step(tables(), pairs((0, 0)), known)


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
def test_tables_that_compiled_code_cannot_take_are_refused(parameters, message):
    pytest.importorskip("numba")
    with pytest.raises(FastTowerError, match=message):
        step(parameters, pairs((0, 0)))
    with pytest.raises(FastTowerError, match=message):
        bce_sum(parameters, pairs((0, 0)), None, LossSettings(2), key=(1, 2), step=0)
    with pytest.raises(FastTowerError, match=message):
        run_steps(TrainState.start(parameters), pairs((0, 0)), None, SETTINGS, first_step=0, num_steps=1)


def test_gradients_of_other_shapes_are_refused():
    with pytest.raises(FastTowerError, match="gradients are"):
        step(tables(), pairs((0, 0)), gradients=tables(items=2))
    state = TrainState(tables(), tables(users=4), tables(), tables())
    with pytest.raises(FastTowerError, match="gradients are"):
        run_steps(state, pairs((0, 0)), None, SETTINGS, first_step=0, num_steps=1)


@pytest.mark.parametrize("number", [-1, 2**32])
def test_steps_beyond_their_word_are_refused(number):
    with pytest.raises(FastTowerError, match="step is"):
        step(tables(), pairs((0, 0)), number=number)
    with pytest.raises(FastTowerError, match="step is"):
        run_steps(TrainState.start(tables()), pairs((0, 0)), None, SETTINGS, first_step=number, num_steps=1)


def test_nothing_to_train_on_is_refused():
    nothing = Interactions(torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32))
    with pytest.raises(FastTowerError, match="no interactions"):
        run_steps(TrainState.start(tables()), nothing, None, SETTINGS, first_step=0, num_steps=1)
