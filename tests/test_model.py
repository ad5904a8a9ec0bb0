"""The model: scores, starts, and the tables that training sees."""

import pytest
import torch

from fasttower.errors import FastTowerError
from fasttower.model import TwoTower


def make(dim=5, *, item_bias=True):
    return TwoTower(4, 6, dim, item_bias=item_bias).initialise(seed=3, scale=0.5)


def test_scores_are_dot_products_with_bias():
    model = make()
    with torch.no_grad():
        model.item_bias.copy_(torch.arange(6.0))
    users, items = torch.tensor([0, 3, 3]), torch.tensor([5, 0, 5])
    expected = model.infer_users() @ model.infer_items().T + model.item_bias
    torch.testing.assert_close(model.score(users, items), expected[users, items])
    torch.testing.assert_close(model.infer_users(users), model.infer_users()[users])


def test_without_bias():
    model = make(item_bias=False)
    assert model.item_bias is None
    assert model.tables.item_bias is None
    assert set(model.saved_tensors()) == {"user_embedding", "item_embedding"}


def test_start_is_normal_and_keyed_by_the_seed():
    model = TwoTower(400, 300, 10).initialise(seed=1, scale=0.5)
    vectors = model.infer_users().detach()
    assert abs(float(vectors.mean())) < 0.03
    assert float(vectors.std()) == pytest.approx(0.5, rel=0.05)
    items = model.infer_items().detach()
    assert float(items.std()) == pytest.approx(0.5, rel=0.05)
    assert not vectors[:300].equal(items)
    assert vectors.equal(TwoTower(400, 300, 10).initialise(seed=1, scale=0.5).infer_users())
    assert not vectors.equal(TwoTower(400, 300, 10).initialise(seed=2, scale=0.5).infer_users())
    assert not model.item_bias.any()


def test_tables_are_padded_with_zeros_and_shared():
    model = make(dim=5)
    assert model.tables.users.shape == (4, 8)
    assert not model.tables.users[:, 5:].any()
    model.tables.items[2, 1] = 7
    assert model.infer_items()[2, 1].item() == 7


def test_saved_tensors_come_back():
    model = make()
    tensors = model.saved_tensors()
    assert tensors["user_embedding"].shape == (4, 5)
    again = TwoTower.from_saved(tensors)
    for name, tensor in again.saved_tensors().items():
        assert tensor.equal(tensors[name])


def test_weights_that_do_not_fit():
    with pytest.raises(FastTowerError, match="user_embedding"):
        TwoTower.from_saved({"user_embedding": torch.zeros(2, 3), "item_embedding": torch.zeros(2, 4)})
