"""What a finished run can be asked for: ids in, ids out."""

import dataclasses
import json
import math
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from conftest import CONFIG

import fasttower
from fasttower import Config, FastTowerError


@pytest.fixture(scope="module")
def loaded(saved):
    return fasttower.load_run(saved)


@pytest.fixture(scope="module")
def numbered(ratings):
    """The same ratings with integer ids, of a model without a bias."""
    frame = ratings.with_columns(
        pl.col("user").cast(pl.Int64), pl.col("item").str.strip_prefix("item ").cast(pl.Int64)
    )
    return fasttower.fit(frame, Config(**{**vars(CONFIG), "item_bias": False, "epochs": 1}))


def history(run, user):
    index = run.users.filter(pl.col("user_id") == user)["user_index"][0]
    known = run.known_positives
    items = known.items[known.indptr[index] : known.indptr[index + 1]]
    return set(run.items["item_id"].gather(items.numpy()))


def test_a_loaded_run_recommends_what_the_fitted_one_did(run, loaded):
    assert loaded.recommend(k=5).equals(run.recommendations)
    assert loaded.known_positives.items.equal(run.known_positives.items)
    assert loaded.known_positives.indptr.equal(run.known_positives.indptr)


def test_some_users_get_their_rows_in_the_order_asked_for_each_once(run):
    frame = run.recommend(["030", "002", "030"], k=5)
    assert frame["user_id"].unique(maintain_order=True).to_list() == ["030", "002"]
    for user in ("030", "002"):
        theirs = run.recommendations.filter(pl.col("user_id") == user)
        got = frame.filter(pl.col("user_id") == user)
        assert got["item_id"].equals(theirs["item_id"])
        np.testing.assert_allclose(got["score"], theirs["score"], rtol=1e-5)


@pytest.mark.parametrize(
    "users",
    [
        "007",
        ("007",),
        {"007"},
        np.array(["007"]),
        np.array(["007"], dtype=object),
        np.str_("007"),
        pl.Series(["007"], dtype=pl.Categorical),
        pl.DataFrame({"other": ["001"], "user_id": ["007"]}),
        pd.Series(["007"]),
        pd.DataFrame({"user_id": ["007"]}),
        pd.DataFrame({"other": ["001"], "userId": ["007"]}),
        pl.LazyFrame({"whoever": ["007"]}),
        pl.DataFrame({"user_id": ["007"]}).to_arrow(),
    ],
    ids=lambda users: type(users).__name__,
)
def test_ids_come_in_many_shapes(run, users):
    assert set(run.recommend(users, k=2)["user_id"]) == {"007"}


def test_integers_of_any_width_are_ids(numbered):
    for users in (7, [7], np.int64(7), np.array([7], dtype=np.int16), pl.Series([7], dtype=pl.UInt8)):
        frame = numbered.recommend(users, k=np.int64(2))
        assert frame["user_id"].to_list() == [7, 7]
        assert frame.schema["user_id"] == pl.Int64


def test_nobody_is_asked_for(run, numbered):
    for nobody in ([], np.array([]), set(), pl.Series([], dtype=pl.String), pl.DataFrame({"user": []})):
        assert run.recommend(nobody).is_empty()
        assert numbered.recommend(nobody).is_empty()


@pytest.mark.parametrize("source", ["frame", "typed", "file"])
def test_nothing_in_nothing_out_in_the_right_types(run, numbered, ratings, tmp_path, source):
    (tmp_path / "empty.csv").write_text("user,item,rating\n")
    types = {"user": pl.Int64, "item": pl.String, "rating": pl.Float64}
    empty = {
        "frame": pl.DataFrame({"user": [], "item": [], "rating": []}),
        "typed": pl.DataFrame(schema=types),
        "file": tmp_path / "empty.csv",
    }[source]
    rated = fasttower.fit(ratings, Config(**{**vars(CONFIG), "min_rating": 3.0, "epochs": 1}))
    for one in (run, numbered, rated):
        some = pl.DataFrame({"user": one.users["user_id"][:2], "item": one.items["item_id"][:2]})
        for ask in (one.score, one.recommend_new):
            nothing = ask(empty)
            assert nothing.is_empty()
            assert nothing.schema == ask(some).schema
        with pytest.raises(FastTowerError, match="no rows"):
            one.evaluate(empty)
        with pytest.raises(FastTowerError, match="no rows"):
            one.update(empty)
    assert run.similar_items([]).schema == run.similar_items(["item 1"]).schema


def test_k_beyond_what_is_left_gives_fewer_rows(run):
    frame = run.recommend(["001"], k=1000)
    assert len(frame) == len(run.items) - len(history(run, "001"))
    assert not set(frame["item_id"]) & history(run, "001")
    assert run.recommend(["001"], k=10**9).equals(frame)  # and takes no memory for it
    everything = run.recommend(["001"], k=1000, filter_seen=False)
    assert set(everything["item_id"]) == set(run.items["item_id"])
    assert everything["rank"].to_list() == list(range(1, len(run.items) + 1))


def test_reduced_precision_recommends_the_same(run, ratings):
    exact, reduced = (run.recommend(k=5, scoring=scoring) for scoring in ("float32", "bfloat16"))
    assert reduced.drop("score").equals(exact.drop("score"))
    np.testing.assert_allclose(reduced["score"], exact["score"], rtol=1e-5, atol=1e-6)
    for call in (run.recommend, lambda **options: run.recommend_new(ratings, **options)):
        with pytest.raises(FastTowerError, match="scoring is 'float16'; expected"):
            call(scoring="float16")


def test_denied_items_are_never_given_and_only_allowed_ones_are(run):
    best = run.recommend(["001"], k=3)["item_id"].to_list()
    denied = run.recommend(["001"], k=3, deny=[*best[:2], "not there"])["item_id"].to_list()
    assert denied[0] == best[2]
    assert not set(denied) & set(best[:2])
    allowed = run.recommend(["001"], k=3, allow=[best[2], best[0], "not there"])["item_id"].to_list()
    assert allowed == [best[0], best[2]]
    both = run.recommend(["001"], k=3, allow=best[:2], deny=best[:1])["item_id"].to_list()
    assert both == [best[1]]


def test_seen_items_stay_out_where_they_are_allowed(run):
    seen = sorted(history(run, "001"))
    unseen = run.recommend(["001"], k=1)["item_id"].to_list()
    assert run.recommend(["001"], k=9, allow=seen + unseen)["item_id"].to_list() == unseen
    assert run.recommend(["001"], k=9, allow=seen).is_empty()


def test_nothing_allowed_is_an_error(run):
    with pytest.raises(FastTowerError, match="leave no item"):
        run.recommend(["001"], allow=["not there"])
    with pytest.raises(FastTowerError, match="leave no item"):
        run.recommend(["001"], deny=run.items["item_id"])


def test_unknown_users_are_named_or_skipped(run):
    with pytest.raises(FastTowerError, match="1 of 2 user ids are not in the run: 'nobody'; it knows"):
        run.recommend(["001", "nobody"])
    many = [f"new {i}" for i in range(9)]
    with pytest.raises(FastTowerError, match=r"9 of 9 .* 'new 4', \.\.\.; it knows"):
        run.recommend(many)
    assert set(run.recommend(["001", "nobody"], unknown="skip")["user_id"]) == {"001"}
    skipped = run.recommend(["nobody"], unknown="skip")
    assert skipped.is_empty()
    assert skipped.schema == run.recommend(["001"]).schema


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda run: run.recommend([1]), "given are Int64, those of the run are String"),
        (lambda run: run.similar_items([1.5]), "item ids given are Float64"),
        (lambda run: run.recommend([None]), "not in the run: None"),
        (lambda run: run.recommend([["001"]]), "user ids given are List"),
        (lambda run: run.recommend(["001", 1]), "user ids cannot be read"),
        (lambda run: run.recommend(["001"], unknown="ignore"), "expected 'raise' or 'skip'"),
        (lambda run: run.recommend(unknown="ignore"), "expected 'raise' or 'skip'"),
        (lambda run: run.similar_items(None), "the item ids are None; give one"),
        (lambda run: run.similar_users(None), "the user ids are None; give one"),
        (
            lambda run: run.recommend(pl.LazyFrame({"a": ["1"], "b": ["2"]})),
            "no column of user ids .* 'a', 'b'",
        ),
        (lambda run: run.recommend(["001"], deny=pl.LazyFrame({"item": [1]})), "item ids given are Int64"),
        (lambda run: run.recommend(pd.DataFrame({"userId": [1]})), "user ids given are Int64"),
        (lambda run: run.recommend(["001"], k=0), "k is 0"),
        (lambda run: run.recommend(["001"], k=2.5), "k is 2.5; expected a whole number"),
        (lambda run: run.similar_items(["item 1"], k="3"), "k is '3'"),
        (lambda run: run.similar_users(["001"], k=True), "k is True"),
        (lambda run: run.evaluate(pl.DataFrame({"user": ["001"], "item": ["item 1"]}), k=None), "k is None"),
        (lambda run: run.evaluate(pl.DataFrame({"user": ["001"], "item": ["item 1"]}), 10), "metrics are 10"),
        (lambda run: run.recommend(["001"], memory_budget_bytes="1GB"), "memory_budget_bytes is '1GB'"),
        (lambda run: run.recommend(b"001"), "they are bytes"),
        (lambda run: run.export(None, "numpy"), "the path is None"),
        (lambda run: fasttower.load_run("x", device="cuda:0"), "the device is 'cuda:0'"),
        (lambda run: run.update(pl.DataFrame({"user": ["a"], "item": ["b"]}), epochs=1.5), "epochs is 1.5"),
        (lambda run: run.recommend(3.5), "given are Float64"),
        (lambda run: run.score(pl.DataFrame({"user": [1], "item": ["item 1"]})), "user ids given are Int64"),
        (
            lambda run: run.recommend_new(pl.DataFrame({"user": ["x"], "item": [1]})),
            "item ids given are Int64",
        ),
        (
            lambda run: run.evaluate(pl.DataFrame({"user": ["x"], "item": ["item 1"]})),
            "none of these is of a user",
        ),
        (
            lambda run: run.evaluate(pl.DataFrame({"user": ["001"], "item": ["y"]}), ["AUC"]),
            "expected some of",
        ),
        (lambda run: run.update(pl.DataFrame({"user": ["a"], "item": ["b"]}), epochs=0), "epochs is 0"),
    ],
)
def test_what_cannot_be_answered_is_one_line(run, ask, message):
    with pytest.raises(FastTowerError, match=message) as error:
        ask(run)
    assert "\n" not in str(error.value)


def test_scores_are_the_models_in_the_order_given(run):
    pairs = pl.DataFrame({"who": ["003", "001", "003"], "item": ["item 4", "item 9", "item 4"]})
    frame = run.score(pairs.rename({"who": "user"}))
    assert frame.columns == ["user_id", "item_id", "score"]
    assert frame["user_id"].to_list() == ["003", "001", "003"]
    users, items = (dict(map_.rows()) for map_ in (run.users, run.items))
    for user, item, score in frame.rows():
        u = run.model.infer_users()[users[user]]
        expected = u @ run.model.infer_items()[items[item]] + run.model.item_bias[items[item]]
        assert score == pytest.approx(expected.item(), rel=1e-5)


def test_columns_that_the_run_was_told_of_count_where_they_are_there(ratings):
    renamed = ratings.rename({"user": "who", "item": "what"})
    config = Config(**{**vars(CONFIG), "user_column": "who", "item_column": "what", "epochs": 1})
    run = fasttower.fit(renamed, config)
    pairs = renamed.head(3).with_columns(user=pl.lit("nobody"))
    assert run.score(pairs)["user_id"].to_list() == pairs["who"].to_list()
    assert run.score(run.recommend(["001"], k=2)).height == 2


def test_unknown_pairs_are_named_or_skipped(run):
    pairs = pl.DataFrame({"user": ["003", "zz"], "item": ["item 4", "item 4"]})
    with pytest.raises(FastTowerError, match="'zz'"):
        run.score(pairs)
    assert run.score(pairs, unknown="skip")["user_id"].to_list() == ["003"]


@pytest.mark.parametrize("kind", ["item", "user"])
def test_neighbours_have_the_largest_cosines(run, kind):
    id_map = run.items if kind == "item" else run.users
    vectors = (run.model.infer_items() if kind == "item" else run.model.infer_users()).detach().double()
    unit = torch.nn.functional.normalize(vectors)
    queries = id_map[f"{kind}_id"].gather([5, 2]).to_list()
    ask = run.similar_items if kind == "item" else run.similar_users
    frame = ask(queries, k=4)
    assert frame.columns == [f"{kind}_id", f"similar_{kind}_id", "similarity", "rank"]
    for query, row in zip(queries, (5, 2), strict=True):
        cosines = unit @ unit[row]
        cosines[row] = -2
        best = cosines.topk(4)
        found = frame.filter(pl.col(f"{kind}_id") == query)
        assert (
            found[f"similar_{kind}_id"].to_list()
            == id_map[f"{kind}_id"].gather(best.indices.numpy()).to_list()
        )
        np.testing.assert_allclose(found["similarity"], best.values, rtol=1e-5)
        assert found["rank"].to_list() == [1, 2, 3, 4]


def test_neighbours_beyond_the_catalogue_are_all_others(run):
    frame = run.similar_items(run.items["item_id"][0], k=10_000)
    assert set(frame["similar_item_id"]) == set(run.items["item_id"][1:])


def test_evaluating_on_the_runs_own_test_part_gives_its_report(run, ratings):
    test = ratings.sort("timestamp")[1600:]
    found = run.evaluate(test, k=5)
    assert found.metrics == pytest.approx(run.metrics["test"], abs=1e-12)
    assert found.popularity == pytest.approx(run.metrics["popularity"], abs=1e-12)
    assert found.users == run.metrics["test_users"]
    assert found.pairs == test.select("user", "item").unique().height
    assert found.cold_rows == 0


def test_evaluation_counts_what_it_drops_and_gives_what_was_asked_for(run, ratings):
    test = ratings.sort("timestamp")[1600:].select("user", "item")
    cold = pl.DataFrame({"user": ["001", "new"], "item": ["nothing", "item 1"]})
    found = run.evaluate(pl.concat([test, cold]), ["Recall", "NDCG"], k=3)
    assert list(found.metrics) == list(found.popularity) == ["Recall@3", "NDCG@3"]
    assert found.cold_rows == 2
    assert found.metrics["Recall@3"] == pytest.approx(run.evaluate(test, k=3).metrics["Recall@3"])
    assert run.evaluate(test, "Recall", k=3).metrics == pytest.approx({"Recall@3": found.metrics["Recall@3"]})


def test_evaluation_leaves_out_rows_that_are_rated_too_low(ratings):
    rated = fasttower.fit(ratings, Config(**{**vars(CONFIG), "min_rating": 3.0, "epochs": 1}))
    test = ratings.sort("timestamp")[1600:]
    good = test.filter(pl.col("rating") >= 3)
    assert rated.evaluate(test).metrics == pytest.approx(rated.evaluate(good).metrics)
    assert rated.evaluate(test).pairs < rated.evaluate(test.drop("rating")).pairs


def test_evaluation_at_a_k_beyond_the_catalogue_is_that_of_all_of_it(run, ratings):
    test = ratings.sort("timestamp")[1600:]
    found = run.evaluate(test, k=10**9).metrics
    assert list(found) == [
        f"{name}@{10**9}" for name in ("NDCG", "HitRate", "Recall", "MAP", "MRR", "Coverage")
    ]
    whole = run.evaluate(test, k=len(run.items)).metrics
    assert list(found.values()) == pytest.approx(list(whole.values()))
    assert run.evaluate(test, k=np.int64(3)).metrics.keys() == {f"{name}@3" for name in whole_names(found)}


def whole_names(metrics):
    return [name.split("@")[0] for name in metrics]


def test_evaluation_says_what_was_seen_and_what_was_rated_too_low(ratings):
    run = fasttower.fit(ratings, Config(**{**vars(CONFIG), "min_rating": 3.0, "epochs": 1}))
    seen = ratings.sort("timestamp")[:100]
    found = run.evaluate(seen)
    assert found.low_rated_rows == (seen["rating"] < 3).sum()
    assert found.pairs_in_fit == found.pairs
    assert found.metrics["HitRate@10"] == 0
    assert run.evaluate(seen, filter_seen=False).metrics["HitRate@10"] > 0


def test_columns_that_are_not_needed_are_not_looked_at(run):
    pairs = pl.DataFrame(
        {"user": ["001"], "item": ["item 1"], "rating": [None], "timestamp": ["not a time"]},
        schema_overrides={"rating": pl.Float64},
    )
    assert len(run.score(pairs)) == 1
    assert len(run.recommend_new(pairs, k=2)) == 2


def test_rows_may_come_as_a_stream_that_is_read_once(run):
    pairs = pl.DataFrame({"user": ["001", "002"], "item": ["item 1", "item 2"]})
    stream = pairs.to_arrow().to_reader()
    assert run.score(stream).equals(run.score(pairs))


def test_vectors_and_bias_make_the_score(run):
    users, items = run.user_vectors(), run.item_vectors()
    assert users.schema == {"user_id": pl.String, "vector": pl.Array(pl.Float32, 4)}
    assert items.columns == ["item_id", "vector", "item_bias"]
    user, item = users.row(3, named=True), items.row(8, named=True)
    score = np.dot(user["vector"], item["vector"]) + item["item_bias"]
    pair = pl.DataFrame({"user": [user["user_id"]], "item": [item["item_id"]]})
    assert run.score(pair)["score"][0] == pytest.approx(score, rel=1e-5)


def test_a_model_without_a_bias_has_no_column_of_it(numbered):
    assert numbered.item_vectors().columns == ["item_id", "vector"]


def test_new_users_get_what_suits_what_they_touched(run):
    # The items of users with an even number have an even one: so a newcomer who took even ones wants more.
    even, odd = ([f"item {item}" for item in range(first, 24, 2)] for first in (0, 1))
    new = pl.DataFrame({"user": ["e"] * 12 + ["o"] * 12, "item": even + odd})
    frame = run.recommend_new(new, k=10)
    assert frame["user_id"].unique(maintain_order=True).to_list() == ["e", "o"]
    assert frame.join(
        new.rename({"user": "user_id", "item": "item_id"}), on=["user_id", "item_id"], how="semi"
    ).is_empty()
    for user, parity in (("e", 0), ("o", 1)):
        items = frame.filter(pl.col("user_id") == user)["item_id"].str.strip_prefix("item ").cast(pl.Int64)
        assert (items % 2 == parity).mean() >= 0.9
    seen = run.recommend_new(new, k=5, filter_seen=False)
    assert set(seen.filter(pl.col("user_id") == "e")["item_id"]) & set(even)


def test_new_users_ids_may_be_of_another_type_and_their_items_filtered(run):
    new = pl.DataFrame({"user": [5, 5], "item": ["item 2", "item 4"]})
    frame = run.recommend_new(new, k=2)
    assert frame["user_id"].to_list() == [5, 5]
    denied = run.recommend_new(new, k=2, deny=frame["item_id"])
    assert not set(denied["item_id"]) & set(frame["item_id"])
    assert run.recommend_new(new, k=2, allow=frame["item_id"][1:])["item_id"].to_list() == [
        frame["item_id"][1]
    ]


def test_items_that_a_newcomer_touched_and_nobody_knows(run):
    new = pl.DataFrame({"user": ["a", "a", "b"], "item": ["item 2", "what", "what"]})
    with pytest.raises(FastTowerError, match="'what'"):
        run.recommend_new(new)
    frame = run.recommend_new(new, k=3, unknown="skip")
    biased = run.items["item_id"].gather(run.model.item_bias.detach().argsort(descending=True)[:3].numpy())
    assert frame.filter(pl.col("user_id") == "b")["item_id"].to_list() == biased.to_list()


def test_what_a_newcomer_rated_low_is_seen_and_says_nothing_else(ratings):
    run = fasttower.fit(ratings, Config(**{**vars(CONFIG), "min_rating": 3.0, "epochs": 2}))
    liked = pl.DataFrame({"user": ["n"] * 2, "item": ["item 2", "item 4"], "rating": [5.0, 4.0]})
    first = run.recommend_new(liked, k=3)["item_id"]
    disliked = pl.DataFrame({"user": ["n", "m"], "item": [first[0], first[0]], "rating": [1.0, 1.0]})
    both = run.recommend_new(pl.concat([liked, disliked]), k=2)
    assert both.filter(pl.col("user_id") == "n")["item_id"].to_list() == first[1:].to_list()
    biased = run.items["item_id"].gather(run.model.item_bias.detach().argsort(descending=True).numpy())
    assert both.filter(pl.col("user_id") == "m")["item_id"][0] == next(i for i in biased if i != first[0])
    with pytest.raises(FastTowerError, match="no row is rated at least 3"):
        run.update(disliked)


def test_without_a_bias_nothing_is_said_to_who_has_touched_nothing_known(numbered):
    new = pl.DataFrame({"user": [1, 2], "item": [2, 99_999]})
    assert numbered.recommend_new(new, k=2, unknown="skip")["user_id"].to_list() == [1, 1]


def test_an_update_widens_ids_that_the_type_of_the_run_cannot_hold(ratings):
    narrow = ratings.with_columns(pl.col("user").cast(pl.Int16))
    run = fasttower.fit(narrow, Config(**{**vars(CONFIG), "epochs": 1}))
    assert run.users.schema["user_id"] == pl.Int16
    with pytest.raises(FastTowerError, match="in the run: 40000"):
        run.recommend([40_000])
    updated = run.update(pl.DataFrame({"user": [40_000], "item": ["item 2"]}), epochs=1)
    assert updated.users.schema["user_id"] == pl.Int64
    assert updated.users["user_id"].to_list() == [*range(40), 40_000]
    assert len(updated.recommend([40_000], k=3)) == 3
    with pytest.raises(FastTowerError, match="no type of 64 bits holds together"):
        fasttower.fit(
            narrow.with_columns(pl.col("user") - 1), Config(**{**vars(CONFIG), "epochs": 1})
        ).update(pl.DataFrame({"user": [2**63], "item": ["item 2"]}, schema_overrides={"user": pl.UInt64}))


def test_an_update_takes_in_new_rows_new_users_and_new_items(run, ratings):
    before = [table.clone() for table in run.model.tables]
    new = pl.DataFrame(
        {
            "user": ["new"] * 8 + ["001"] * 3 + ["000"],
            "item": [f"item {item}" for item in range(0, 16, 2)]
            + ["item 58", "a novelty", "0 first"]
            + ["a novelty"],
        }
    )
    updated = run.update(new, epochs=2)
    assert all(table.equal(old) for table, old in zip(run.model.tables, before, strict=True))
    assert set(updated.users["user_id"]) == {*run.users["user_id"], "new"}
    assert set(updated.items["item_id"]) == {*run.items["item_id"], "a novelty", "0 first"}
    for id_map in (updated.users, updated.items):
        assert id_map[:, 0].is_sorted()
        assert id_map[:, 1].to_list() == list(range(len(id_map)))
    assert history(updated, "001") == history(run, "001") | {"item 58", "a novelty", "0 first"}
    assert history(updated, "new") == {f"item {item}" for item in range(0, 16, 2)}
    assert updated.metrics["updates"] == [{"rows": 12, "new_users": 1, "new_items": 2, "epochs": 2}]
    assert updated.metrics["test"] == updated.metrics["popularity"] == {}
    assert [record.phase for record in updated.history[-2:]] == ["update", "update"]
    assert set(updated.recommendations["user_id"]) == set(updated.users["user_id"])
    # The users keep what they liked: their own parity.
    items = updated.recommendations.filter(pl.col("user_id") == "new")["item_id"]
    even = items.filter(items.str.starts_with("item ")).str.strip_prefix("item ").cast(pl.Int64) % 2 == 0
    assert even.mean() >= 0.8


def test_an_update_on_another_device_says_what_it_used(run, tmp_path):
    new = pl.DataFrame({"user": ["001"], "item": ["item 2"]})
    config = dataclasses.replace(run.config, backend="triton", device="cuda", table_dtype="bfloat16")
    trained = dataclasses.replace(run, config=config, device="cuda", backend="triton")
    with pytest.warns(UserWarning, match=r"asked for backend triton \(.*not cpu.*takes numba") as warned:
        updated = trained.update(new, epochs=1)
    assert [warning.filename for warning in warned] == [__file__]
    updated.save(tmp_path / "run")
    config, metrics = (
        json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("config", "metrics")
    )
    assert (updated.device, config["device"], metrics["device"]) == ("cpu",) * 3
    assert (updated.backend, config["backend"], metrics["backend"]) == ("numba",) * 3
    assert config["backend_requested"] == "auto"
    assert config["table_dtype"] == "float32"
    # The loaded run goes on as it is, and a backend that runs is kept without a word.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fasttower.load_run(tmp_path / "run").update(new, epochs=1)
        assert run.update(new, epochs=1).backend == run.config.backend == "torch"


def test_an_update_in_plain_torch_for_want_of_numba_is_a_warning(run, monkeypatch):
    auto = dataclasses.replace(run, config=dataclasses.replace(run.config, backend="auto"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.warns(UserWarning, match="no fused backend for cpu"):
        assert auto.update(pl.DataFrame({"user": ["001"], "item": ["item 2"]}), epochs=1).backend == "torch"


def test_an_update_starts_at_the_vectors_of_the_run(run):
    from fasttower.training.extension import extended_model
    from fasttower_kernels.tables import Interactions

    users, items = torch.arange(len(run.users)) + 1, torch.arange(len(run.items)) * 2
    pairs = Interactions(torch.tensor([0, 0], dtype=torch.int32), torch.tensor([4, 5], dtype=torch.int32))
    model = extended_model(run.model, users, items, pairs, len(users) + 2, 2 * len(items), run.config)
    assert model.infer_users()[users].equal(run.model.infer_users())
    assert model.infer_items()[items].equal(run.model.infer_items())
    assert model.item_bias[items].equal(run.model.item_bias)
    assert (model.item_bias[items + 1] == 0).all()
    # User 0 touched an item of the run and a new one: the one that is known tells where it starts.
    known = run.items["item_id"][2]
    folded = run.recommend_new(pl.DataFrame({"user": ["x"], "item": [known]}), k=1)
    best = (model.infer_users()[0] @ run.model.infer_items().T + run.model.item_bias).detach()
    best[2] = -math.inf
    assert run.items["item_id"][int(best.argmax())] == folded["item_id"][0]
    # The last user touched nothing, and starts as every user of a new run does.
    last = model.infer_users()[-1].detach()
    assert 0 < float(last.norm()) < 1


def test_an_updated_run_can_be_saved_updated_again_and_evaluated(run, tmp_path, ratings):
    new = pl.DataFrame({"user": ["new"], "item": ["item 2"]})
    run.update(new).save(tmp_path / "updated")
    again = fasttower.load_run(tmp_path / "updated").update(new, epochs=1)
    assert len(again.metrics["updates"]) == 2
    assert again.evaluate(ratings.sort("timestamp")[1600:], k=5).users == run.metrics["test_users"]
    theirs = again.recommendations.filter(pl.col("user_id") == "new")
    assert again.recommend(["new"], k=5)["item_id"].equals(theirs["item_id"])


def test_titles_come_with_recommendations_and_neighbours(ml_100k):
    config = Config(**{**vars(CONFIG), "epochs": 1, "valid_fraction": 0.0, "batch_size": 4096})
    run = fasttower.fit(ml_100k, config)
    assert run.recommendations.columns == ["user_id", "item_id", "score", "rank"]
    titles = dict(run.items.select("item_id", "title").iter_rows())
    for frame, column in (
        (run.recommend(run.users["user_id"][:2], k=3), "item_id"),
        (run.similar_items([50], 3), "similar_item_id"),
    ):
        assert frame.columns[-1] == "title"
        assert [titles[item] for item in frame[column]] == frame["title"].to_list()
    updated = run.update(pl.DataFrame({"user": [1, 1], "item": [50, 99_999]}), epochs=1)
    assert dict(updated.items.select("item_id", "title").iter_rows()) == {**titles, 99_999: None}


def test_a_run_says_what_it_is_in_one_line(run):
    assert repr(run).startswith("<Run on DataFrame: 40 users, 60 items, dimension 4; NDCG@5 0.")


def test_a_gpu_whose_memory_runs_out_says_what_to_do(run, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has much more.")

    pairs = pl.DataFrame({"user": ["001"], "item": ["item 1"]})
    for place, ask in (
        ("fasttower_kernels.topk.TopKSearch.__call__", lambda: run.recommend(["001"])),
        ("fasttower_kernels.topk.TopKSearch.__call__", lambda: run.recommend_new(pairs)),
        ("fasttower.run.recommend.fold_in", lambda: run.recommend_new(pairs)),
        ("fasttower_kernels.topk.TopKSearch.__call__", lambda: run.similar_items(["item 1"])),
        ("fasttower_kernels.topk.TopKSearch.__call__", lambda: run.similar_users(["001"])),
        ("fasttower.model.TwoTower.score", lambda: run.score(pairs)),
        ("fasttower.run.evaluate.most_popular", lambda: run.evaluate(pairs)),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(place, fail)
            with pytest.raises(FastTowerError, match=r"Tried to allocate 2.*smaller memory budget") as error:
                ask()
        assert "\n" not in str(error.value)
