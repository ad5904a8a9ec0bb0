"""The schedule: a pure function of the configuration and of how the phases so far have ended."""

import dataclasses

from fasttower.config import TrainingConfig
from fasttower.training.plan import Outcome, Phase, Plan

CONFIG = TrainingConfig(seed=7, epochs=30, l2=(0.06, 0.03, 0.1))


def phases(plan, endings):
    """The phases of a plan whose phases end, one after another, with an epoch and a score."""
    outcomes, found = [], []
    while (phase := plan.next_phase(outcomes)) is not None:
        found.append(phase)
        outcomes.append(Outcome(phase, *endings[len(outcomes)]))
    return found


CHOICES = [Phase("choose", 7, l2, 30) for l2 in CONFIG.l2]


def test_the_best_l2_and_its_epoch_are_trained_again():
    endings = [(12, 0.2), (8, 0.3), (20, 0.25), (8,)]
    plan = Plan.of(CONFIG, validated=True)
    assert phases(plan, endings) == [*CHOICES, Phase("refit", 7, 0.03, 8)]


def test_the_first_of_equals_is_chosen():
    plan = Plan.of(CONFIG, validated=True)
    assert phases(plan, [(12, 0.2), (8, 0.3), (20, 0.3), (8,)])[-1] == Phase("refit", 7, 0.03, 8)


def test_without_refit_the_choice_is_all():
    plan = Plan.of(dataclasses.replace(CONFIG, refit=False), validated=True)
    assert phases(plan, [(12, 0.2), (8, 0.3), (20, 0.25)]) == CHOICES


def test_without_a_validation_part_there_is_one_phase():
    assert phases(Plan.of(CONFIG, validated=False), [(30,)]) == [Phase("train", 7, 0.06, 30)]


def test_each_seed_chooses_for_itself():
    config = dataclasses.replace(CONFIG, seeds=2, l2=(0.06, 0.03))
    endings = [(12, 0.2), (8, 0.3), (8,), (5, 0.4), (9, 0.1), (5,)]
    assert phases(Plan.of(config, validated=True), endings) == [
        Phase("choose", 7, 0.06, 30),
        Phase("choose", 7, 0.03, 30),
        Phase("refit", 7, 0.03, 8),
        Phase("choose", 8, 0.06, 30),
        Phase("choose", 8, 0.03, 30),
        Phase("refit", 8, 0.06, 5),
    ]


def test_what_chooses_trains_on_train_and_all_else_on_fit():
    parts = {name: Phase(name, 0, 0.0, 1).part for name in ("choose", "refit", "train", "update")}
    assert parts == {"choose": "train", "refit": "fit", "train": "fit", "update": "fit"}
