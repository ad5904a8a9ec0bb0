"""New users' vectors: the optimum of the training loss with the items fixed."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

import fasttower.training.fold_in as module
import fasttower.training.fold_in.items as items_module
from fasttower.errors import FastTowerError
from fasttower.training.fold_in import fold_in
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.settings import LossName, LossSettings, NegativeSettings

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


LOSSES = {
    "bce": LossSettings(user_l2=0.05),
    "gbce": LossSettings("gbce", user_l2=0.05),
    "bpr": LossSettings("bpr", user_l2=0.05),
    "softmax": LossSettings("softmax", user_l2=0.05),
}
assert set(LOSSES) == set(get_args(LossName))  # each has a problem of its own
NEGATIVES = {
    "uniform": NegativeSettings(count=10),
    "one": NegativeSettings(count=1),
    "none": NegativeSettings(count=0),
    "popularity": NegativeSettings("popularity", count=4),
    "shared": NegativeSettings("shared", count=20),
    "mixed": NegativeSettings("mixed", count=5, block_size=16),
}


def negatives_of(settings, known, *, exclude=True):
    counts = torch.arange(known.num_items) % 7
    known = known if exclude else None
    return Negatives(settings, NUM_USERS, NUM_ITEMS if known is None else known.num_items, known, counts, 100)


def expected_loss(u, touched, vectors, bias, loss, negatives):
    """Of one user, in float64: the training loss of its positives on the mean over the negatives."""
    settings, num_items = negatives.settings, len(vectors)
    logits = vectors.double() @ u + bias.double()
    free = ~touched if negatives.known_positives is not None else torch.ones_like(touched)
    counts = negatives.item_counts.double().clamp(min=0.5)
    rates = torch.full((num_items,), settings.count / num_items, dtype=torch.float64)
    if settings.proposal == "popularity":
        rates = settings.count * counts**0.75 / (counts**0.75).sum()
    if settings.proposal == "mixed":
        rates = rates + settings.block_size * counts / 100
    if negatives.known_positives is not None and not settings.is_shared:
        rates = rates * rates.sum() / rates[free].sum().clamp(min=1e-12)
    positives, drawn, rates = logits[touched], logits[free], rates[free]
    beta = 1.0
    if loss.name == "gbce":
        share = min(1.0, settings.count / (num_items if settings.is_shared else max(int(free.sum()), 1)))
        beta = 1 - loss.calibration * (1 - share)
    value = loss.user_l2 * (u * u).sum() * (loss.similarity == "dot")
    if loss.name == "softmax":
        return value + (torch.logaddexp(positives, drawn.logsumexp(0)) - positives).mean()
    if loss.name == "bpr":
        return value + (softplus(drawn[None] - positives[:, None]) @ rates).mean()
    return value + beta * softplus(-positives).mean() + rates @ softplus(drawn)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_vectors_are_where_the_loss_has_no_slope(loss, negatives, exclude, scale):
    if LOSSES[loss].name == "gbce" and negatives in ("popularity", "mixed"):
        return
    known, touched, vectors, bias = made_up(scale)
    loss, negatives = LOSSES[loss], negatives_of(NEGATIVES[negatives], known, exclude=exclude)
    found = fold_in(known, vectors, bias, loss, negatives)
    assert found.shape == (NUM_USERS, DIM)
    for user in range(1 if not exclude else 2, NUM_USERS):
        u = found[user].double().requires_grad_()
        value = expected_loss(u, touched[user], vectors, bias, loss, negatives)
        (slope,) = torch.autograd.grad(value, u)
        # A slope of g costs less than |g|^2 / (4 l2) in the loss, which is at least 2 l2 convex.
        assert float(slope.norm() ** 2 / (4 * loss.user_l2)) < 2e-5 * (1 + float(value.detach()))


@pytest.mark.parametrize("name", LOSSES)
def test_with_cosine_the_vectors_are_the_best_on_their_sphere(name):
    known, touched, vectors, bias = made_up()
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    loss = LossSettings(name, similarity="cosine", temperature=0.25)
    negatives = negatives_of(NegativeSettings(count=10), known)
    found = fold_in(known, vectors, bias, loss, negatives)
    torch.testing.assert_close(found[1:].norm(dim=1), torch.full((NUM_USERS - 1,), 4.0))
    for user in range(2, NUM_USERS):
        u = found[user].double().requires_grad_()
        value = expected_loss(u, touched[user], vectors, bias, loss, negatives)
        (slope,) = torch.autograd.grad(value, u)
        along = slope - (slope @ u) * u / 16
        assert float(along.norm()) < 2e-3 * (1 + float(slope.norm()))


def test_a_full_step_that_would_overshoot_is_cut_short():
    # Where every logit starts far below zero the loss is all slope and no curvature.
    known, touched, vectors, _ = made_up(3.0)
    bias = torch.full((NUM_ITEMS,), -30.0)
    loss, negatives = LossSettings(user_l2=0.001), negatives_of(NegativeSettings(count=10), known)
    found = fold_in(known, vectors, bias, loss, negatives)
    for user in range(1, NUM_USERS):
        u = found[user].double().requires_grad_()
        value = expected_loss(u, touched[user], vectors, bias, loss, negatives)
        (slope,) = torch.autograd.grad(value, u)
        assert float(slope.norm()) < 1e-2


UNIFORM = NegativeSettings(count=10)


def test_a_user_who_touched_nothing_is_left_to_the_bias():
    known, _, vectors, bias = made_up()
    assert (fold_in(known, vectors, bias, LossSettings(), negatives_of(UNIFORM, known))[0] == 0).all()


def test_no_bias_counts_as_a_bias_of_zero():
    known, _, vectors, bias = made_up()
    loss, negatives = LossSettings(user_l2=0.1), negatives_of(UNIFORM, known)
    without = fold_in(known, vectors, None, loss, negatives)
    assert without.equal(fold_in(known, vectors, torch.zeros_like(bias), loss, negatives))


@pytest.mark.parametrize("tile_bytes", [1 << 10, 1])
@pytest.mark.parametrize("name", ["bce", "softmax"])
def test_chunks_of_users_and_tiles_of_items_change_only_rounding(monkeypatch, tile_bytes, name):
    known, _, vectors, bias = made_up()
    loss, negatives = LossSettings(name, user_l2=0.1), negatives_of(UNIFORM, known)
    whole = fold_in(known, vectors, bias, loss, negatives)
    monkeypatch.setattr(module, "_CHUNK_USERS", 3)
    monkeypatch.setattr(items_module, "TILE_BYTES", tile_bytes)  # 17 items, and one
    parts = fold_in(known, vectors, bias, loss, negatives)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)


def test_without_l2_the_vectors_are_finite():
    known, _, vectors, bias = made_up()
    negatives = negatives_of(NegativeSettings(count=0), known)
    found = fold_in(known, vectors, bias, LossSettings(), negatives)
    assert found.isfinite().all()
    assert float(found.norm(dim=1).max()) < 1e3


@pytest.mark.parametrize("name", LOSSES)
def test_a_sample_of_a_large_catalogue_stands_for_it(monkeypatch, name):
    known, touched, vectors, bias = made_up(num_items=2001)
    loss = LossSettings(name, user_l2=0.1)
    negatives = Negatives(UNIFORM, NUM_USERS, 2001, known, torch.ones(2001), 100)
    exact = fold_in(known, vectors, bias, loss, negatives)
    monkeypatch.setattr(items_module, "MOST_ITEMS", 1500)
    sampled = fold_in(known, vectors, bias, loss, negatives)
    assert not sampled.equal(exact)
    for user in range(2, NUM_USERS):
        losses = [
            float(expected_loss(found[user].double(), touched[user], vectors, bias, loss, negatives))
            for found in (exact, sampled)
        ]
        assert losses[1] < 1.005 * losses[0]


def test_it_repeats_bit_for_bit():
    known, _, vectors, bias = made_up()
    negatives = negatives_of(UNIFORM, known)
    first, second = (fold_in(known, vectors, bias, LossSettings(), negatives) for _ in range(2))
    assert first.equal(second)
    assert math.isfinite(float(first.sum()))


def test_hard_negatives_have_no_closed_form_and_say_so():
    known, _, vectors, bias = made_up()
    negatives = negatives_of(NegativeSettings(count=2, pool=9), known)
    with pytest.raises(FastTowerError, match=r"pool of 9.*update the run"):
        fold_in(known, vectors, bias, LossSettings(), negatives)


@pytest.mark.slow
def test_folding_in_a_trained_users_history_gives_back_most_of_the_top_10(ml_1m):
    import fasttower

    run = fasttower.fit(ml_1m, fasttower.Config(min_rating=3, l2=0.06))
    history = run.known_positives
    users = np.repeat(np.arange(history.num_users), history.degrees.numpy())
    frame = run.users[users].select("user_id").with_columns(run.items[history.items.numpy()]["item_id"])
    own = run.recommend(k=10)
    folded = run.recommend_new(frame, k=10)
    same = own.join(folded, on=["user_id", "item_id"], how="semi")
    assert len(folded) == len(own)
    assert len(same) / len(own) > 0.8
