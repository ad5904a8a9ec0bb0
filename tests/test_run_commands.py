"""The commands that use a run, as a user types them."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from conftest import CONFIG

import fasttower
from fasttower.cli import COMMANDS, main
from fasttower.commands import output

HELPED = [name for name in COMMANDS if name != "train"]


@pytest.fixture
def ask(capsys, monkeypatch):
    """Run a command; returns the exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize("name", HELPED)
def test_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    what = "--data" if name == "tune" else "runs/mine"
    assert f"Example: fasttower {name} {what}" in text


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "json"])
def test_all_recommendations_go_to_a_file(ask, saved, run, tmp_path, suffix):
    path = tmp_path / f"out.{suffix}"
    code, out, err = ask("recommend", saved, "--k", 5, "--output", path)
    assert (code, err) == (0, "")
    assert f"200 recommendations written to {path}" in out
    read = {"parquet": pl.read_parquet, "jsonl": pl.read_ndjson, "json": pl.read_json}.get(suffix)
    types = {"user_id": pl.String, "score": pl.Float32, "rank": pl.Int32}
    frame = read(path) if read else pl.read_csv(path, schema_overrides=types)
    assert frame["user_id"].equals(run.recommendations["user_id"])
    assert frame["item_id"].equals(run.recommendations["item_id"])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_results_that_come_in_blocks_are_one_file(ask, saved, run, tmp_path, monkeypatch):
    monkeypatch.setattr("fasttower.retrieval.retriever._BLOCK_SLOTS", 35)  # seven users
    code, out, _ = ask("recommend", saved, "--k", 5, "--output", tmp_path / "out.parquet")
    assert code == 0
    assert "200 recommendations" in out
    frame = pl.read_parquet(tmp_path / "out.parquet")
    assert frame.select("user_id", "item_id", "rank").equals(
        run.recommendations.select("user_id", "item_id", "rank")
    )


@pytest.mark.parametrize("suffix", ["parquet", "json"])
def test_new_users_come_in_blocks_too(ask, saved, run, ratings, tmp_path, monkeypatch, suffix):
    ratings.select(user_id="item", item_id="user").write_csv(tmp_path / "new.csv")  # crosswise
    expected = run.recommend_new(ratings, k=5)
    monkeypatch.setattr("fasttower.retrieval.retriever._BLOCK_SLOTS", 35)  # seven users
    assert [frame["user_id"].n_unique() for frame in run.recommend_new_in_blocks(ratings, k=5)] == [7] * 5 + [
        5
    ]
    flags = ("--new", tmp_path / "new.csv", "--user-column", "item_id", "--item-column", "user_id", "--k", 5)
    code, out, err = ask("recommend", saved, *flags, "--output", tmp_path / f"out.{suffix}")
    assert (code, err) == (0, "")
    assert "200 recommendations" in out
    read = pl.read_parquet if suffix == "parquet" else pl.read_json
    frame = read(tmp_path / f"out.{suffix}")
    assert frame.columns == expected.columns
    assert frame.select("user_id", "item_id").equals(expected.select("user_id", "item_id"))
    np.testing.assert_allclose(frame["score"], expected["score"], rtol=1e-5)


def test_no_new_users_are_an_empty_file(ask, saved, run, tmp_path):
    (tmp_path / "new.csv").write_text("user,item\n")
    out = tmp_path / "out.parquet"
    assert ask("recommend", saved, "--new", tmp_path / "new.csv", "--output", out)[0] == 0
    assert pl.read_parquet(out).schema == run.recommend(["001"]).schema


def test_an_array_of_pieces_has_no_gaps(tmp_path):
    from fasttower.commands.output import write_frames

    path, piece = tmp_path / "out.json", pl.DataFrame({"user_id": ["ü", "b"]})
    assert write_frames(iter([piece.clear(), piece, piece.clear(), piece[1:]]), path) == 3
    assert json.loads(path.read_text(encoding="utf-8")) == [{"user_id": user} for user in "übb"]
    assert write_frames(iter([piece.clear()]), path) == 0
    assert json.loads(path.read_text()) == []


@pytest.mark.parametrize(
    ("flags", "total"), [((), 40), (("--users", "users.txt"), 2), (("--new", "new.csv"), 3)]
)
def test_the_bar_counts_who_is_recommended_to(ask, saved, tmp_path, monkeypatch, flags, total):
    (tmp_path / "users.txt").write_text("030\n007\n030\n")
    (tmp_path / "new.csv").write_text("user,item\na,item 2\nb,item 4\na,item 6\nc,item 2\n")
    monkeypatch.chdir(tmp_path)
    bars = []

    class Bar(output.Progress):
        def __exit__(self, *error):
            bars.extend(self.tasks)
            super().__exit__(*error)

    monkeypatch.setattr(output, "Progress", Bar)
    assert ask("recommend", saved, *flags, "--output", "out.csv")[0] == 0
    assert [(bar.total, bar.completed) for bar in bars] == [(total, total)]


def test_without_a_file_some_users_are_shown(ask, saved):
    code, out, _ = ask("recommend", saved, "--k", 2)
    assert code == 0
    assert [user in out for user in ("000", "001", "002", "003")] == [True, True, True, False]
    assert "40 users; --output FILE writes all" in out
    code, out, _ = ask("recommend", saved, "--user", "030", "--k", 2)
    assert "030" in out
    assert "000" not in out
    assert "--output" not in out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("users.txt", "030\n\n007\n"),
        ("users.csv", "user\n030\n007\n"),
        ("users.csv", "age,user_id\n1,030\n2,007\n"),
        ("users.tsv", "whoever\n030\n007\n"),
    ],
)
def test_users_come_from_files(ask, saved, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    code, _, err = ask("recommend", saved, "--users", tmp_path / name, "--output", tmp_path / "out.parquet")
    assert (code, err) == (0, "")
    assert pl.read_parquet(tmp_path / "out.parquet")["user_id"].unique(maintain_order=True).to_list() == [
        "030",
        "007",
    ]


@pytest.mark.parametrize("users", ["everybody", "new"])
def test_scoring_is_handed_on(ask, saved, ratings, tmp_path, users):
    ratings.write_csv(tmp_path / "new.csv")
    flags = () if users == "everybody" else ("--new", tmp_path / "new.csv")
    out = tmp_path / "out.parquet"
    assert (
        ask("recommend", saved, *flags, "--scoring", "bfloat16", "--device", "cpu", "--output", out)[0] == 0
    )
    assert len(pl.read_parquet(out))
    code, _, err = ask("recommend", saved, *flags, "--scoring", "tf32", "--device", "cpu")
    assert code == 2
    assert "scoring is tf32, which runs on cuda" in err


def test_filters_come_from_files(ask, saved, run, tmp_path):
    best = run.recommend(["001"], k=3)["item_id"]
    (tmp_path / "deny.txt").write_text(best[0])
    best[1:].to_frame().write_parquet(tmp_path / "allow.parquet")
    flags = ("--user", "001", "--deny", tmp_path / "deny.txt", "--allow", tmp_path / "allow.parquet")
    code, _, _ = ask("recommend", saved, *flags, "--output", tmp_path / "out.csv")
    assert code == 0
    assert pl.read_csv(tmp_path / "out.csv")["item_id"].to_list() == best[1:].to_list()
    code, _, _ = ask(
        "recommend", saved, "--user", "001", "--no-filter-seen", "--k", 100, "--output", tmp_path / "out.csv"
    )
    assert len(pl.read_csv(tmp_path / "out.csv")) == len(run.items)


def test_a_deny_list_that_names_others_is_noticed_and_may_begin_with_a_byte_order_mark(
    ask, saved, run, tmp_path
):
    best = run.recommend(["001"], k=1)["item_id"][0]
    (tmp_path / "deny.txt").write_bytes(f"\ufeff{best}\nitme 3\n".encode())
    out = tmp_path / "out.parquet"
    code, _, err = ask("recommend", saved, "--user", "001", "--deny", tmp_path / "deny.txt", "--output", out)
    assert code == 0
    assert "1 of 2 items are not in the run" in err
    assert best not in pl.read_parquet(out)["item_id"]


def test_columns_of_later_files_can_be_named(ask, saved, run, tmp_path):
    new = pl.DataFrame({"who": ["n", "n"], "what": ["item 2", "item 4"], "user": ["x", "y"]})
    new.write_csv(tmp_path / "new.csv")
    flags = ("--user-column", "who", "--item-column", "what")
    out = tmp_path / "out.parquet"
    assert ask("recommend", saved, "--new", tmp_path / "new.csv", *flags, "--output", out)[0] == 0
    assert pl.read_parquet(out)["user_id"].unique().to_list() == ["n"]
    known = new.with_columns(who=pl.lit("001"))
    known.write_csv(tmp_path / "test.csv")
    code, text, _ = ask("evaluate", saved, "--test", tmp_path / "test.csv", *flags)
    assert code == 0
    assert "1 users, 2 pairs" in text


def test_a_link_is_followed_where_it_points(ask, saved, tmp_path):
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    assert ask("recommend", saved, "--output", tmp_path / "link.csv")[0] == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text().startswith("user_id,item_id")


def test_ids_are_whole_however_narrow_the_terminal(ask, saved, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    _, out, _ = ask("recommend", saved, "--user", "030", "--k", 1)
    assert "…" not in out
    assert "│ 03 │" in out  # and the rest below it
    assert "│ 0  │" in out


@pytest.mark.parametrize(("out", "code"), [("/dev/full", 2), ("| head -1", 0)])
def test_an_output_that_ends_early(saved, out, code, tmp_path):
    command = f"{sys.executable} -m fasttower recommend {saved} --k 30 {'> ' if out[0] == '/' else ''}{out}"
    script = f"set -o pipefail; {command}"
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert found.returncode == code
    assert "Traceback" not in found.stderr
    assert found.stderr.count("\n") <= 1


def test_new_users_come_from_a_file_of_interactions(ask, saved, run, tmp_path):
    new = pl.DataFrame({"user": ["n", "n"], "item": ["item 2", "item 4"]})
    new.write_csv(tmp_path / "new.csv")
    code, _, err = ask(
        "recommend", saved, "--new", tmp_path / "new.csv", "--k", 4, "--output", tmp_path / "out.parquet"
    )
    assert (code, err) == (0, "")
    assert pl.read_parquet(tmp_path / "out.parquet").equals(run.recommend_new(new, k=4))


def test_similar_shows_each_query_and_writes(ask, saved, run, tmp_path):
    code, out, _ = ask("similar", saved, "--item", "item 3", "item 5", "--k", 2)
    assert code == 0
    assert "like item 3" in out
    assert "like item 5" in out
    code, _, _ = ask("similar", saved, "--user", "003", "--output", tmp_path / "out.parquet")
    assert pl.read_parquet(tmp_path / "out.parquet").equals(run.similar_users(["003"]))


def test_evaluate_prints_the_runs_own_report_on_its_test_part(ask, saved, run, ratings, tmp_path):
    ratings.sort("timestamp")[1600:].write_csv(tmp_path / "test.csv")
    code, out, err = ask("evaluate", saved, "--test", tmp_path / "test.csv", "--k", 5)
    assert code == 0
    seen = run.metrics["test_pairs_in_fit"]
    assert err.startswith(f"warning: {seen} pairs were in the run's training data")
    assert err.count("\n") == 1
    for name, value in run.metrics["test"].items():
        line = next(line for line in out.splitlines() if name in line)
        shown = [float(number) for number in re.findall(r"\d\.\d{4}", line)]
        assert shown == pytest.approx([value, run.metrics["popularity"][name]], abs=1e-4)
    flags = ("--metrics", "Recall", "--output", tmp_path / "out.json")
    assert ask("evaluate", saved, "--test", tmp_path / "test.csv", *flags)[0] == 0
    assert [row["metric"] for row in json.loads((tmp_path / "out.json").read_text())] == ["Recall@10"]


def test_export_lists_what_it_wrote(ask, saved, tmp_path):
    code, out, _ = ask("export", saved, "--to", tmp_path / "out", "--format", "numpy")
    assert code == 0
    assert "item_vectors.npy" in out
    assert (tmp_path / "out" / "item_vectors.npy").exists()


def test_info_says_what_the_run_is(ask, saved, run, tmp_path):
    code, out, _ = ask("info", saved)
    assert code == 0
    assert "40 users, 60 items" in out
    assert f"{run.metrics['test']['NDCG@5']:.4f}" in out
    assert f"{run.metrics['test_pairs_in_fit']} test pairs were left out as seen; each is a miss" in out
    epochs = run.metrics["best_epoch"]
    assert f"trained for {epochs} epoch{'s' * (epochs > 1)} on " in out
    run.update(pl.DataFrame({"user": ["x"], "item": ["y"]}), epochs=1).save(tmp_path / "updated")
    code, out, _ = ask("info", tmp_path / "updated")
    assert "update 1: 1 row, 1 new user, 1 new item, 1 epoch\n" in out
    assert "not measured since its update; fasttower evaluate" in out


def test_info_of_a_run_without_a_test_part(ask, ratings, tmp_path):
    fasttower.fit(ratings, dataclasses.replace(CONFIG, test_fraction=0)).save(tmp_path / "run")
    code, out, err = ask("info", tmp_path / "run")
    assert (code, err) == (0, "")
    assert "no test part; fasttower evaluate takes a later file" in out
    assert "popularity" not in out
    later = tmp_path / "later.csv"
    later.write_text("user,item\n000,item 0\n")
    code, out, _ = ask("evaluate", tmp_path / "run", "--test", later)
    assert code == 0
    assert "NDCG@10" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("recommend", "RUN", "--user", "nobody"), "'nobody'"),
        (("recommend", "RUN", "--k", "0"), "k is 0"),
        (("recommend", "RUN", "--k", "many"), "many"),
        (("recommend", "RUN", "--output", "TMP/out.xls"), "ends in .parquet, .csv"),
        (("recommend", "RUN", "--output", "TMP/no/out.csv"), "no folder for it"),
        (("recommend", "RUN", "--memory-budget", "lots"), "expected a number and a unit"),
        (("recommend", "RUN", "--memory-budget", "5 parsecs"), "expected a number and a unit"),
        (("recommend", "RUN", "--memory-budget", "0"), "--memory-budget is 0"),
        (("recommend", "RUN", "--users", "TMP/numbers.parquet"), "user_id holds integers"),
        (("recommend", "RUN", "--deny", "TMP/floats.parquet"), "item_id is Float64"),
        (("recommend", "RUN", "--users", "TMP/nothing.txt"), "nothing.txt cannot be read"),
        (("recommend", "RUN", "--users", "TMP/nothing.csv"), "nothing.csv cannot be read"),
        (("recommend", "RUN", "--users", "TMP/wide.csv"), "no column of user ids"),
        (("recommend", "RUN", "--new", "TMP/wide.csv"), "no column of user ids"),
        (("recommend", "RUN", "--new", "TMP/wide.csv", "--user", "001"), "give one of them"),
        (("recommend", "TMP/nothing"), "is not a run directory"),
        (("recommend",), "PATH"),
        (("similar", "RUN"), "--item"),
        (("similar", "RUN", "--item", "item 1", "--user", "001"), "--item"),
        (("similar", "RUN", "--item", "nothing"), "'nothing'"),
        (("evaluate", "RUN"), "--test"),
        (("evaluate", "RUN", "--test", "TMP/nothing.csv"), "no such file"),
        (("evaluate", "RUN", "--test", "TMP/wide.csv", "--metrics", "AUC"), "AUC"),
        (("export", "RUN", "--to", "TMP"), "is not empty"),
        (("export", "RUN", "--to", "TMP/x", "--format", "csv"), "csv"),
        (("info", "TMP"), "is not a run directory"),
        (("informations",), "there is no command 'informations'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(ask, saved, tmp_path, arguments, message):
    (tmp_path / "wide.csv").write_text("a,b\n1,2\n")
    pl.DataFrame({"user_id": [1]}).write_parquet(tmp_path / "numbers.parquet")
    pl.DataFrame({"item_id": [1.5]}).write_parquet(tmp_path / "floats.parquet")
    replaced = [word.replace("RUN", str(saved)).replace("TMP", str(tmp_path)) for word in arguments]
    code, out, err = ask(*replaced)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_words_are_numbers_where_the_runs_ids_are(ask, ratings, tmp_path):
    from conftest import CONFIG

    frame = ratings.with_columns(pl.col("user").cast(pl.Int64))
    fasttower.fit(frame, fasttower.Config(**{**vars(CONFIG), "epochs": 1})).save(tmp_path / "run")
    code, _, _ = ask("recommend", tmp_path / "run", "--user", "7", "--output", tmp_path / "out.parquet")
    assert code == 0
    assert pl.read_parquet(tmp_path / "out.parquet")["user_id"].unique().to_list() == [7]
    code, _, err = ask("recommend", tmp_path / "run", "--user", "seven")
    assert code == 2
    assert "'seven' is no integer" in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500MB", 500 * 10**6),
        ("4 gb", 4 * 10**9),
        ("64MiB", 2**26),
        ("1.5KB", 1500),
        ("77", 77),
        ("2G", 2 * 10**9),
    ],
)
def test_sizes_are_read_as_people_write_them(text, expected):
    from fasttower.commands.inputs import bytes_from_text

    assert bytes_from_text(text) == expected


def test_a_file_that_cannot_be_finished_leaves_the_old_one(ask, saved, tmp_path, monkeypatch):
    def write_half(rows, path):
        path.write_text("half")
        raise OSError("No space left on device")

    (tmp_path / "out.csv").write_text("old")
    monkeypatch.setitem(
        __import__("fasttower.commands.output", fromlist=["_WRITERS"])._WRITERS,
        ".csv",
        write_half,
    )
    code, _, err = ask("recommend", saved, "--output", tmp_path / "out.csv")
    assert code == 2
    assert "No space left" in err
    assert (tmp_path / "out.csv").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["out.csv"]


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "json"])
@pytest.mark.parametrize("error", [fasttower.FastTowerError, RuntimeError, KeyboardInterrupt, OSError])
def test_what_goes_wrong_in_a_later_block_comes_out_as_itself(tmp_path, suffix, error):
    from fasttower.commands.output import write_frames

    def frames():
        yield pl.DataFrame({"user_id": ["a"]})
        raise error("CUDA error: an illegal memory access")

    with pytest.raises(error, match=r"^CUDA error: an illegal memory access$"):
        write_frames(frames(), tmp_path / f"out.{suffix}")
    assert not list(tmp_path.iterdir())


def test_lists_of_ids_are_found_by_the_columns_named(ask, saved, tmp_path):
    rows = pl.DataFrame({"Wer?": ["001", "002"], "Was": ["item 1", "item 2"], "Sterne": [5, 1]})
    file = tmp_path / "rows.csv"
    rows.write_csv(file)
    assert ask("recommend", saved, "--users", file, "--user-column", "Wer?", "--k", 1)[0] == 0
    assert ask("recommend", saved, "--user", "001", "--deny", file, "--item-column", "Was")[0] == 0
    code, _, err = ask("recommend", saved, "--users", file)
    assert code == 2
    assert "no column of user ids is known among 'Wer?'" in err


@pytest.mark.parametrize(("name", "found"), [("rows.csv", "it is a file"), ("gone", "nothing of that name")])
def test_what_is_no_directory_is_no_run(ask, name, found, tmp_path):
    (tmp_path / "rows.csv").write_text("user,item")
    code, _, err = ask("info", tmp_path / name)
    assert code == 2
    assert f"is not a run directory: {'there is ' * (name == 'gone')}{found}" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("001\n002\n", "its first line should name the column, and is '001', an id of the run"),
        ("item_id\n001\n", "no column of user ids is known among 'item_id'"),
    ],
)
def test_a_list_whose_first_line_is_no_name_loses_no_id(ask, saved, tmp_path, text, message):
    file = tmp_path / "users.csv"
    file.write_text(text)
    code, _, err = ask("recommend", saved, "--users", file)
    assert code == 2
    assert message in err
    file.write_text("whoever\n001\n")
    assert ask("recommend", saved, "--users", file)[0] == 0


@pytest.mark.parametrize("flag", ["--user-column", "--item-column", "--rating-column"])
def test_a_column_that_is_named_has_to_be_there(ask, saved, tmp_path, flag):
    file = tmp_path / "later.csv"
    file.write_text("user,item\n001,item 1\n")
    for command in (("recommend", saved, "--new"), ("evaluate", saved, "--test")):
        code, _, err = ask(*command, file, flag, "nope")
        assert code == 2
        assert f"no column 'nope' ({flag}); its columns are 'user', 'item'" in err


def test_what_is_skipped_is_said(ask, saved, tmp_path):
    _, _, err = ask("recommend", saved, "--user", "001", "nobody", "--unknown", "skip")
    assert "1 of 2 users are not in the run" in err
    file = tmp_path / "new.csv"
    file.write_text("user,item\nnew,item 1\nnew,nothing\n")
    _, _, err = ask("recommend", saved, "--new", file, "--unknown", "skip")
    assert "1 of 2 items are not in the run" in err


def test_low_ratings_of_newcomers_are_said(ask, ratings, tmp_path):
    fasttower.fit(ratings, dataclasses.replace(CONFIG, min_rating=3.0, epochs=1)).save(tmp_path / "run")
    file = tmp_path / "new.csv"
    file.write_text("user,item,rating\nnew,item 1,2\nnew,item 2,5\n")
    code, _, err = ask("recommend", tmp_path / "run", "--new", file)
    assert code == 0
    assert "1 of 2 rows are rated below the run's min_rating of 3" in err
