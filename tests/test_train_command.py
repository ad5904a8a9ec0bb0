"""The command: its flags, its exit codes, and what it prints where."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from pathlib import Path

import polars as pl
import pytest
from conftest import signalled

import fasttower
from fasttower import train
from fasttower.cli import guarded, main
from fasttower.run.new_directory import reserved

ROOT = Path(__file__).parent.parent
QUICK = [
    "--embedding-dim",
    "4",
    "--epochs",
    "2",
    "--l2",
    "0.03",
    "--backend",
    "torch",
    "--threads",
    "1",
    "--batch-size",
    "256",
]


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "ratings.csv"
    rows = [(f"u{i % 37}", f"i{i * i % 211}", 1 + i % 5, 1_000_000_000 + i) for i in range(3000)]
    pl.DataFrame(rows, schema=["user", "item", "rating", "timestamp"], orient="row").write_csv(path)
    return path


def command(*arguments):
    return guarded(train.run, [str(argument) for argument in arguments])


def test_a_run_from_a_file(csv, tmp_path, capsys):
    assert command("--data", csv, "--run-dir", tmp_path / "run", *QUICK) == 0
    shown = capsys.readouterr().out
    assert "popularity" in shown
    assert "NDCG@10" in shown
    run = fasttower.load_run(tmp_path / "run")
    assert run.config.embedding_dim == 4
    assert run.recommendations["user_id"].dtype == pl.String


@pytest.mark.parametrize(
    "flags",
    [
        "--loss softmax --negatives in-batch --similarity cosine --temperature 0.4 --l2 0",
        "--loss softmax --negatives mixed --block-size 64",
        "--loss bpr --negatives popularity --popularity-power 1",
        "--loss gbce --calibration 0.5 --num-negatives 3",
        "--negative-pool 50 --bias-l2 0.01 --item-l2 0",
    ],
)
def test_losses_and_negatives(csv, tmp_path, capsys, flags):
    assert command("--data", csv, "--run-dir", tmp_path / "run", *QUICK, *flags.split()) == 0
    assert "NDCG@10" in capsys.readouterr().out
    again = ("--config", tmp_path / "run" / "config.json", "--run-dir", tmp_path / "again", "--quiet")
    assert command(*again) == 0
    first, second = (fasttower.load_run(tmp_path / name) for name in ("run", "again"))
    assert first.recommendations.equals(second.recommendations)


def test_one_epoch_is_no_epochs(csv, tmp_path, capsys):
    assert command("--data", csv, "--run-dir", tmp_path / "run", *QUICK, "--epochs", 1) == 0
    assert "trained for 1 epoch: bce" in capsys.readouterr().out


def test_json_alone_on_stdout(csv, tmp_path, capsys):
    assert command("--data", csv, "--run-dir", tmp_path / "run", "--json", *QUICK) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "popularity" in printed.err


def test_quiet_prints_nothing(csv, tmp_path, capsys):
    assert command("--data", csv, "--run-dir", tmp_path / "run", "--quiet", *QUICK) == 0
    assert capsys.readouterr() == ("", "")


def test_no_test_part(csv, tmp_path, capsys):
    everything = ("--test-fraction", "0", *QUICK)
    assert command("--data", csv, "--run-dir", tmp_path / "run", *everything) == 0
    shown = capsys.readouterr().out
    assert "fit (no test part)" in shown
    assert "no test part; fasttower evaluate takes a later file\n" in shown
    assert "popularity" not in shown
    again = ("--config", tmp_path / "run" / "config.json", "--run-dir", tmp_path / "again", "--json")
    assert command(*again) == 0
    assert json.loads(capsys.readouterr().out)["test"] == {}
    first, second = (fasttower.load_run(tmp_path / name) for name in ("run", "again"))
    assert first.recommendations.equals(second.recommendations)


def test_no_test_part_of_a_named_set(csv, tmp_path, capsys):
    (tmp_path / "ml-1m").mkdir()
    pl.read_csv(csv).write_csv(tmp_path / "ml-1m" / "ratings.csv")
    named = ("--data", "ml-1m", "--data-root", tmp_path, "--run-dir", tmp_path / "run")
    assert command(*named, "--test-fraction", "0", "--no-refit", *QUICK) == 0
    assert "the validation part was not trained on (--no-refit)" in capsys.readouterr().out
    assert len(fasttower.load_run(tmp_path / "run").users) == 37


def test_flags_go_over_the_config_file_over_the_preset(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"epochs": 7, "embedding_dim": 32}))
    flags = train.read_flags(["--preset", "notebook", "--config", str(path), "--embedding-dim", "8"])
    assert (flags.embedding_dim, flags.epochs, flags.batch_size) == (8, 7, 1024)
    assert flags.preset == "notebook"
    # The dimension of the default preset, asked for, is not the notebook's.
    assert train.read_flags(["--preset", "notebook", "--embedding-dim", "32"]).embedding_dim == 32


def test_a_run_can_be_repeated_from_its_config(csv, tmp_path):
    assert command("--data", csv, "--run-dir", tmp_path / "a", "--quiet", *QUICK) == 0
    config = tmp_path / "a" / "config.json"
    assert command("--config", config, "--run-dir", tmp_path / "b", "--quiet") == 0
    first, second = (fasttower.load_run(tmp_path / name) for name in "ab")
    assert first.recommendations.equals(second.recommendations)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bogus", "1"], "--bogus"),
        (["--epochs", "many"], "--epochs"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--split", "by-hand"], "by-hand"),
        (["--preset", "fast"], "--preset is 'fast'"),
        (["--preset"], "--preset"),
        (["--data", "/no/such/file.csv"], "/no/such/file.csv"),
        (["--config", "/no/such/config.json"], "/no/such/config.json"),
        (["--device", "cuda", "--strict-device"], "--device cuda"),
        (["--run-dir", str(ROOT)], "not empty"),
        (["--backend", "triton", "--device", "cpu"], "triton"),
        (["--loss", "gbce", "--negatives", "in-batch"], "choose uniform or shared negatives, or loss bce"),
        (["--loss-scale", "pairs", "--negatives", "shared"], "choose loss scale positives, or uniform"),
        (
            ["--similarity", "cosine", "--temperature", "0"],
            "--temperature is 0.0; expected a finite number above 0",
        ),
        (["--negatives", "popularity", "--popularity-power", "inf"], "--popularity-power is inf"),
        (
            ["--num-negatives", "10", "--negative-pool", "9"],
            "--negative-pool is 9; expected 0, or at least the 10",
        ),
        (["--negatives", "shared", "--negative-pool", "50"], "expected 0 with negatives that a block shares"),
        (["--block-size", "0"], "--block-size is 0; expected 1 to 16,384"),
        (["--calibration", "1.5"], "--calibration is 1.5"),
        (["--loss", "hinge"], "hinge"),
        (["--negatives", "random"], "random"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, capsys):
    assert command(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert not set(printed.err) & set("│╭╰─")
    assert "---" not in printed.err


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_word_too_many_is_one_plain_line_whatever_the_terminal(encoding):
    done = subprocess.run(
        [sys.executable, "-m", "fasttower.train", "surprise"],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, b"fasttower: Unrecognized options: surprise\n")


def test_a_place_where_nothing_can_be_written_is_found_before_the_training(csv, capsys):
    assert command("--data", csv, "--run-dir", csv / "run", *QUICK) == 2
    printed = capsys.readouterr()
    assert "give another directory" in printed.err
    assert "search" not in printed.out


def test_a_directory_in_use_is_refused_before_the_training(csv, tmp_path, capsys):
    with reserved(tmp_path / "run"):
        assert command("--data", csv, "--run-dir", tmp_path / "run", *QUICK) == 2
    printed = capsys.readouterr()
    assert "is in use" in printed.err
    assert "search" not in printed.out


def test_runs_of_one_second_get_directories_of_their_own(csv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    strftime = time.strftime
    # Libraries that are imported meanwhile ask for other times.
    monkeypatch.setattr(
        "time.strftime", lambda text, *when: strftime(text, *when) if when else "20260101-120000"
    )
    for seed in (1, 2):
        assert command("--data", csv, "--quiet", *QUICK, "--seed", seed) == 0
    for name, seed in (("ratings-20260101-120000", 1), ("ratings-20260101-120000-2", 2)):
        assert fasttower.load_run(tmp_path / "runs" / name).config.seed == seed
    assert command("--data", csv, "--quiet", *QUICK, "--learning-rate", "1e30") == 3
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_reader_that_goes_away_costs_nothing(csv, tmp_path):
    arguments = " ".join([sys.executable, "-m", "fasttower.train", "--data", str(csv), *QUICK])
    done = subprocess.run(
        f"{arguments} --run-dir {tmp_path / 'run'} | head -1",
        shell=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert fasttower.load_run(tmp_path / "run").history


def test_paths_may_hold_brackets(csv, tmp_path):
    path = tmp_path / "a[" / "b].csv"
    path.parent.mkdir()
    path.write_bytes(csv.read_bytes())
    assert command("--data", path, "--run-dir", tmp_path / "r[" / "b]", *QUICK) == 0


def test_k_beyond_the_catalogue_is_the_catalogue(csv, tmp_path):
    assert command("--data", csv, "--run-dir", tmp_path / "run", "--k", "1000", *QUICK) == 0
    run = fasttower.load_run(tmp_path / "run")
    assert run.recommendations["rank"].max() <= run.items.height


def test_a_diverged_training_is_exit_code_3(csv, tmp_path, capsys):
    assert command("--data", csv, "--run-dir", tmp_path / "run", *QUICK, "--learning-rate", "1e30") == 3
    assert "--learning-rate" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_cuda_that_is_not_there_warns_and_goes_on(csv, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has a line of its own, once
        assert command("--data", csv, "--run-dir", tmp_path / "run", "--device", "cuda", *QUICK) == 0
    assert capsys.readouterr().err.count("--device cuda") == 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["device_requested"], config["device"]) == ("cuda", "cpu")


@pytest.mark.parametrize(
    ("module", "number", "code"),
    [
        ("fasttower.train", signal.SIGINT, 130),
        ("fasttower", signal.SIGTERM, 143),
        ("fasttower", signal.SIGHUP, 129),
    ],
)
def test_a_signal_stops_the_training_and_has_the_run_written(csv, tmp_path, module, number, code):
    arguments = ["train"] if module == "fasttower" else []
    arguments += ["--data", str(csv), "--run-dir", str(tmp_path / "run"), *QUICK, "--epochs", "100000"]
    arguments += ["--valid-fraction", "0"]
    exit_code, out, err = signalled([module, *arguments], "train   2", number)
    assert exit_code == code, out + err
    assert "Traceback" not in err
    run = fasttower.load_run(tmp_path / "run")
    assert run.interrupted
    assert len(run.history) >= 2
    assert not run.recommendations.is_empty()


def test_help_lists_every_flag_with_its_help(capsys):
    with pytest.raises(SystemExit) as stop:
        train.run(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    flags = [
        "--data",
        "--data-root",
        "--user-column",
        "--item-column",
        "--rating-column",
        "--timestamp-column",
        "--run-dir",
        "--preset",
        "--config",
        "--device",
        "--strict-device",
        "--backend",
        "--threads",
        "--deterministic",
        "--seed",
        "--seeds",
        "--epochs",
        "--batch-size",
        "--embedding-dim",
        "--loss",
        "--calibration",
        "--similarity",
        "--temperature",
        "--negatives",
        "--num-negatives",
        "--negative-pool",
        "--popularity-power",
        "--block-size",
        "--item-l2",
        "--bias-l2",
        "--learning-rate",
        "--l2",
        "--item-bias",
        "--no-item-bias",
        "--exclude-known-positives",
        "--no-exclude-known-positives",
        "--init-scale",
        "--k",
        "--filter-seen",
        "--no-filter-seen",
        "--min-rating",
        "--min-user-interactions",
        "--min-item-interactions",
        "--test-fraction",
        "--test-min-rating",
        "--valid-fraction",
        "--refit",
        "--no-refit",
        "--split",
        "--valid-data",
        "--test-data",
        "--quiet",
        "--json",
        "--version",
    ]
    assert [flag for flag in flags if flag not in shown] == []


def test_version(capsys):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for arguments in (["--version"], ["train", "--version"]):
        assert main(arguments) == 0
        assert capsys.readouterr().out == f"fasttower {version}\n"


def test_commands(capsys):
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["cook"]) == 2
    assert "cook" in capsys.readouterr().err
