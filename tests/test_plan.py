"""The schedule: a pure function of the configuration and of how the phases so far have ended."""

import dataclasses

import torch

from fasttower.config import TrainingConfig
from fasttower.training.plan import Outcome, Phase, Plan, trials_of
from fasttower.training.search import Scores

CONFIG = TrainingConfig(seed=7, epochs=30, loss="bce", l2=0.06)
"""Of which one candidate is left."""


def scored(phase, score_at):
    """The outcome of a phase whose every epoch is scored."""
    epochs = range(phase.begins_after + 1, phase.epochs + 1) if phase.searches else ()
    return Outcome(
        phase,
        tuple(
            Scores(
                epoch,
                torch.arange(4) + 4 * (phase.cut or 0),
                torch.full((4,), score_at(phase, epoch)).double(),
                0.5,
            )
            for epoch in epochs
        ),
    )


def phases(plan, score_at=lambda phase, epoch: 0.5):
    """The phases of a plan whose epochs score as a function says."""
    outcomes = []
    while (phase := plan.next_phase(outcomes)) is not None:
        outcomes.append(scored(phase, score_at))
    return [outcome.phase for outcome in outcomes]


def spans(found):
    return [(phase.name, phase.cut, phase.begins_after, phase.epochs) for phase in found]


def test_a_candidate_goes_on_from_rung_to_rung_while_it_gains_and_its_best_epoch_is_trained_again():
    plan = Plan.of(CONFIG, 100, cuts=1)
    assert spans(phases(plan, lambda phase, epoch: -abs(epoch - 11))) == [
        ("search", 0, 0, 2),
        ("search", 0, 2, 4),
        ("search", 0, 4, 8),
        ("search", 0, 8, 16),
        ("search", 0, 16, 30),
        ("refit", None, 0, 11),
    ]


def test_what_does_not_gain_is_not_trained_further():
    plan = Plan.of(CONFIG, 100, cuts=1)
    assert spans(phases(plan, lambda phase, epoch: -abs(epoch - 3)))[3:] == [("refit", None, 0, 3)]


def test_a_rung_is_gone_through_on_each_cut_and_their_users_decide_together():
    def score_at(phase, epoch):
        return float(epoch == (2 if phase.cut else 3)) + 0.5 * (epoch == 1)

    plan = Plan.of(dataclasses.replace(CONFIG, epochs=4, refit=False, prefer="accuracy"), 100, cuts=2)
    assert spans(phases(plan, score_at)) == [
        ("search", 0, 0, 2),
        ("search", 1, 0, 2),
        ("search", 0, 2, 4),
        ("search", 1, 2, 4),
        ("refit", 0, 0, 1),
    ]


def test_a_trial_is_one_when_all_its_cuts_are_done():
    plan = Plan.of(CONFIG, 100, cuts=2)
    first = scored(plan.next_phase([]), lambda *_: 0.25)
    assert trials_of([first], 2) == []
    second = scored(plan.next_phase([first]), lambda *_: 0.75)
    (trial,) = trials_of([first, second], 2)
    assert trial.best().mean == 0.5
    assert len(trial.best().per_user) == 8


def test_without_a_validation_part_there_is_one_phase():
    assert phases(Plan.of(CONFIG, 100, cuts=0)) == [Phase("train", 7, 30)]
    assert phases(Plan.of(dataclasses.replace(CONFIG, epochs=None), 100, cuts=0)) == [Phase("train", 7, 30)]


def test_epochs_that_are_given_are_trained_exactly_where_nothing_is_searched_for():
    exact = dataclasses.replace(CONFIG, search="none")
    assert phases(Plan.of(exact, 100, cuts=1)) == [Phase("train", 7, 30)]
    assert phases(Plan.of(dataclasses.replace(exact, refit=False), 100, cuts=2)) == [
        Phase("train", 7, 30, cut=0)
    ]
    open_ = dataclasses.replace(exact, epochs=None)
    assert {phase.name for phase in phases(Plan.of(open_, 100, cuts=1))} == {"search", "refit"}


def test_what_diverges_ends_and_its_other_cuts_are_left_out():
    plan = Plan.of(TrainingConfig(), 100, cuts=2)
    first = plan.next_phase([])
    gone = dataclasses.replace(scored(first, lambda *_: 0.9), diverged=True)
    second = plan.next_phase([gone])
    assert second.candidate != first.candidate
    assert second.cut == 0
    (trial,) = trials_of([gone], 2)
    assert trial.diverged
    assert not trial.rungs


def test_each_seed_searches_for_itself():
    config = dataclasses.replace(CONFIG, seeds=2, epochs=2)
    found = phases(Plan.of(config, 100, cuts=1), lambda phase, epoch: -abs(epoch - (phase.seed - 6)))
    assert [(phase.name, phase.seed, phase.epochs) for phase in found] == [
        ("search", 7, 2),
        ("refit", 7, 1),
        ("search", 8, 2),
        ("refit", 8, 2),
    ]
