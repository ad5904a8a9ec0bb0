"""The search: which candidate goes on, which is opened, which is chosen."""

import dataclasses

import pytest
import torch

from fasttower.config import Config, TrainingConfig
from fasttower.errors import TrainingError
from fasttower.training.families import IN_BATCH, STANDARD
from fasttower.training.search import (
    Candidate,
    Scores,
    Search,
    Trial,
    chosen,
    is_scored,
    merged,
)

BCE = Candidate(*STANDARD, l2=0.06, temperature=0.2, embedding_dim=32)
COSINE = Candidate(*IN_BATCH, l2=0.0, temperature=0.14, embedding_dim=32)


def scores(epoch, mean, coverage=0.1, noise=0.0, users=400):
    """Of users whose scores differ from those of other candidates by some noise."""
    generator = torch.Generator().manual_seed(hash((epoch, mean)) % 1000)
    per_user = mean + noise * torch.randn(users, generator=generator, dtype=torch.float64)
    return Scores(epoch, torch.arange(users), per_user - per_user.mean() + mean, coverage)


def trials_until_the_end(search, score_at):
    """The trials of a search whose candidates score as a function of candidate and epoch says."""
    trials = {}
    while (found := search.next(list(trials.values()))) is not None:
        candidate, rung = found
        trial = trials.setdefault(candidate, Trial(candidate, []))
        assert len(trial.rungs) == rung
        epoch = search.epochs(candidate, rung)
        trial.rungs.append([scores(epoch, score_at(candidate, epoch), noise=1e-3)])
    return trials


def test_the_start_is_what_is_left_open():
    quick = Search.of(TrainingConfig(), 100).start
    assert [candidate.family for candidate in quick] == [STANDARD] * 3 + [IN_BATCH] * 2
    assert {candidate.embedding_dim for candidate in quick} == {32}
    assert {candidate.embedding_dim for candidate in Search.of(TrainingConfig(), 20_000).start} == {128}
    given = Search.of(TrainingConfig(l2=0.1, embedding_dim=7), 100)
    assert given.start == (BCE._replace(l2=0.1, embedding_dim=7),)
    one = Search.of(TrainingConfig(loss="softmax", temperature=0.3), 100)
    assert one.start == (COSINE._replace(temperature=0.3),)
    assert Search.of(TrainingConfig(search="none"), 100).start == (BCE,)
    thorough = Search.of(TrainingConfig(search="thorough"), 100)
    assert thorough.start == quick
    assert len(thorough.wider) > 2 * len(quick)


def test_what_needs_own_negatives_searches_among_them():
    for fields in ({"negative_pool": 20}, {"loss_scale": "pairs"}, {"deterministic": True}):
        assert {one.family for one in Search.of(TrainingConfig(**fields), 100).start} == {STANDARD}


def test_the_value_outward_of_the_edge_is_tried_until_it_is_no_better():
    search = Search.of(TrainingConfig(), 100)
    best = {"l2": 0.06, "temperature": 0.56}

    def score_at(candidate, epoch):
        axis = candidate.family.axis
        ahead = 0.1 if candidate.family == IN_BATCH else 0.0  # the other one opens nothing all the same
        return 0.2 + ahead - 0.1 * abs(candidate.value - best[axis]) - 0.01 / epoch

    tried = trials_until_the_end(search, score_at)
    temperatures = {one.temperature for one in tried if one.family == IN_BATCH}
    assert {0.4, 0.56, 0.8} <= temperatures
    assert 0.07 not in temperatures
    assert {one.l2 for one in tried if one.family == STANDARD} == {0.03, 0.06, 0.12}


def test_a_family_that_is_clearly_behind_opens_nothing():
    search = Search.of(TrainingConfig(), 100)
    tried = trials_until_the_end(search, lambda one, epoch: 0.2 if one.family == STANDARD else 0.1)
    assert {one.temperature for one in tried if one.family == IN_BATCH} == {0.14, 0.4}


def test_the_better_half_goes_on_and_the_best_of_each_family_at_first():
    search = Search.of(TrainingConfig(), 100)
    ranks = {0.06: 5, 0.03: 4, 0.12: 3}

    def score_at(candidate, epoch):
        rank = ranks.get(candidate.l2, 0) if candidate.family == STANDARD else 0
        return 0.01 * rank + 0.001 * epoch - 0.05 * (candidate.temperature == 0.4)

    tried = trials_until_the_end(search, score_at)
    rungs = {(one.family, one.value): len(trial.rungs) for one, trial in tried.items()}
    assert rungs[STANDARD, 0.06] == max(rungs.values())
    assert rungs[STANDARD, 0.12] == 2  # of five the third, then of four
    assert rungs[IN_BATCH, 0.14] == 2
    assert rungs[IN_BATCH, 0.4] == 1


def test_what_is_wider_comes_when_the_quick_search_is_over():
    search = Search.of(TrainingConfig(search="thorough", epochs=2), 100)
    trials = list(trials_until_the_end(search, lambda candidate, epoch: 0.1))
    assert trials[: len(search.start)] == list(search.start)
    assert {64} == {one.embedding_dim for one in trials} - {32}
    assert set(search.wider) <= set(trials)


def test_what_is_alone_goes_on_for_any_gain_and_others_for_half_a_standard_error():
    search = Search.of(TrainingConfig(l2=0.03, loss="bce"), 100)
    base = scores(4, 0.1, noise=0.05)
    slightly = Scores(8, base.users, base.per_user + torch.tensor([0.02, -0.0199]).repeat(200), 0.1)
    gain, error = base.behind(slightly)
    assert 0 < gain < 0.5 * error
    trial = Trial(search.start[0], [[base], [slightly]])
    assert search.next([trial]) == (trial.candidate, 2)
    other = Trial(trial.candidate._replace(l2=0.06), [[scores(4, 0.05)]])
    assert dataclasses.replace(search, opens=False).next([trial, other]) is None


def test_nothing_is_begun_after_the_seconds():
    search = Search.of(TrainingConfig(search=5.0), 100)
    first, _ = search.next([])
    assert search.next([Trial(first, [[scores(4, 0.1)]], seconds=4.9)]) is not None
    assert search.next([Trial(first, [[scores(4, 0.1)]], seconds=5.0)]) is None


def test_epochs_are_limited_and_half_as_many_where_negatives_are_shared():
    search = Search.of(TrainingConfig(epochs=10), 100)
    assert [search.epochs(BCE, rung) for rung in range(4)] == [2, 4, 8, 10]
    assert [search.epochs(COSINE, rung) for rung in range(5)] == [1, 2, 4, 8, 10]


def test_every_epoch_is_scored_at_first_then_four_of_each_doubling_and_the_last():
    assert [epoch for epoch in range(1, 41) if is_scored(epoch, 39)] == [
        *range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 39, 40
    ]  # fmt: skip


@pytest.mark.parametrize(("prefer", "expected"), [("accuracy", 1), ("balanced", 2), ("coverage", 3)])
def test_coverage_decides_among_those_within_some_standard_errors(prefer, expected):
    # 400 users whose scores differ with a deviation of 0.02: a standard error of 0.001.
    base = scores(1, 0.2, coverage=0.1)
    error = torch.tensor([1.0, -1.0]).repeat(200).double() * 0.02
    behind = {2: 0.0009, 3: 0.0019, 4: 0.003}
    others = {
        epoch: Scores(epoch, base.users, base.per_user - by + error, epoch / 10)
        for epoch, by in behind.items()
    }
    trials = [
        Trial(
            BCE, [[base, Scores(9, base.users, base.per_user - 0.0001, 0.9)]]
        ),  # an epoch is not chosen by coverage
        *(Trial(COSINE._replace(temperature=1.0 * epoch), [[one]]) for epoch, one in others.items()),
    ]
    assert chosen(trials, prefer)[1].epoch == expected


def test_scores_of_cuts_are_those_of_all_their_users_each_once():
    left = Scores(2, torch.tensor([3, 5, 9]), torch.tensor([0.1, 0.2, 0.3]).double(), 0.2)
    right = Scores(2, torch.tensor([4, 5]), torch.tensor([0.6, 0.8]).double(), 0.4)
    together = merged([left, right])
    assert together.users.tolist() == [3, 4, 5, 9]
    assert together.per_user.tolist() == pytest.approx([0.1, 0.6, 0.5, 0.3])
    assert together.coverage == pytest.approx(0.3)
    assert merged([left]).per_user.equal(left.per_user)


def test_what_diverged_is_not_trained_further_nor_chosen():
    search = Search.of(TrainingConfig(), 100)
    trials = [Trial(one, [[scores(4, 0.1)]]) for one in search.start]
    trials[2] = Trial(search.start[2], [[scores(4, 0.9)]], diverged=True)
    trials[4] = Trial(search.start[4], [], diverged=True)
    gone = {trials[2].candidate, trials[4].candidate}
    for _ in range(20):
        found = search.next(trials)
        if found is None:
            break
        candidate, rung = found
        assert candidate not in gone
        known = next((trial for trial in trials if trial.candidate == candidate), None)
        if known is None:
            trials.append(Trial(candidate, [[scores(4, 0.1)]]))
        else:
            known.rungs.append([scores(8 << rung, 0.1)])
    assert chosen(trials, "accuracy")[0] not in gone
    with pytest.raises(TrainingError, match="all settings tried"):
        chosen([trials[2], trials[4]], "accuracy")


def test_a_candidate_is_fields_of_a_configuration():
    resolved = Config().resolved(1000, 100, **COSINE._asdict())
    assert Candidate.of(resolved) == COSINE
    assert str(COSINE) == "softmax, in-batch, cosine, temperature 0.14, dim 32"
    assert str(BCE) == "bce, uniform, dot, L2 0.06, dim 32"
    # What it trained with, given back, is the one candidate of a search.
    assert Search.of(resolved, 100).start == (COSINE,)
