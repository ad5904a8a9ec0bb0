"""The whole way from a frame of interactions to an evaluated run, and back from its directory."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import polars as pl
import pytest
import torch
from conftest import CONFIG

import fasttower
from fasttower import Config, FastTowerError
from fasttower.evaluation.ranking import ranking_metrics
from fasttower_kernels.known_positives import KnownPositives


def test_recommendations_are_in_the_callers_ids_best_first(run, ratings):
    frame = run.recommendations
    assert frame.columns == ["user_id", "item_id", "score", "rank"]
    assert set(frame["user_id"]) <= set(ratings["user"])
    assert set(frame["item_id"]) <= set(ratings["item"])
    for _, rows in frame.group_by("user_id"):
        assert rows["rank"].to_list() == list(range(1, rows.height + 1))
        assert rows["score"].is_sorted(descending=True)
        assert rows["item_id"].is_unique().all()


def test_recommended_scores_are_the_models(run):
    frame = run.recommendations.join(run.users, on="user_id").join(run.items, on="item_id")
    scores = run.model.score(*(torch.tensor(frame[name].to_numpy()) for name in ("user_index", "item_index")))
    torch.testing.assert_close(scores.detach(), torch.tensor(frame["score"].to_numpy()), rtol=1e-4, atol=1e-5)


def test_seen_items_are_left_out_unless_asked_for(run, ratings):
    fit = ratings.sort("timestamp")[:1600].select(user_id="user", item_id="item").unique()
    assert run.recommendations.join(fit, on=["user_id", "item_id"], how="semi").is_empty()
    kept = fasttower.fit(ratings, Config(**{**vars(CONFIG), "filter_seen": False}))
    assert not kept.recommendations.join(fit, on=["user_id", "item_id"], how="semi").is_empty()
    assert kept.recommendations.height == 40 * 5


def test_the_report_equals_the_metrics_on_the_device(run, ratings):
    truth = ratings.sort("timestamp")[1600:].select(user_id="user", item_id="item").unique()
    truth = truth.join(run.users, on="user_id").join(run.items, on="item_id")
    known = KnownPositives.from_pairs(
        torch.tensor(truth["user_index"].to_numpy()),
        torch.tensor(truth["item_index"].to_numpy()),
        run.users.height,
        run.items.height,
    )
    slots = torch.full((run.users.height, 5), -1)
    frame = run.recommendations.join(run.users, on="user_id").join(run.items, on="item_id")
    for user, item, rank in frame.select("user_index", "item_index", "rank").iter_rows():
        slots[user, rank - 1] = item
    metrics = ranking_metrics(slots, known, torch.ones(run.items.height, dtype=torch.bool), 5)
    assert run.metrics["test"] == pytest.approx(metrics, abs=1e-6)


def test_metrics_say_what_was_measured_on_what(run):
    metrics = run.metrics
    assert set(metrics["test"]) == set(metrics["popularity"])
    assert set(metrics["timing_s"]) == {"prepare", "train", "recommend", "metrics", "total"}
    parts = sum(seconds for stage, seconds in metrics["timing_s"].items() if stage != "total")
    assert parts == pytest.approx(metrics["timing_s"]["total"], abs=0.05)
    assert metrics["positives_per_s"] > 0
    assert (metrics["device"], metrics["backend"], metrics["threads"]) == ("cpu", "torch", 1)
    assert {"torch", "polars", "numpy", "replay-rec"} <= set(metrics["versions"])


def test_same_seed_same_recommendations(run, ratings):
    again = fasttower.fit(ratings, CONFIG)
    assert again.recommendations.equals(run.recommendations)
    assert again.metrics["test"] == pytest.approx(run.metrics["test"], abs=1e-12)  # RePlay sums in any order


def test_order_of_columns_and_frames_library_do_not_matter(run, ratings):
    frame = ratings.select("timestamp", "rating", "item", "user").to_pandas()
    assert fasttower.fit(frame, CONFIG).recommendations.equals(run.recommendations)


def test_a_run_comes_back_from_its_directory(run, saved):
    again = fasttower.load_run(saved)
    assert again.config == run.config
    assert run.config.init_scale == pytest.approx(0.05)
    assert again.users.equals(run.users)
    assert again.items.equals(run.items)
    assert again.recommendations.equals(run.recommendations)
    assert again.history == run.history
    assert again.metrics["test"] == run.metrics["test"]
    for left, right in zip(again.model.tables, run.model.tables, strict=True):
        assert left.equal(right)


def test_files_of_a_run_directory(run, saved):
    names = {path.name for path in saved.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "users.parquet",
        "items.parquet",
        "history.jsonl",
        "recommendations.parquet",
        "known_positives.safetensors",
        "metrics.json",
        "manifest.json",
    }
    lines = [json.loads(line) for line in (saved / "history.jsonl").read_text().splitlines()]
    assert len(lines) == len(run.history)
    expected = {"phase", "settings", "cut", "epoch", "step", "train_loss", "valid_loss", "valid"}
    assert expected | {"epoch_s", "positives_per_s", "elapsed_s"} == set(lines[0])
    config = json.loads((saved / "config.json").read_text())
    assert (config["device_requested"], config["device"]) == ("auto", "cpu")


def test_a_directory_that_is_not_empty_is_refused(run, saved):
    before = (saved / "metrics.json").read_bytes()
    with pytest.raises(FastTowerError, match="not empty"):
        run.save(saved)
    assert (saved / "metrics.json").read_bytes() == before


@pytest.mark.parametrize("missing", ["model.safetensors", "users.parquet", "config.json"])
def test_a_run_with_a_missing_file(run, missing, tmp_path):
    run.save(tmp_path / "run")
    (tmp_path / "run" / missing).unlink()
    with pytest.raises(FastTowerError, match=missing):
        fasttower.load_run(tmp_path / "run")


@pytest.mark.parametrize("damaged", ["model.safetensors", "items.parquet", "metrics.json"])
def test_a_run_with_a_damaged_file(run, damaged, tmp_path):
    run.save(tmp_path / "run")
    (tmp_path / "run" / damaged).write_bytes(b"nonsense")
    with pytest.raises(FastTowerError, match="damaged"):
        fasttower.load_run(tmp_path / "run")


@pytest.mark.parametrize("exists", [False, True])
def test_a_disk_that_is_full_leaves_nothing_behind(run, exists, tmp_path, monkeypatch):
    path = tmp_path / "run"
    if exists:
        path.mkdir()

    def write_parquet(frame, target, original=pl.DataFrame.write_parquet):
        if "recommendations" in str(target):
            target.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        original(frame, target)

    with monkeypatch.context() as patched:
        patched.setattr(pl.DataFrame, "write_parquet", write_parquet)
        with pytest.raises(FastTowerError, match=r"run cannot be written: .*No space left"):
            run.save(path)
    assert path.exists() == exists
    assert not exists or not list(path.iterdir())
    run.save(path)
    assert fasttower.load_run(path).metrics == run.metrics


def test_a_run_is_written_where_its_directory_is(run, tmp_path):
    # A link to another place, whose parent may not be ours to write to.
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    run.save(tmp_path / "link")
    assert (tmp_path / "there" / "metrics.json").exists()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("path", [None, 3])
def test_what_is_no_path_is_no_run(path):
    with pytest.raises(FastTowerError, match=f"the path is {path}; expected that of a file or folder"):
        fasttower.load_run(path)


@pytest.mark.parametrize("name", ["metrics.json", "config.json"])
def test_a_file_of_a_run_that_holds_no_object(run, name, tmp_path):
    run.save(tmp_path / "run")
    (tmp_path / "run" / name).write_text("[1]")
    with pytest.raises(FastTowerError, match=f"damaged run: {name}: it holds a list, not an object"):
        fasttower.load_run(tmp_path / "run", trust_files=True)


def test_several_seeds_give_means_and_deviations(run, ratings):
    several = fasttower.fit(ratings, Config(**{**vars(CONFIG), "seeds": 3}))
    seeds = several.metrics["test_seeds"]
    assert len(seeds) == 3
    assert seeds[0] == pytest.approx(run.metrics["test"], abs=1e-12)
    assert seeds[1] != pytest.approx(seeds[0], abs=1e-6)
    values = [seed["NDCG@5"] for seed in seeds]
    mean = sum(values) / 3
    assert several.metrics["test"]["NDCG@5"] == pytest.approx(mean)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 2)
    assert several.metrics["test_std"]["NDCG@5"] == pytest.approx(deviation)
    assert several.recommendations.equals(run.recommendations)


@pytest.fixture(scope="module")
def whole(ratings):
    return fasttower.fit(ratings, dataclasses.replace(CONFIG, test_fraction=0))


def test_without_a_test_part_all_is_trained_on(whole, ratings):
    rows = ratings.select(user_id="user", item_id="item").unique()
    assert whole.users.height == rows["user_id"].n_unique()
    assert len(whole.known_positives.items) == rows.height
    assert whole.recommend().join(rows, on=["user_id", "item_id"], how="semi").is_empty()
    assert {record.phase for record in whole.history} == {"search", "refit"}
    refit = [record for record in whole.history if record.phase == "refit"]
    assert refit[-1].step == whole.metrics["best_epoch"] * math.ceil(2000 / 64)


def test_without_a_test_part_the_model_is_that_with_a_test_file(whole, ratings, tmp_path):
    ratings[:100].write_parquet(tmp_path / "test.parquet")
    config = dataclasses.replace(CONFIG, test_data=str(tmp_path / "test.parquet"))
    beside = fasttower.fit(ratings, config)
    assert whole.recommendations.equals(beside.recommendations)
    for left, right in zip(whole.model.tables, beside.model.tables, strict=True):
        assert left.equal(right)


def test_without_a_test_part_the_metrics_say_so(whole, run, tmp_path):
    metrics = whole.metrics
    assert metrics.keys() == run.metrics.keys()
    assert (metrics["test"], metrics["popularity"]) == ({}, {})
    assert (metrics["test_users"], metrics["test_pairs_in_fit"]) == (0, 0)
    assert "NDCG" not in repr(whole)
    whole.save(tmp_path / "run")
    assert fasttower.load_run(tmp_path / "run").metrics == metrics


def test_without_a_test_part_a_run_is_measured_on_later_rows(whole, tmp_path):
    whole.save(tmp_path / "run")
    later = pl.DataFrame({"user": ["000", "001"], "item": ["item 0", "item 1"]})
    found = fasttower.load_run(tmp_path / "run").evaluate(later, k=5)
    assert (found.users, found.pairs) == (2, 2)
    updated = whole.update(later, epochs=1)
    assert updated.metrics["updates"][0]["rows"] == 2


@pytest.mark.parametrize(
    ("change", "phases"),
    [
        ({"refit": False}, {"search", "refit"}),
        ({"valid_fraction": 0.0}, {"train"}),
        ({"split": "random"}, {"search", "refit"}),
        ({"split": "leave-last"}, {"search", "refit"}),
    ],
)
def test_without_a_test_part_in_other_ways(change, phases, ratings, tmp_path):
    ratings.write_csv(tmp_path / "ratings.csv")
    config = dataclasses.replace(CONFIG, test_fraction=0, **change)
    run = fasttower.fit(tmp_path / "ratings.csv", config)
    assert run.metrics["test"] == {}
    assert {record.phase for record in run.history} == phases
    assert run.known_positives.degrees.sum() == ratings.select("user", "item").unique().height


def test_without_a_test_part_replay_is_not_imported(ratings, tmp_path):
    ratings.write_parquet(tmp_path / "ratings.parquet")
    code = (
        "import sys, fasttower;"
        "config = fasttower.Config(test_fraction=0, epochs=1, l2=0.03, backend='torch', threads=1);"
        f"fasttower.fit({str(tmp_path / 'ratings.parquet')!r}, config);"
        "sys.exit('replay' in sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": ":".join(sys.path)}
    )


class StopInSecondSeed(fasttower.FitObserver):
    seeds = 0

    def on_seed(self, seed):
        self.seeds += 1

    def should_stop(self):
        return self.seeds == 2


def test_a_seed_that_was_stopped_does_not_count(run, ratings):
    stopped = fasttower.fit(ratings, Config(**{**vars(CONFIG), "seeds": 3}), observer=StopInSecondSeed())
    assert stopped.interrupted
    assert len(stopped.metrics["test_seeds"]) == 1
    assert stopped.metrics["test"] == pytest.approx(run.metrics["test"], abs=1e-12)
    assert stopped.metrics["test_std"]["NDCG@5"] is None


def test_fit_stays_the_function_whatever_is_imported():
    from fasttower.report import ConsoleObserver

    assert ConsoleObserver
    assert callable(fasttower.fit)


def test_a_validation_file_of_another_type(ratings, tmp_path):
    ratings[:1500].write_parquet(tmp_path / "source.parquet")
    ratings[1500:].write_csv(tmp_path / "valid.csv")
    config = Config(**{**vars(CONFIG), "valid_data": str(tmp_path / "valid.csv")})
    assert fasttower.fit(tmp_path / "source.parquet", config).metrics["test"]


def test_a_model_of_what_can_be_learned_beats_popularity(run):
    assert run.metrics["test"]["NDCG@5"] > run.metrics["popularity"]["NDCG@5"]


def test_a_download_reports_to_the_observer(ratings, monkeypatch):
    progress = object()

    class Watcher(fasttower.FitObserver):
        def download_progress(self):
            return progress

    def prepare_is_told(source, config, seed, on_download):
        assert on_download is progress
        raise FastTowerError("told")

    monkeypatch.setattr("fasttower.pipeline.prepare", prepare_is_told)
    with pytest.raises(FastTowerError, match="told"):
        fasttower.fit(ratings, CONFIG, observer=Watcher())


def test_popularity_on_movielens_is_the_published_row(ml_100k):
    preset = fasttower.PRESETS["notebook"]
    popularity = fasttower.fit(ml_100k, Config(**{**vars(preset), "epochs": 1, "backend": "torch"})).metrics[
        "popularity"
    ]
    row = [f"{popularity[f'{name}@10']:.4f}" for name in ("NDCG", "HitRate", "Coverage")]
    assert row == ["0.1390", "0.4737", "0.0470"]


def test_too_few_validation_users_choose_nothing(ratings):
    few = ratings.filter(pl.col("user").is_in(["000", "001", "002"]))
    with pytest.warns(UserWarning, match=r"validation part has \d users, too few to choose settings by"):
        run = fasttower.fit(few, dataclasses.replace(CONFIG, epochs=2))
    assert {record.phase for record in run.history} == {"train"}
    assert len(run.history) == 2
