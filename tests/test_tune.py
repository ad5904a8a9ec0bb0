"""`fasttower tune`: what it varies, what it keeps, how it goes on, and what it writes."""

import dataclasses
import json
import signal

import optuna
import polars as pl
import pytest
from conftest import signalled

import fasttower
from fasttower import Config, FastTowerError, TrainingError, TuneObserver
from fasttower.cli import main
from fasttower.training.families import Family
from fasttower.tuning import study as studies
from fasttower.tuning import tune as tuning
from fasttower.tuning.space import FAMILIES, VARIED, Space
from fasttower.tuning.study import Study

OPEN = Config(backend="torch", threads=1, k=5, epochs=2)
SMALL = dataclasses.replace(OPEN, embedding_dim=4, batch_size=256)
KEPT = ("bias_l2", "block_size", "num_negatives", "negative_pool", "init_scale")


class Stopping(TuneObserver):
    """Stops at a given question of whether to."""

    def __init__(self, after=None):
        self.rows, self.asked, self.after = [], 0, after

    def on_trial_end(self, row, best):
        self.rows.append(row)

    def should_stop(self):
        self.asked += 1
        return self.after is not None and self.asked > self.after


def tuned(ratings, storage=None, config=SMALL, trials=7, **others):
    return fasttower.tune(ratings, config, trials=trials, storage=storage, keep=KEPT, **others)


def asked(space, params):
    return space.settings(optuna.trial.FixedTrial(params))


def drawn(space, number=100):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.settings(study.ask()) for _ in range(number)]


@pytest.fixture(scope="module")
def undisturbed(ratings):
    return tuned(ratings)


def without_seconds(frame):
    return frame.drop("seconds")


def test_what_is_open_is_varied_and_goes_together():
    settings = drawn(Space(Config(), (), 50_000, 1000))
    found = {Family(one.loss, one.negatives, one.similarity) for one in settings}
    assert found == set(FAMILIES)
    for name in VARIED:
        assert len({getattr(one, name) for one in settings}) > 1, name
    assert {one.epochs for one in settings} == {64}
    assert all(16 <= one.embedding_dim <= 256 for one in settings)


def test_what_is_given_stays_and_so_does_what_is_kept():
    config = Config(l2=0.1, embedding_dim=7, epochs=3)
    for one in drawn(Space(config, ("learning_rate",), 50_000, 1000), 30):
        assert (one.l2, one.embedding_dim, one.learning_rate, one.epochs) == (0.1, 7, 0.01, 3)
        assert one.similarity == "dot"
    dot = Space(Config(l2=0.1, loss="bce", negatives="uniform"), (), 50_000, 1000).varied
    assert {"temperature", "similarity", "block_size", "l2"}.isdisjoint(dot)
    assert {"bias_l2", "negative_pool", "learning_rate"} <= set(dot)
    assert {one.loss for one in drawn(Space(Config(), ("loss",), 50_000, 1000), 30)} == {"bce"}
    with pytest.raises(FastTowerError, match="all settings are given"):
        Space(Config(), VARIED, 50_000, 1000)


def test_a_pool_holds_the_negatives_that_are_kept():
    for one in drawn(Space(Config(negative_pool=20), (), 50_000, 1000), 30):
        assert one.negative_pool == 20
        assert 1 <= one.num_negatives <= 20


def test_what_a_gpu_repeats_bit_for_bit_is_what_is_tried_when_asked_to():
    for one in drawn(Space(Config(deterministic=True), (), 50_000, 1000), 30):
        assert one.similarity == "dot"
        assert one.negatives in ("uniform", "popularity")
        assert one.bias_l2 == 0


def test_the_first_parameters_are_a_trainings_own_candidates():
    space = Space(Config(), (), 50_000, 20_000)
    search = tuning.Search.of(Config(), 20_000)
    standard = Config(epochs=64)
    expected = [standard.resolved(50_000, 20_000, **candidate._asdict()) for candidate in search.start]
    first = [asked(space, parameters) for parameters in space.standard()]
    assert first == [
        dataclasses.replace(one, init_scale=settings.init_scale)
        for one, settings in zip(expected, first, strict=True)
    ]
    assert [one.init_scale for one in first] == pytest.approx([one.init_scale for one in expected], rel=1e-3)


def test_trials_come_to_a_configuration_that_trains_the_same(ratings):
    # At this rate the last epoch is not the best one.
    config = dataclasses.replace(SMALL, loss="bce", epochs=5, prefer="accuracy", learning_rate=0.2)
    found = tuned(ratings, config=config, trials=4)
    assert found.trials["trial"].to_list() == [1, 2, 3, 4]
    assert found.trials["state"].head(3).to_list() == ["complete"] * 3
    best = found.trials.sort("score", descending=True).row(0, named=True)
    assert (found.score, found.config.epochs) == (best["score"], best["best_epoch"])
    assert (found.config.search, found.interrupted) == ("none", False)
    assert best["best_epoch"] < best["epochs"] == 5  # else it would not show which of them is written
    run = fasttower.fit(ratings, found.config)
    assert [record.phase for record in run.history] == ["train"] * found.config.epochs
    assert run.metrics["best_epoch"] == found.config.epochs
    assert run.config == dataclasses.replace(found.config, data="DataFrame")


def test_the_default_is_no_better_on_validation(undisturbed, ratings):
    search = fasttower.fit(ratings, SMALL).metrics["search"]
    of_both = set(undisturbed.trials["score"]) & {trial["score"] for trial in search}
    assert len(of_both) >= 2
    assert max(of_both) <= undisturbed.trials["score"].max()


@pytest.mark.parametrize("after", [1, 8, 20])
def test_what_was_stopped_goes_on_as_if_it_had_not_been(undisturbed, ratings, tmp_path, after):
    storage = tmp_path / "study.db"
    try:
        stopped = tuned(ratings, storage, observer=Stopping(after))
        assert stopped.interrupted
        assert stopped.trials.height < 7
    except FastTowerError as error:
        assert "no trial was finished" in str(error)  # noqa: PT017 - where it was stopped at once
        assert after == 1
    again = tuned(ratings, storage)
    assert without_seconds(again.trials).equals(without_seconds(undisturbed.trials))
    assert again.config == undisturbed.config
    # All is done: the result is given again.
    observer = Stopping()
    assert tuned(ratings, storage, observer=observer).config == again.config
    assert observer.rows == []


def test_a_trial_of_a_process_that_was_killed_is_begun_again(undisturbed, ratings, tmp_path, monkeypatch):
    storage = tmp_path / "100%? study.db"
    tuned(ratings, storage, trials=5)
    assert [path.name for path in tmp_path.iterdir()] == [storage.name]

    def killed(*_):
        raise SystemError

    with monkeypatch.context() as patched:
        patched.setattr(Study, "end", killed)
        with pytest.raises(SystemError):
            tuned(ratings, storage, trials=6)
    again = tuned(ratings, storage)
    assert without_seconds(again.trials).equals(without_seconds(undisturbed.trials))


def test_no_trial_is_begun_after_the_minutes(ratings, tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, *[59.0] * 10, *[61.0] * 1000])
    monkeypatch.setattr(tuning.time, "monotonic", lambda: next(clock))
    found = tuned(ratings, tmp_path / "study.db", trials=None, minutes=1)
    assert 1 <= found.trials.height < 10
    assert not found.interrupted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"l2": 0.5}, "l2 is left open, and 0.5 here"),
        ({"seed": 1}, "seed is 0, and 1 here"),
        ({"min_rating": 2.0}, "min_rating is None, and 2.0 here"),
        ({"epochs": 3}, "epochs is 2, and 3 here"),
    ],
)
def test_a_storage_of_other_settings_is_refused(ratings, tmp_path, change, said):
    storage = tmp_path / "study.db"
    tuned(ratings, storage, trials=1)
    with pytest.raises(FastTowerError, match=said) as refused:
        tuned(ratings, storage, dataclasses.replace(SMALL, **change))
    assert len(str(refused.value)) < 500


def test_a_storage_of_other_data_is_refused(ratings, tmp_path):
    storage = tmp_path / "study.db"
    tuned(ratings, storage, trials=1)
    with pytest.raises(FastTowerError, match="rows is 1600, and 1592 here"):
        tuned(ratings.head(1990), storage)
    other = ratings.with_columns(pl.col("item").reverse())
    with pytest.raises(FastTowerError, match="SHA-256 is"):
        tuned(other, storage)
    # Where they are read from is no difference.
    ratings.write_csv(tmp_path / "ratings.csv")
    assert tuned(str(tmp_path / "ratings.csv"), storage, trials=1).trials.height == 1


def test_what_is_no_storage_is_refused(ratings, tmp_path):
    storage = tmp_path / "study.db"
    storage.write_text("no database, as its first bytes say" * 100)
    with pytest.raises(FastTowerError, match=r"study.db cannot be used as a study's storage"):
        tuned(ratings, storage)
    with pytest.raises(FastTowerError, match="unable to open database file"):
        tuned(ratings, tmp_path / "no folder" / "study.db")


def test_what_diverges_has_failed_and_others_go_on(ratings, monkeypatch):
    settings = Space.settings
    rates = iter([1e30, 0.05, 1e30])
    monkeypatch.setattr(
        Space, "settings", lambda *given: dataclasses.replace(settings(*given), learning_rate=next(rates))
    )
    observer = Stopping()
    found = tuned(ratings, trials=3, observer=observer)
    assert found.trials["state"].to_list() == ["failed", "complete", "failed"]
    assert found.trials["score"].is_null().to_list() == [True, False, True]
    assert "diverged" in observer.rows[0]["reason"]
    assert found.config.learning_rate == 0.05


def test_all_trials_that_diverge_are_an_error(ratings):
    config = dataclasses.replace(SMALL, learning_rate=1e30)
    with pytest.raises(TrainingError, match="all 2 trials failed; the last: the training diverged"):
        tuned(ratings, config=config, trials=2)


def test_a_trial_behind_the_better_half_is_given_up(tmp_path):
    study = Study(tmp_path / "study.db", {}, 0)

    def ends(score, state="complete"):
        trial = study.ask([])
        is_behind = study.is_behind(trial, 4, score)
        study.end(trial, {"state": state, "score": score}, [score])
        return is_behind

    assert not ends(0.2)
    assert ends(0.1, "pruned")  # one of one is better
    assert not ends(0.15)  # of three the second
    assert ends(0.12, "pruned")  # of four the third
    trial = study.ask([])
    assert not study.is_behind(trial, 8, 0.01)  # the first to come so far


@pytest.mark.parametrize(("prefer", "expected"), [("accuracy", 1), ("balanced", 2), ("coverage", 3)])
def test_what_is_chosen_is_what_a_training_would_choose(tmp_path, prefer, expected):
    study = Study(tmp_path / "study.db", {}, 0)
    fields = {name: getattr(SMALL.resolved(1000, 100), name) for name in VARIED}
    # 400 users whose scores differ with a deviation of 0.02: a standard error of 0.001.
    for number, behind in enumerate([0.0, 0.0009, 0.0019, 0.003], start=1):
        users = [0.2 - behind + 0.02 * (number > 1) * (-1) ** user for user in range(400)]
        row = {"trial": number, "state": "complete", "score": 0.2 - behind, "coverage": number / 10}
        study.end(study.ask([]), {**row, "best_epoch": 3, "fields": fields}, users)
    again = Study(tmp_path / "study.db", {}, 0)
    assert again.chosen(prefer)["trial"] == expected


def test_the_standard_trials_are_not_pruned(ratings, monkeypatch):
    monkeypatch.setattr(Study, "is_behind", lambda *_: True)
    config = dataclasses.replace(SMALL, epochs=8)
    states = tuned(ratings, config=config, trials=7).trials["state"].to_list()
    assert states[:5] == ["complete"] * 5
    assert "pruned" in states[5:]


def test_too_few_users_to_choose_by_are_an_error(ratings):
    with pytest.raises(FastTowerError, match="the validation part has 0 users, too few to choose by"):
        tuned(ratings, config=dataclasses.replace(SMALL, valid_fraction=0))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"trials": 0}, "--trials is 0; expected 1 or more"),
        ({"minutes": float("nan")}, "--minutes is nan"),
    ],
)
def test_limits_are_checked(ratings, given, said):
    with pytest.raises(FastTowerError, match=said):
        fasttower.tune(ratings, SMALL, **given)
    with pytest.raises(FastTowerError, match="keep names learning-rate; expected fields"):
        fasttower.tune(ratings, SMALL, keep=["learning-rate"])


def test_without_optuna_one_line_says_what_to_install(ratings, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(studies.importlib, "import_module", missing)
    with pytest.raises(FastTowerError, match=r"pip install -e '.\[tune\]'"):
        tuned(ratings)


# The command.

QUICK = [
    *("--embedding-dim", "4", "--epochs", "2", "--backend", "torch"),
    *("--threads", "1", "--batch-size", "256", "--num-negatives", "10"),
]


@pytest.fixture
def csv(ratings, tmp_path):
    ratings.write_csv(tmp_path / "ratings.csv")
    return tmp_path / "ratings.csv"


def command(*arguments):
    return main(["tune", *(str(argument) for argument in arguments)])


def test_the_command_writes_what_train_reads(csv, tmp_path, capsys):
    to = tmp_path / "tuned.json"
    assert command("--data", csv, "--trials", 6, "--to", to, *QUICK) == 0
    shown = capsys.readouterr().out
    assert "varied: loss" in shown
    assert "num_negatives" not in shown.partition("trial   1")[0]  # given, though as it is by default
    assert shown.count("\ntrial ") == 6
    assert "best so far" in shown
    assert f"next: fasttower train --config {to}" in shown
    assert main(["train", "--config", str(to), "--run-dir", str(tmp_path / "run"), "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)
    written = json.loads(to.read_text())
    assert trained["best_epoch"] == written["epochs"]
    assert written["num_negatives"] == 10
    assert command("--data", csv, "--trials", 6, "--to", to, "--json", *QUICK) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["trials"]) == 6
    assert result["score"] in [trial["score"] for trial in result["trials"]]
    assert command("--data", csv, "--trials", 6, "--to", to, "--quiet", *QUICK) == 0
    assert capsys.readouterr() == ("", "")


def test_a_configuration_that_is_given_stays_as_it_is(csv, tmp_path, capsys):
    base = tmp_path / "base.json"
    base.write_text(json.dumps({"learning_rate": 0.01, "loss": "bce", "l2": None}))
    to = tmp_path / "tuned.json"
    assert command("--data", csv, "--trials", 2, "--to", to, "--config", base, *QUICK) == 0
    varied = capsys.readouterr().out.partition("varied: ")[2].splitlines()[0]
    assert "learning_rate" not in varied
    assert "loss" not in varied
    assert "l2" in varied
    written = json.loads(to.read_text())
    assert (written["learning_rate"], written["loss"]) == (0.01, "bce")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--search", "quick"], "--search has no effect here"),
        (["--bogus", "1"], "--bogus"),
        (["--to", "/no/such/folder/tuned.json"], "--to /no/such/folder/tuned.json cannot be written"),
        (["--to", __file__], "is there already"),
        (["--to", "tuned.db"], "--to and --storage are both tuned.db"),
        (["--trials", "none at all"], "--trials"),
        (["--data", "/no/such/file.csv"], "/no/such/file.csv"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert printed.err.count("\n") == 1


def test_help_is_short(capsys):
    with pytest.raises(SystemExit) as stop:
        command("--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "Example: fasttower tune" in shown
    for flag in ("--trials", "--minutes", "--to", "--storage", "--config", "--preset", "--quiet", "--json"):
        assert flag in shown
    assert len(shown.splitlines()) < 40


def test_ctrl_c_writes_the_best_so_far_and_exits_with_130(csv, tmp_path):
    to = tmp_path / "tuned.json"
    arguments = ["fasttower", "tune", "--data", csv, "--trials", "10000", "--to", to, *QUICK]
    code, out, err = signalled(arguments, "trial   2", signal.SIGINT)
    assert code == 130, out + err
    assert "Traceback" not in err
    assert "the best so far will be written" in err
    assert Config.from_json(json.loads(to.read_text())).search == "none"
