"""New users' vectors: the optimum of the training loss with the items fixed."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

from fasttower.training import fold_in as module
from fasttower.training.fold_in import fold_in
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.sampled_bce import LossSettings

NUM_USERS, NUM_ITEMS, DIM = 13, 37, 5


def made_up(scale=1.0, num_items=NUM_ITEMS):
    """Users who touched nothing, one thing, many and all, and the items' vectors and biases."""
    generator = torch.Generator().manual_seed(1)
    touched = torch.rand(NUM_USERS, num_items, generator=generator) < 0.3
    touched[0], touched[1], touched[2] = False, True, False
    touched[2, 7] = True
    users, items = touched.nonzero().unbind(1)
    known = KnownPositives.from_pairs(users, items, NUM_USERS, num_items)
    vectors = torch.randn(num_items, DIM, generator=generator) * scale
    return known, touched, vectors, torch.randn(num_items, generator=generator)


def expected_loss(u, touched, vectors, bias, settings, exclude):
    """Of one user, in float64: the training loss of its positives on the mean over the negatives."""
    logits = vectors.double() @ u + bias.double()
    drawn = ~touched if exclude else torch.ones_like(touched)
    loss = softplus(-logits[touched]).mean() + settings.l2 * (u * u).sum()
    if drawn.any():
        loss = loss + settings.num_negatives * softplus(logits[drawn]).mean()
    return loss


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize(("negatives", "l2"), [(10, 0.05), (1, 0.5), (0, 0.01)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_vectors_are_where_the_loss_has_no_slope(exclude, negatives, l2, scale):
    known, touched, vectors, bias = made_up(scale)
    settings = LossSettings(negatives, l2)
    found = fold_in(known, vectors, bias, settings, exclude_known_positives=exclude)
    assert found.shape == (NUM_USERS, DIM)
    for user in range(1, NUM_USERS):
        u = found[user].double().requires_grad_()
        loss = expected_loss(u, touched[user], vectors, bias, settings, exclude)
        (slope,) = torch.autograd.grad(loss, u)
        # A slope of g costs less than |g|^2 / (4 l2) in the loss, which is at least 2 l2 convex.
        assert float(slope.norm() ** 2 / (4 * l2)) < 1e-5 * float(loss.detach())


def test_a_full_step_that_would_overshoot_is_cut_short():
    # Where every logit starts far below zero the loss is all slope and no curvature.
    known, touched, vectors, _ = made_up(3.0)
    bias = torch.full((NUM_ITEMS,), -30.0)
    settings = LossSettings(10, 0.001)
    found = fold_in(known, vectors, bias, settings, exclude_known_positives=True)
    for user in range(1, NUM_USERS):
        u = found[user].double().requires_grad_()
        loss = expected_loss(u, touched[user], vectors, bias, settings, exclude=True)
        (slope,) = torch.autograd.grad(loss, u)
        assert float(slope.norm()) < 1e-2


def test_a_user_who_touched_nothing_is_left_to_the_bias():
    known, _, vectors, bias = made_up()
    assert (fold_in(known, vectors, bias, LossSettings(), exclude_known_positives=True)[0] == 0).all()


def test_no_bias_counts_as_a_bias_of_zero():
    known, _, vectors, bias = made_up()
    without = fold_in(known, vectors, None, LossSettings(l2=0.1), exclude_known_positives=True)
    zeros = fold_in(
        known, vectors, torch.zeros_like(bias), LossSettings(l2=0.1), exclude_known_positives=True
    )
    assert without.equal(zeros)


def test_the_loss_scale_changes_nothing_as_it_scales_l2_as_well():
    known, _, vectors, bias = made_up()
    one, other = (
        fold_in(known, vectors, bias, LossSettings(10, 0.1, scale), exclude_known_positives=True)
        for scale in ("positives", "pairs")
    )
    assert one.equal(other)


@pytest.mark.parametrize("tile_bytes", [1 << 10, 1])
def test_chunks_of_users_and_tiles_of_items_change_rounding_alone(monkeypatch, tile_bytes):
    known, _, vectors, bias = made_up()
    whole = fold_in(known, vectors, bias, LossSettings(l2=0.1), exclude_known_positives=True)
    monkeypatch.setattr(module, "_CHUNK_USERS", 3)
    monkeypatch.setattr(module, "_TILE_BYTES", tile_bytes)  # 17 items, and one
    parts = fold_in(known, vectors, bias, LossSettings(l2=0.1), exclude_known_positives=True)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)


def test_without_l2_the_vectors_are_finite():
    known, _, vectors, bias = made_up()
    found = fold_in(known, vectors, bias, LossSettings(0, 0.0), exclude_known_positives=True)
    assert found.isfinite().all()
    assert float(found.norm(dim=1).max()) < 1e3


def test_a_sample_of_a_large_catalogue_stands_for_it(monkeypatch):
    known, touched, vectors, bias = made_up(num_items=4001)
    settings = LossSettings(10, 0.1)
    exact = fold_in(known, vectors, bias, settings, exclude_known_positives=True)
    monkeypatch.setattr(module, "_MOST_DRAWN_ITEMS", 2000)
    sampled = fold_in(known, vectors, bias, settings, exclude_known_positives=True)
    assert not sampled.equal(exact)
    for user in range(2, NUM_USERS):
        losses = [
            float(expected_loss(found[user].double(), touched[user], vectors, bias, settings, exclude=True))
            for found in (exact, sampled)
        ]
        assert losses[1] < 1.002 * losses[0]


def test_it_repeats_bit_for_bit():
    known, _, vectors, bias = made_up()
    first, second = (
        fold_in(known, vectors, bias, LossSettings(), exclude_known_positives=True) for _ in range(2)
    )
    assert first.equal(second)
    assert math.isfinite(float(first.sum()))


@pytest.mark.slow
def test_folding_in_a_trained_users_history_gives_back_most_of_the_top_10(ml_1m):
    import fasttower

    run = fasttower.fit(ml_1m, fasttower.Config(min_rating=3, l2=(0.06,)))
    history = run.known_positives
    users = np.repeat(np.arange(history.num_users), history.degrees.numpy())
    frame = run.users[users].select("user_id").with_columns(run.items[history.items.numpy()]["item_id"])
    own = run.recommend(k=10)
    folded = run.recommend_new(frame, k=10)
    same = own.join(folded, on=["user_id", "item_id"], how="semi")
    assert len(folded) == len(own)
    assert len(same) / len(own) > 0.8
