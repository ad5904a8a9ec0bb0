"""A run's directory: what does not belong together is found when it is read."""

import json
import os
import stat

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

import fasttower
from fasttower import FastTowerError


def change_tensors(name, change):
    def apply(folder):
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return apply


def change_frame(name, change):
    return lambda folder: change(pl.read_parquet(folder / name)).write_parquet(folder / name)


def change_json(name, **values):
    def apply(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return apply


def put(name, key, value):
    return change_tensors(name, lambda tensors: tensors.update({key: value(tensors[key])}))


MODEL, KNOWN = "model.safetensors", "known_positives.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            change_frame("users.parquet", lambda frame: frame.sample(fraction=1, shuffle=True, seed=1)),
            "users.parquet",
        ),
        (change_frame("users.parquet", lambda frame: frame[:-1]), "users.parquet has 39 rows"),
        (change_frame("items.parquet", lambda frame: frame.reverse()), "items.parquet"),
        (
            change_frame("items.parquet", lambda frame: frame.rename({"item_id": "id"})),
            "the columns id, item_index",
        ),
        (
            change_frame("items.parquet", lambda frame: frame.with_columns(item_id=pl.lit("same"))),
            "there twice",
        ),
        (change_frame("users.parquet", lambda frame: frame.with_columns(user_id=pl.lit(None))), "missing"),
        (put(MODEL, "user_embedding", lambda table: table[:-1].clone()), "users.parquet has 40 rows"),
        (put(MODEL, "item_embedding", lambda table: table[0].clone()), "the weights are"),
        (put(MODEL, "item_bias", lambda bias: bias[:-1].clone()), "the weights are"),
        (change_tensors(MODEL, lambda tensors: tensors.pop("item_bias")), "of another model"),
        (change_json("config.json", embedding_dim=5), "of another model"),
        (change_json("config.json", init_scale=None), "leaves open: init_scale"),
        (change_json("metrics.json", settings=None), "metrics.json.settings is None; expected text"),
        (put(KNOWN, "items", lambda items: items + 1), "known_positives.safetensors"),
        (put(KNOWN, "items", lambda items: items - 1), "known_positives.safetensors"),
        (put(KNOWN, "items", lambda items: items.float()), "known_positives.safetensors"),
        (put(KNOWN, "items", lambda items: items.flip(0).clone()), "known_positives.safetensors"),
        (put(KNOWN, "indptr", lambda indptr: indptr[:-1].clone()), "known_positives.safetensors"),
        (put(KNOWN, "indptr", lambda indptr: indptr.flip(0).clone()), "known_positives.safetensors"),
        (
            put(KNOWN, "indptr", lambda indptr: torch.cat([indptr, indptr[-1:]])),
            "known_positives.safetensors",
        ),
        (
            put(
                KNOWN, "indptr", lambda indptr: torch.cat([indptr[:1], indptr[2:3], indptr[1:2], indptr[3:]])
            ),
            "known_positives.safetensors",
        ),
        (
            change_frame(
                "users.parquet",
                lambda frame: frame.with_columns(user_id=pl.col("user_id").replace("000", None)),
            ),
            "missing",
        ),
    ],
)
def test_files_that_do_not_belong_together(run, tmp_path, damage, message):
    run.save(tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(FastTowerError, match=message) as error:
        fasttower.load_run(tmp_path / "run", trust_files=True)
    assert "\n" not in str(error.value)
    with pytest.raises(FastTowerError, match="is not the file that the run was written with"):
        fasttower.load_run(tmp_path / "run")


@pytest.mark.parametrize("number", [0, "2", True, 1.5, None])
def test_a_format_that_is_no_number_from_one_on(run, tmp_path, number):
    run.save(tmp_path / "run")
    change_json("config.json", format=number)(tmp_path / "run")
    with pytest.raises(FastTowerError, match=f"damaged run: config.json says that its format is {number!r}"):
        fasttower.load_run(tmp_path / "run", trust_files=True)


def test_a_newer_format_is_refused_by_name_whatever_else_is_new(run, tmp_path):
    run.save(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["format"] == 4
    change_json("config.json", format=5, a_new_setting=1)(tmp_path / "run")
    change_json("manifest.json", format=5)(tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    with pytest.raises(FastTowerError) as error:
        fasttower.load_run(tmp_path / "run")
    assert str(error.value) == (
        f"{tmp_path / 'run'} was written in format 5 by a newer fasttower; this one reads up to 4; update"
        " fasttower."
    )


def as_in_format_1(folder):
    """Change a run's files to those of format 1, which has no number and calls the score a rating."""
    config = json.loads((folder / "config.json").read_text())
    del config["format"]
    (folder / "manifest.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    change_frame("recommendations.parquet", lambda frame: frame.rename({"score": "rating"}))(folder)


def as_in_format_2(folder):
    """Change a run's files to those of format 2, which had several L2 and no search."""
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    for name in ("loss", "similarity", "temperature", "negatives", "search", "prefer"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config | {"format": 2, "l2": [0.06, 0.03, 0.1]}))
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["settings"], metrics["search"]
    (folder / "metrics.json").write_text(json.dumps(metrics | {"l2": 0.03}))
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    for line in lines:
        del line["settings"], line["cut"]
        line["l2"] = 0.03
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_of_format_2_is_read_with_the_l2_that_was_chosen(run, tmp_path):
    run.save(tmp_path / "old")
    as_in_format_2(tmp_path / "old")
    read = fasttower.load_run(tmp_path / "old", trust_files=True)
    assert (read.config.loss, read.config.negatives, read.config.l2) == ("bce", "uniform", 0.03)
    assert read.history[0].settings == "L2 0.03"
    assert read.recommend(k=3).equals(run.recommend(k=3))
    assert len(read.update(run.recommendations.head(5).select("user_id", "item_id"), epochs=1).history)


def test_what_a_search_chose_may_not_be_left_open(run, tmp_path):
    run.save(tmp_path / "run")
    change_json("config.json", loss=None)(tmp_path / "run")
    with pytest.raises(FastTowerError, match="leaves open: loss"):
        fasttower.load_run(tmp_path / "run", trust_files=True)


def test_a_run_of_format_1_is_read_as_it_was_and_written_in_the_format_of_today(run, tmp_path):
    run.save(tmp_path / "old")
    as_in_format_1(tmp_path / "old")
    read = fasttower.load_run(tmp_path / "old", trust_files=True)
    assert read.recommendations.equals(run.recommendations)
    read.save(tmp_path / "new")
    run.save(tmp_path / "expected")
    for file in (tmp_path / "expected").iterdir():
        assert (tmp_path / "new" / file.name).read_bytes() == file.read_bytes()


def test_what_is_missing_is_named(run, tmp_path):
    run.save(tmp_path / "run")
    (tmp_path / "run" / KNOWN).unlink()
    with pytest.raises(FastTowerError, match=f"is not a run directory: {KNOWN} not there"):
        fasttower.load_run(tmp_path / "run")


def test_who_may_read_one_file_may_read_all(run, tmp_path):
    before = os.umask(0o022)
    try:
        run.save(tmp_path / "run")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "run").iterdir()}
    assert modes == {0o644}


def test_a_home_directory_is_understood(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run.save("~/run")
    assert (tmp_path / "run" / "config.json").exists()
    assert fasttower.load_run("~/run").recommend(k=5).equals(run.recommendations)
    assert isinstance(fasttower.load_run("~/run").model.item_bias, torch.nn.Parameter)
