import dataclasses
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from fasttower.config import DataConfig
from fasttower.data import ids, splits
from fasttower.data.preparation import StepCount, prepare
from fasttower.errors import FastTowerError
from fasttower_kernels.philox import Purpose, derive_key

PARTS = ("fit", "train", "valid", "test")


def frame_of(rows, columns=("user_id", "item_id", "rating", "timestamp")):
    return pl.DataFrame(rows, schema=list(columns), orient="row")


def pairs(data, part):
    return data.original_ids(getattr(data, part)).rows()


def one_line_error(source, config, **arguments):
    with pytest.raises(FastTowerError) as raised:
        prepare(source, config, **arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def random_rows(n=2000, users=40, items=30, seed=0):
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "user_id": rng.integers(0, users, n) * 7 + 3,
            "item_id": rng.integers(0, items, n) * 11 - 100,
            "rating": rng.integers(1, 6, n).astype(float),
            "timestamp": rng.integers(10**9, 10**9 + n // 3, n),
        }
    )


# Six days; on each row the day, the user, the item and the rating.
BY_HAND = frame_of(
    [
        (1, 10, 5.0, 100),
        (2, 10, 1.0, 101),  # rated below 2: out
        (2, 20, 4.0, 102),
        (1, 20, 3.0, 103),
        (3, 30, 5.0, 104),  # one interaction of user 3: out
        (1, 10, 4.0, 105),  # a repeat: trains again
        (2, 10, 4.0, 106),
        (1, 40, 4.0, 107),  # one interaction of item 40: out, and that of user 9 counts no more
        (2, 20, 4.0, 108),
        (9, 10, 5.0, 109),
        (9, 20, 5.0, 110),
        (1, 20, 2.0, 111),  # rated below 3: no test row
        (1, 10, 5.0, 112),  # already in fit
        (2, 10, 5.0, 113),  # the same pair again
        (2, 10, 5.0, 114),
    ]
)


class TestByHand:
    config = DataConfig(
        min_rating=2,
        min_user_interactions=2,
        min_item_interactions=2,
        test_fraction=0.5,
        valid_fraction=0.4,
        test_min_rating=3,
    )

    def test_parts(self):
        data = prepare(BY_HAND, self.config)
        fit = [(1, 10), (2, 20), (1, 20), (1, 10), (2, 10), (2, 20)]
        assert pairs(data, "fit") == fit
        assert pairs(data, "train") == fit[:3]
        assert pairs(data, "valid") == [(1, 10), (2, 20)] or pairs(data, "valid") == [
            (1, 10),
            (2, 10),
            (2, 20),
        ]
        assert pairs(data, "test") == [(1, 10), (2, 10)]
        assert data.test_pairs_in_fit == 2

    def test_counts(self):
        steps = prepare(BY_HAND, self.config).steps
        assert steps[:5] == (
            StepCount("read", 15, 4, 4, 0),
            StepCount("min_rating >= 2", 14, 4, 4, 1),
            StepCount("min_user_interactions >= 2", 13, 3, 3, 1),
            StepCount("min_item_interactions >= 2", 12, 3, 2, 1),
            StepCount("fit (before the test cut)", 6, 2, 2, 0),
        )
        assert steps[-4:] == (
            StepCount("test: all", 6, 3, 2, 0),
            StepCount("test: cold rows dropped", 4, 2, 2, 2),
            StepCount("test: test_min_rating >= 3", 3, 2, 1, 1),
            StepCount("test: repeated pairs dropped", 2, 2, 1, 1),
        )

    def test_types(self):
        data = prepare(BY_HAND, self.config)
        for part in PARTS:
            assert getattr(data, part).schema == {"user_index": pl.Int32, "item_index": pl.Int32}
        assert data.users.schema == {"user_id": pl.Int64, "user_index": pl.Int32}
        assert data.items.rows() == [(10, 0), (20, 1)]

    def test_without_a_validation_part_train_is_fit(self):
        data = prepare(BY_HAND, DataConfig(test_fraction=0.2, valid_fraction=0))
        assert data.valid is None
        assert data.train.equals(data.fit)

    def test_a_validation_part_without_warm_rows_is_none(self):
        rows = [(1, 1, 1.0, 1), (1, 2, 1.0, 2), (2, 2, 1.0, 3), (1, 1, 1.0, 4)]
        data = prepare(frame_of(rows), DataConfig(test_fraction=0.25, valid_fraction=0.34))
        assert data.valid is None
        assert data.train.equals(data.fit)
        assert len(data.fit) == 3


class TestSplits:
    @settings(max_examples=100, deadline=None)
    @given(
        keys=st.lists(st.integers(0, 6), min_size=0, max_size=40),
        fraction=st.floats(0, 1, exclude_min=True),
    )
    def test_the_cut_is_that_of_a_stable_sort(self, keys, fraction):
        order = np.argsort(np.array(keys), kind="stable")
        first = set(order[: int(len(keys) * (1 - fraction))].tolist())
        assert set(np.flatnonzero(splits.earlier_rows(np.array(keys), fraction)).tolist()) == first

    @pytest.mark.parametrize("split", ["time", "random", "leave-last"])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_every_row_is_kept_once_in_its_order(self, split, seed):
        # All users and items are warm and all pairs are different, so nothing may be dropped.
        rows = frame_of([(u, i, 1.0, 1000 + (17 * u + 5 * i) % 23) for u in range(9) for i in range(8)])
        rows = rows.sample(fraction=1, shuffle=True, seed=seed)
        data = prepare(rows, DataConfig(split=split, test_fraction=0.2, valid_fraction=0.3), seed=seed)
        everything = rows.select("user_id", "item_id").rows()
        dropped = sum(step.dropped_rows for step in data.steps)
        assert len(data.fit) + len(data.test) + dropped == len(rows)
        assert len(data.train) + len(data.valid) <= len(data.fit)
        seen = pairs(data, "fit") + pairs(data, "test")
        assert len(set(seen)) == len(seen)
        for part in PARTS:
            places = [everything.index(pair) for pair in pairs(data, part)]
            assert places == sorted(places)
        assert set(pairs(data, "train")) | set(pairs(data, "valid")) <= set(pairs(data, "fit"))
        assert not set(pairs(data, "train")) & set(pairs(data, "valid"))

    def test_random_depends_on_the_seed_alone_and_the_two_cuts_are_independent(self):
        rows = random_rows()
        config = DataConfig(split="random", test_fraction=0.25, valid_fraction=0.25)
        first, again, other = (prepare(rows, config, seed=seed) for seed in (5, 5, 6))
        for part in PARTS:
            assert_frame_equal(getattr(first, part), getattr(again, part))
        assert not first.fit.equals(other.fit)
        assert len(first.fit) == 1500
        assert len(first.train) == 1125
        key, other_key = (derive_key(5, Purpose.RANDOM_SPLIT, index) for index in (0, 1))
        drawn = [rows.select(splits.before_random_cut(0.25, k)).to_series() for k in (key, other_key)]
        fit = rows.filter(drawn[0]).select("user_id", "item_id")
        assert first.original_ids(first.fit).equals(fit)
        train = fit.filter(splits.before_random_cut(0.25, other_key))
        assert first.original_ids(first.train).equals(train)
        assert not train.equals(fit.filter(splits.before_random_cut(0.25, key)))

    def test_random_draws_known_rows(self):
        rows = pl.DataFrame({"user_id": range(10)})
        words = np.random.PCG64(list(derive_key(3, Purpose.RANDOM_SPLIT))).random_raw(10)
        before = rows.select(splits.before_random_cut(0.3, derive_key(3, Purpose.RANDOM_SPLIT))).to_series()
        assert np.flatnonzero(~before.to_numpy()).tolist() == sorted(np.argsort(words)[7:].tolist())

    def test_leave_last_takes_each_users_last_row_then_the_one_before(self):
        rows = frame_of(
            [(1, 1, 1.0, 5), (2, 1, 1.0, 5), (1, 2, 1.0, 9), (1, 3, 1.0, 9), (2, 2, 1.0, 4), (1, 1, 1.0, 1)]
            + [(3, item, 1.0, 1) for item in (1, 2, 3, 1, 2)]
        )
        data = prepare(rows, DataConfig(split="leave-last"))
        assert pairs(data, "test") == [(2, 1), (1, 3), (3, 2)]
        assert pairs(data, "valid") == [(1, 2), (3, 1)]  # user 2 has no row left in train
        assert pairs(data, "train") == [(1, 1), (1, 1), (3, 1), (3, 2), (3, 3)]

    def test_datetimes_are_split_like_numbers(self):
        rows = random_rows()
        dates = rows.with_columns(pl.from_epoch("timestamp"))
        numbers, dated = (prepare(source, DataConfig()) for source in (rows, dates))
        assert (numbers.timestamp_unit, dated.timestamp_unit) == ("s", "datetime")
        for part in PARTS:
            assert_frame_equal(getattr(numbers, part), getattr(dated, part))


class TestNoTestPart:
    """With a test fraction of 0 every row is fit."""

    @pytest.mark.parametrize("split", ["time", "random", "leave-last"])
    @pytest.mark.parametrize("valid_fraction", [0, 0.25])
    def test_every_row_is_fit(self, split, valid_fraction):
        rows = random_rows()
        data = prepare(rows, DataConfig(split=split, test_fraction=0, valid_fraction=valid_fraction))
        assert data.test is None
        assert data.test_pairs_in_fit == 0
        assert pairs(data, "fit") == rows.select("user_id", "item_id").rows()
        assert data.users["user_id"].to_list() == sorted(set(rows["user_id"]))
        assert data.items["item_id"].to_list() == sorted(set(rows["item_id"]))
        assert not [step for step in data.steps if step.step.startswith("test")]
        assert data.steps[1] == StepCount("fit (no test part)", 2000, 40, 30, 0)
        if valid_fraction:
            assert len(data.train) == {"time": 1500, "random": 1500, "leave-last": 1960}[split]
        else:
            assert data.valid is None
            assert data.train.equals(data.fit)

    @pytest.mark.parametrize("split", ["time", "random"])
    def test_the_parts_are_those_with_a_test_file(self, split, tmp_path):
        rows = random_rows()
        rows[:50].write_parquet(tmp_path / "test.parquet")
        config = DataConfig(split=split, valid_fraction=0.3, test_min_rating=3)
        beside = prepare(rows, dataclasses.replace(config, test_data=str(tmp_path / "test.parquet")), seed=3)
        data = prepare(rows, dataclasses.replace(config, test_fraction=0), seed=3)
        for name in ("fit", "train", "valid", "users", "items"):
            assert_frame_equal(getattr(data, name), getattr(beside, name))

    def test_leave_last_keeps_each_users_last_row_for_validation(self):
        rows = frame_of([(1, 1, 1.0, 5), (2, 1, 1.0, 5), (1, 2, 1.0, 9), (2, 2, 1.0, 4), (1, 1, 1.0, 1)])
        data = prepare(rows, DataConfig(split="leave-last", test_fraction=0))
        assert pairs(data, "valid") == [(2, 1), (1, 2)]
        assert pairs(data, "train") == [(1, 1), (2, 2), (1, 1)]

    def test_filters_hold_and_test_min_rating_is_validations_alone(self):
        config = DataConfig(
            min_rating=2,
            min_user_interactions=2,
            min_item_interactions=2,
            test_fraction=0,
            valid_fraction=0.3,
            test_min_rating=5,
        )
        data = prepare(BY_HAND, config)
        assert len(data.fit) == 12
        assert [step.rows for step in data.steps[:5]] == [15, 14, 13, 12, 12]
        assert pairs(data, "valid") == [(1, 10), (2, 10)]

    def test_a_test_file_is_a_test_part(self, tmp_path):
        random_rows()[:50].write_parquet(tmp_path / "test.parquet")
        files = {"test_data": str(tmp_path / "test.parquet")}
        data = prepare(random_rows(), DataConfig(test_fraction=0, **files))
        assert_frame_equal(data.test, prepare(random_rows(), DataConfig(**files)).test)

    def test_a_validation_file(self, tmp_path):
        random_rows()[:50].write_parquet(tmp_path / "valid.parquet")
        data = prepare(random_rows(), DataConfig(test_fraction=0, valid_data=str(tmp_path / "valid.parquet")))
        assert (len(data.train), len(data.fit), data.test) == (2000, 2050, None)

    def test_filters_that_leave_nothing(self):
        message = one_line_error(BY_HAND, DataConfig(test_fraction=0, min_rating=6))
        assert "'min_rating >= 6' (15 rows before it)" in message


class TestIds:
    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1))
    def test_relabelling_permutes_the_result(self, seed):
        rows = random_rows(300, seed=seed % 7)
        rng = np.random.default_rng(seed)
        old = rows["item_id"].unique().sort()
        new = pl.Series(rng.permutation(10**12 + np.arange(len(old))))
        config = DataConfig(test_min_rating=3, min_item_interactions=2)
        plain = prepare(rows, config)
        for labels in (new, new.cast(pl.String), pl.format("i{}", new)):
            names = labels if isinstance(labels, pl.Series) else pl.select(labels).to_series()
            renamed = prepare(rows.with_columns(item_id=pl.col("item_id").replace_strict(old, names)), config)
            for part in PARTS:
                expected = plain.original_ids(getattr(plain, part))
                expected = expected.with_columns(item_id=pl.col("item_id").replace_strict(old, names))
                assert_frame_equal(renamed.original_ids(getattr(renamed, part)), expected)
            assert renamed.items["item_id"].is_sorted()
            assert renamed.items.schema["item_id"] == names.dtype

    @settings(max_examples=100, deadline=None)
    @given(data=st.data())
    def test_codes_are_positions_among_the_sorted_ids(self, data):
        dtype = data.draw(st.sampled_from([pl.Int8, pl.UInt8, pl.Int32, pl.Int64, pl.UInt64, pl.String]))
        if dtype == pl.String:
            values = data.draw(st.lists(st.text(max_size=3), min_size=1))
        else:
            low, high = (pl.select(bound()).item() for bound in (dtype.min, dtype.max))
            near = st.integers(max(low, -3), 3) if low < 0 else st.integers(high - 9, high)
            values = data.draw(
                st.lists(near | st.integers(low, high) if data.draw(st.booleans()) else near, min_size=1)
            )
        series = pl.Series("id", values, dtype=dtype)
        codes, distinct = ids.encode(series)
        assert distinct.to_list() == sorted(set(values))
        assert distinct.dtype == dtype
        assert [distinct[code] for code in codes.to_list()] == values

    def test_ids_spread_too_wide_for_a_table(self):
        values = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 5000)
        codes, distinct = ids.encode(pl.Series(np.concatenate([values, values[::3]])))
        assert distinct.is_sorted()
        assert len(distinct) == 5000
        assert distinct.gather(codes).to_list() == [*values, *values[::3]]

    def test_text_ids_keep_their_zeros(self, tmp_path):
        path = tmp_path / "a.csv"
        lines = [f"00{u},{i},{3},{100 + i}" for i in range(10) for u in range(3)]
        path.write_text("user_id,item_id,rating,timestamp\n" + "\n".join(lines))
        data = prepare(path, DataConfig(split="random"))
        assert data.users.rows() == [("000", 0), ("001", 1), ("002", 2)]


class TestFiles:
    """Validation and test from files."""

    def write(self, path, rows, columns=("user_id", "item_id")):
        frame_of(rows, columns).write_csv(path)
        return str(path)

    def test_all_three(self, tmp_path):
        train = self.write(tmp_path / "train.csv", [(1, 1), (1, 2), (2, 2), (3, 3)])
        valid = self.write(tmp_path / "valid.csv", [(1, 3), (9, 1), (1, 9), (1, 3)])
        test = self.write(tmp_path / "test.csv", [(2, 1), (1, 3), (8, 1), (2, 1)])
        data = prepare(train, DataConfig(valid_data=valid, test_data=test))
        assert pairs(data, "train") == [(1, 1), (1, 2), (2, 2), (3, 3)]
        assert pairs(data, "fit") == [*pairs(data, "train"), (1, 3), (1, 3)]
        assert pairs(data, "valid") == [(1, 3)]
        assert pairs(data, "test") == [(2, 1), (1, 3)]
        assert data.test_pairs_in_fit == 1
        assert data.users["user_id"].to_list() == [1, 2, 3]
        dropped = {step.step: step.dropped_rows for step in data.steps}
        assert dropped["valid: cold rows dropped"] == 2
        assert dropped["test: cold rows dropped"] == 1
        assert data.timestamp_unit is None

    def test_minimum_ratings_hold_for_files_and_counts_for_the_source(self, tmp_path):
        columns = ("user_id", "item_id", "rating")
        train = self.write(tmp_path / "a.csv", [(1, 1, 5), (1, 2, 5), (2, 2, 5), (1, 3, 1)], columns)
        valid = self.write(tmp_path / "b.csv", [(1, 1, 1), (1, 2, 3), (1, 1, 5)], columns)
        test = self.write(tmp_path / "c.csv", [(1, 1, 3), (1, 2, 4)], columns)
        config = DataConfig(
            valid_data=valid, test_data=test, min_rating=2, min_user_interactions=2, test_min_rating=4
        )
        data = prepare(train, config)
        assert pairs(data, "train") == [(1, 1), (1, 2)]
        assert pairs(data, "fit") == [(1, 1), (1, 2), (1, 2), (1, 1)]
        assert pairs(data, "valid") == [(1, 1)]
        assert pairs(data, "test") == [(1, 2)]

    def test_a_test_file_with_a_validation_cut(self, tmp_path):
        test = self.write(tmp_path / "test.csv", [(3, 10)])
        data = prepare(random_rows(), DataConfig(test_data=test, valid_fraction=0.1))
        assert len(data.fit) == 2000
        assert len(data.train) == 1800

    def test_ids_of_text_match_those_that_look_like_numbers(self, tmp_path):
        train = self.write(tmp_path / "a.csv", [("007", "1"), ("7", "2"), ("8", "1")])
        test = self.write(tmp_path / "b.csv", [("7", "1")])
        data = prepare(train, DataConfig(test_data=test, valid_fraction=0))
        assert pairs(data, "test") == [("7", 1)]
        message = one_line_error(test, DataConfig(test_data=train, valid_fraction=0))
        assert "user_id holds text where" in message

    def test_files_that_leave_nothing(self, tmp_path):
        train = self.write(tmp_path / "a.csv", [(1, 1), (2, 2)])
        cold = self.write(tmp_path / "b.csv", [(3, 1), (1, 3)])
        both = {"test_data": train, "valid_data": train}
        for part in ("test", "valid"):
            message = one_line_error(train, DataConfig(**{**both, f"{part}_data": cold}))
            assert f"'{part}: cold rows dropped' (2 rows before it)" in message


class TestErrors:
    def test_what_emptied_the_rows_is_named(self):
        for settings_, step in (
            ({"min_rating": 6}, "'min_rating >= 6' (15 rows before it)"),
            ({"min_user_interactions": 99}, "'min_user_interactions >= 99'"),
            ({"min_item_interactions": 99}, "'min_item_interactions >= 99'"),
            ({"test_min_rating": 6}, "'test: test_min_rating >= 6'"),
            (
                {"test_fraction": 0.01, "min_rating": 5, "min_user_interactions": 4},
                "'min_user_interactions >= 4'",
            ),
            ({"test_fraction": 0.999}, "'fit (before the test cut)' (15 rows before it)"),
        ):
            assert step in one_line_error(BY_HAND, DataConfig(**settings_))
        message = one_line_error(BY_HAND[[0, 2]], DataConfig(test_fraction=0.5, valid_fraction=0))
        assert "'test: cold rows dropped' (1 rows before it)" in message

    def test_splits_that_need_timestamps_offer_those_that_do_not(self):
        rows = BY_HAND.drop("timestamp")
        for split in ("time", "leave-last"):
            message = one_line_error(rows, DataConfig(split=split))
            assert "--split random" in message
            assert "--test-data" in message
            # Nothing is cut: nothing to cut by.
            assert len(prepare(rows, DataConfig(split=split, test_fraction=0, valid_fraction=0)).fit) == len(
                rows
            )
            assert "--split random" in one_line_error(rows, DataConfig(split=split, test_fraction=0))
        assert prepare(rows, DataConfig(split="random")).timestamp_unit is None

    def test_filters_that_need_ratings(self):
        rows = BY_HAND.drop("rating")
        assert "--min-rating" in one_line_error(rows, DataConfig(min_rating=3))
        assert "--test-min-rating" in one_line_error(rows, DataConfig(test_min_rating=3))
        assert len(prepare(rows, DataConfig()).fit) == 12

    def test_a_name_that_is_no_path(self):
        assert "ml-2m" in one_line_error("ml-2m", DataConfig())


def test_synthetic_names_are_generated_from_the_seed(monkeypatch):
    from types import SimpleNamespace

    from fasttower.data import synthetic

    asked = []

    def generate(name, seed):
        asked.append((name, seed))
        rows = random_rows()
        return SimpleNamespace(**{column: rows[column].to_numpy() for column in rows.columns})

    monkeypatch.setattr(synthetic, "generate", generate)
    data = prepare("synthetic-1m", DataConfig(), seed=4)
    assert asked == [("synthetic-1m", 4)]
    assert_frame_equal(data.fit, prepare(random_rows(), DataConfig()).fit)


def test_a_named_set_comes_from_the_data_root(tmp_path):
    (tmp_path / "ml-1m").mkdir()
    random_rows().write_csv(tmp_path / "ml-1m" / "ratings.csv")
    data = prepare("ml-1m", DataConfig(data_root=tmp_path))
    assert_frame_equal(data.fit, prepare(random_rows(), DataConfig()).fit)


def test_the_data_stage_never_imports_torch():
    code = "import sys, fasttower.data.preparation; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@pytest.mark.parametrize("split", ["time", "random", "leave-last"])
def test_few_validation_users_bring_another_cut_within_the_train_of_the_first(split, ratings, monkeypatch):
    prepared = prepare(ratings, DataConfig(split=split))
    assert len(prepared.cuts) == 2
    (first, valid), (second, earlier) = prepared.cuts
    assert first.equals(prepared.train)
    assert valid.equals(prepared.valid)
    assert 0 < len(second) < len(first)
    assert not earlier.is_empty()
    pairs = ["user_index", "item_index"]
    assert len(earlier.join(first, on=pairs, how="semi")) == len(earlier)  # rows of the first cut's train
    monkeypatch.setattr("fasttower.data.preparation.ENOUGH_USERS", 1)
    assert len(prepare(ratings, DataConfig(split=split)).cuts) == 1
