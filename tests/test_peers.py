"""The recommenders that benchmarks compare with, against their textbook formulas."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from benchmarks import peers
from benchmarks.peers import PEERS, Factors, Peer, Scores, ease, item_knn
from benchmarks.selection import Holdout, choose, fit_and_test
from fasttower_kernels.known_positives import KnownPositives

USERS, ITEMS = 40, 23


@pytest.fixture
def matrix():
    dense = np.random.default_rng(0).random((USERS, ITEMS)) < np.linspace(0.05, 0.5, ITEMS)
    dense[:, 3] = False  # an item that nobody has
    return csr_matrix(dense.astype(np.float32))


def ease_by_the_book(dense, l2):
    inverse = np.linalg.inv(dense.T @ dense + l2 * np.eye(dense.shape[1]))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return dense @ weights


@pytest.mark.parametrize("most_dense", [ITEMS, 0], ids=["inverse", "conjugate gradients"])
def test_ease(matrix, monkeypatch, most_dense):
    monkeypatch.setattr(peers, "MOST_DENSE_ITEMS", most_dense)
    monkeypatch.setattr(peers, "BLOCK", 7)  # several blocks, and a shorter one
    expected = ease_by_the_book(matrix.toarray().astype(np.float64), 5.0)
    users = np.array([0, 7, 39])
    np.testing.assert_allclose(ease(matrix, l2=5.0).of(users), expected[users], atol=2e-3)


def item_knn_by_the_book(dense, neighbours, shrink):
    similarity = np.zeros((ITEMS, ITEMS))
    for i in range(ITEMS):
        for j in range(ITEMS):
            if common := float(dense[:, i] @ dense[:, j]) * (i != j):
                similarity[i, j] = common / (np.sqrt(dense[:, i].sum() * dense[:, j].sum()) + shrink)
    for i in range(ITEMS):  # of each item that is scored, all but the nearest others
        similarity[np.argsort(-similarity[:, i], kind="stable")[neighbours:], i] = 0
    scores = dense @ similarity
    scores[scores == 0] = -np.inf
    return scores


@pytest.mark.parametrize(("neighbours", "shrink"), [(2, 0.0), (5, 3.0), (100, 1.0)])
def test_item_knn(matrix, neighbours, shrink):
    expected = item_knn_by_the_book(matrix.toarray(), neighbours, shrink)
    users = np.arange(USERS)
    scores = item_knn(matrix, neighbours=neighbours, shrink=shrink).of(users)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert np.isneginf(scores[:, 3]).all()


def test_ties_go_to_the_smaller_index_and_what_is_not_recommended_is_left_out():
    scores = np.array([[1.0, -2.0, 1.0, -np.inf, -0.0, 0.0, 3.0]], np.float32)
    seen = KnownPositives.from_pairs(torch.tensor([0]), torch.tensor([6]), 1, 7)
    found = Scores(lambda users: scores[users]).top(torch.tensor([0]), 7, seen)
    assert found.tolist() == [[0, 2, 4, 5, 1, -1, -1]]


def held_out(matrix):
    """Two of each user's items are held out, so that a model has something to find."""
    coo = matrix.tocoo()
    order = np.lexsort((np.random.default_rng(1).random(coo.nnz), coo.row))
    last = np.r_[coo.row[order][2:] != coo.row[order][:-2], True, True]
    train, test = order[~last], order[last]
    ones = np.ones(len(train), np.float32)
    kept = csr_matrix((ones, (coo.row[train], coo.col[train])), shape=matrix.shape)

    def pairs(rows):
        return torch.tensor(coo.row[rows]), torch.tensor(coo.col[rows])

    seen, truth = (KnownPositives.from_pairs(*pairs(rows), USERS, ITEMS) for rows in (train, test))
    return Holdout(kept, seen, torch.arange(USERS), truth, 5)


def test_the_search_goes_uphill_from_the_best_point_of_the_grid(matrix):
    best, asked = {"x": 64, "y": 0.125}, []

    def fit(matrix, *, x, y):
        asked.append((x, y))
        # The items of the truth in front for as many users as the settings are near the best ones.
        distance = abs(np.log2(x / best["x"])) + abs(np.log2(y / best["y"]))
        scores = np.zeros((USERS, ITEMS), np.float32)
        for user in range(max(0, USERS - int(4 * distance))):
            scores[user, holdout.truth.items[holdout.truth.indptr[user] : holdout.truth.indptr[user + 1]]] = 1
        return Scores(lambda users: scores[users].copy())

    holdout = held_out(matrix)
    grid = {"x": (8, 32), "y": (1.0, 4.0)}
    assert choose(Peer(fit, grid, {"x": 48}), [holdout]).settings == {"x": 32, "y": 0.125}
    asked.clear()
    found = choose(Peer(fit, grid), [holdout])
    assert found.settings == best
    assert found.ndcg == pytest.approx(1)
    assert found.tried == len(asked) == len(set(asked))


@pytest.mark.parametrize("name", ["implicit ALS", "implicit BPR"])
def test_of_an_iterated_peer_the_best_iteration_is_chosen(matrix, name):
    pytest.importorskip("implicit")
    holdout = held_out(matrix)
    peer = Peer(PEERS[name].fit, {"factors": (4,)}, {"factors": 8}, 8)
    choice = choose(peer, [holdout])
    seen = {}

    def after(iteration, model):
        seen[iteration] = float(holdout.metrics(model)[1].mean())
        return iteration == 8

    settings = {**choice.settings, "iterations": 8}
    peer.fit(holdout.matrix, **settings, seed=0, after=after)
    assert max(seen, key=seen.get) == choice.settings["iterations"]
    assert seen[choice.settings["iterations"]] == pytest.approx(choice.ndcg)
    # Trained anew for as many iterations it is the same model.
    again = fit_and_test(peer, choice.settings, holdout, 0)
    assert again["test"]["NDCG@5"] == pytest.approx(choice.ndcg)


def test_factors_rank_by_their_dot_product():
    model = Factors(
        torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 3.0], [2.0, 1.0], [3.0, 2.0]])
    )
    seen = KnownPositives.from_pairs(torch.tensor([1]), torch.tensor([0]), 2, 3)
    assert model.top(torch.tensor([0, 1]), 2, seen).tolist() == [[2, 1], [2, 1]]
