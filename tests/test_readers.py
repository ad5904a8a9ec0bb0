import datetime as dt
import gzip
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttower.data import readers, timestamps
from fasttower.data.readers import read_interactions
from fasttower.errors import FastTowerError

ROWS = [(1, 31, 2.5, 978300760), (7, 1029, 3.0, 978302109), (7, 31, 4.0, 978301968)]


def rows_of(interactions):
    """Rows in the project's names, ids of text as str."""
    return interactions.frame.with_columns(pl.col(pl.Categorical).cast(pl.String)).rows()


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def delimited(separator, header=None, rows=ROWS):
    lines = [separator.join(map(str, row)) for row in rows]
    return "\n".join(([header] if header else []) + lines) + "\n"


def one_line_error(source, asked=None):
    with pytest.raises(FastTowerError) as raised:
        read_interactions(source, asked)
    assert "\n" not in str(raised.value)
    return str(raised.value)


LAYOUTS = {
    "u.data": delimited("\t"),
    "ratings.dat": delimited("::"),
    "ratings.csv": delimited(",", "userId,movieId,rating,timestamp"),
    "crlf.csv": delimited(",", "userId,movieId,rating,timestamp").replace("\n", "\r\n"),
    "bom.csv": "\ufeff" + delimited(",", "userId,movieId,rating,timestamp"),
    "any.tsv": delimited("\t", "USER_ID\tItem-Id\tScore\tTS"),
    "ml.inter": delimited("\t", "user_id:token\titem_id:token\trating:float\ttimestamp:float"),
    "order.csv": "timestamp,rating,title,item_id,user_id\n"
    + "".join(f'{t},{r},"a, b",{i},{u}\n' for u, i, r, t in ROWS),
}


class TestLayouts:
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_text_files(self, tmp_path, name):
        read = read_interactions(write(tmp_path / name, LAYOUTS[name]))
        assert rows_of(read) == ROWS
        assert read.frame.dtypes[:3] == [pl.Int64, pl.Int64, pl.Float64]
        assert read.frame.schema["timestamp"].is_integer()
        assert read.timestamp_unit == "s"

    @pytest.mark.parametrize("name", ["u.data", "ratings.dat", "ratings.csv"])
    def test_zips_and_folders(self, tmp_path, name):
        folder = tmp_path / "ml"
        folder.mkdir()
        write(folder / name, LAYOUTS[name])
        write(folder / "movies.csv", "movieId,title\n31,x\n")
        with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
            archive.writestr(f"__MACOSX/ml/{name}", "shadow")
            for file in folder.iterdir():
                archive.write(file, f"ml/{file.name}")
        before = set(Path(tempfile.gettempdir()).glob("fasttower-*"))
        for source in (folder, tmp_path / "ml.zip", str(tmp_path / "ml.zip")):
            assert rows_of(read_interactions(source)) == ROWS
        folder.rename(tmp_path / "inner")
        assert rows_of(read_interactions(tmp_path)) == ROWS
        assert set(Path(tempfile.gettempdir()).glob("fasttower-*")) == before

    def test_parquet_files_folders_and_globs(self, tmp_path):
        frame = pl.DataFrame(ROWS, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
        frame[:2].write_parquet(tmp_path / "a.parquet")
        frame[2:].write_parquet(tmp_path / "b.parquet")
        for source in (tmp_path, tmp_path / "*.parquet"):
            assert rows_of(read_interactions(source)) == ROWS
        assert rows_of(read_interactions(tmp_path / "b.parquet")) == ROWS[2:]

    def test_frames(self):
        frame = pl.DataFrame(ROWS, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
        for source in (frame, frame.lazy(), frame.to_pandas(), frame.to_arrow()):
            assert rows_of(read_interactions(source)) == ROWS

    def test_movielens(self, ml_100k, ml_1m):
        for path, rows, users, items, first, last in (
            (ml_100k, 100_000, 943, 1682, 874724710, 893286638),
            (ml_1m, 1_000_209, 6040, 3706, 956703932, 1046454590),
        ):
            frame = read_interactions(path).frame
            assert len(frame) == rows
            assert (frame["user_id"].n_unique(), frame["item_id"].n_unique()) == (users, items)
            assert (frame["timestamp"].min(), frame["timestamp"].max()) == (first, last)

    def test_ratings_and_timestamps_may_lack(self, tmp_path):
        read = read_interactions(write(tmp_path / "a.csv", "user,item\n1,2\n3,4\n"))
        assert rows_of(read) == [(1, 2), (3, 4)]
        assert read.timestamp_unit is None
        assert rows_of(read_interactions(write(tmp_path / "a.dat", "1::2\n3::4\n"))) == [(1, 2), (3, 4)]

    def test_columns_can_be_named(self, tmp_path):
        path = write(tmp_path / "a.csv", "who,what,item_id\n1,2,3\n")
        assert rows_of(read_interactions(path, {"user_id": "who", "item_id": "what"})) == [(1, 2)]

    @pytest.mark.parametrize("name", LAYOUTS)
    def test_packed_by_gzip(self, tmp_path, name):
        path = write(tmp_path / f"{name}.gz", gzip.compress(LAYOUTS[name].encode()))
        for source in (path, tmp_path):
            read = read_interactions(source)
            assert rows_of(read) == ROWS
            assert read.name == str(path)

    def test_several_files_packed_by_gzip(self, tmp_path):
        for part, row in enumerate(ROWS):
            (tmp_path / str(part)).mkdir()
            text = delimited(",", "user,item,rating,timestamp", [row])
            write(tmp_path / str(part) / "a.csv.gz", gzip.compress(text.encode()))
        assert rows_of(read_interactions(tmp_path / "*" / "a.csv.gz")) == ROWS


class TestIds:
    """Integers where every value is spelled as an integer is, else text; in every value the caller's own."""

    @pytest.mark.parametrize(
        "odd", ["007", "+7", " 7", "-07", "-0", "7 ", "7.0", "1e3", "x7", "9" * 19, '"07"']
    )
    @pytest.mark.parametrize("row", [0, 5000])
    def test_one_odd_spelling_anywhere_keeps_the_column_text(self, tmp_path, odd, row):
        users = [str(n) for n in range(1, 6001)]
        users[row] = odd
        text = "user_id,item_id,rating\n" + "".join(f"{user},{n},0.5\n" for n, user in enumerate(users))
        frame = read_interactions(write(tmp_path / "a.csv", text)).frame
        assert frame["user_id"].cast(pl.String).to_list() == [user.strip('"') for user in users]
        assert frame["item_id"].to_list() == list(range(6000))

    @pytest.mark.parametrize("block", [*range(1, 26), 1 << 18])
    def test_the_look_at_the_bytes_sees_across_blocks(self, tmp_path, monkeypatch, block):
        monkeypatch.setattr(readers, "_BLOCK_BYTES", block)
        monkeypatch.setattr(readers, "_SAMPLE_ROWS", 1)
        for user in ("10", "0", "-5", "105"):
            text = f"user_id,item_id\n3,4\n{user},{user}\n"
            assert rows_of(read_interactions(write(tmp_path / "a.csv", text)))[1] == (int(user), int(user))
        for user in ("01", "00", "-01"):
            for text in (f"user_id,item_id\n3,4\n{user},5\n", f"user_id,item_id\n4,3\n5,{user}"):
                assert f"'{user}'" in str(rows_of(read_interactions(write(tmp_path / "a.csv", text))))

    @settings(max_examples=60, deadline=None)
    @given(ids=st.lists(st.text("01257-+ ax", min_size=1, max_size=4), min_size=1, max_size=12))
    def test_ids_of_a_text_file_come_back_as_they_were(self, tmp_path_factory, ids):
        path = tmp_path_factory.mktemp("ids") / "a.tsv"
        write(path, "user_id\titem_id\n" + "".join(f"{text}\t1\n" for text in ids))
        assert read_interactions(path).frame["user_id"].cast(pl.String).to_list() == ids

    def test_types_of_typed_sources_are_kept(self):
        frame = pl.DataFrame(
            {"user_id": ["7", "8"], "item_id": [1, 2]}, schema={"user_id": pl.String, "item_id": pl.UInt16}
        )
        read = read_interactions(frame).frame
        assert read["user_id"].cast(pl.String).to_list() == ["7", "8"]
        assert read.schema["item_id"] == pl.UInt16


class TestTimestamps:
    @pytest.mark.parametrize(("factor", "unit"), [(1, "s"), (1000, "ms"), (10**6, "us"), (10**9, "ns")])
    def test_units(self, tmp_path, factor, unit):
        rows = [(u, i, r, t * factor) for u, i, r, t in ROWS]
        path = write(tmp_path / "a.csv", delimited(",", "user,item,rating,time", rows))
        assert read_interactions(path).timestamp_unit == unit
        assert rows_of(read_interactions(path)) == rows

    @pytest.mark.parametrize(
        "form", ["%Y-%m-%d", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S.5"]
    )
    def test_dates_in_text(self, tmp_path, form):
        times = [dt.datetime(2001, 2, 3, 4, 5, 6), dt.datetime(1999, 1, 1)]
        path = write(
            tmp_path / "a.csv", delimited(",", "user,item,date", [(1, 2, t.strftime(form)) for t in times])
        )
        read = read_interactions(path)
        assert read.timestamp_unit == "datetime"
        assert [value.date() for value in read.frame["timestamp"]] == [t.date() for t in times]
        assert ("%H" not in form) or read.frame["timestamp"][0].hour == 4

    def test_limits_of_the_units(self):
        below = [(1e11, "s"), (1e14, "ms"), (1e17, "us")]
        for (limit, unit), above in zip(below, ("ms", "us", "ns"), strict=True):
            assert timestamps.unit_of(limit - 100) == timestamps.unit_of(100 - limit) == unit
            assert timestamps.unit_of(limit) == above

    def test_datetimes_of_frames_and_decimals(self, tmp_path):
        frame = pl.DataFrame({"user_id": [1], "item_id": [2], "timestamp": [dt.datetime(2001, 2, 3)]})
        assert read_interactions(frame).timestamp_unit == "datetime"
        path = write(tmp_path / "a.csv", "user,item,timestamp\n1,2,978300760.5\n")
        assert rows_of(read_interactions(path)) == [(1, 2, 978300760.5)]

    def test_two_units_in_one_column(self, tmp_path):
        path = write(tmp_path / "a.csv", "user,item,timestamp\n1,2,978300760000\n1,3,978300760\n")
        message = one_line_error(path)
        assert f"{path}, line 3: timestamp is in s where others are in ms (found '978300760')" in message

    @pytest.mark.parametrize("rare", ["s", "ms", "us", "ns"])
    @pytest.mark.parametrize("common", ["s", "ms", "us", "ns"])
    def test_the_rarer_unit_is_blamed(self, rare, common):
        factors = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
        times = [978300760 * factors[unit] for unit in (common, common, rare, common, rare)]
        frame = pl.DataFrame({"user_id": 1, "item_id": 2, "timestamp": times})
        if rare == common:
            assert read_interactions(frame).timestamp_unit == common
        else:
            assert f"row 3: timestamp is in {rare} where others are in {common}" in one_line_error(frame)

    @pytest.mark.parametrize("column", ["user_id", "item_id", "timestamp"])
    def test_integers_that_numpy_lacks(self, column):
        frame = pl.DataFrame({"user_id": [1], "item_id": [2], "timestamp": [978300760]})
        message = one_line_error(frame.cast({column: pl.Int128}))
        assert f"{column} is Int128, expected" in message
        assert "64 bits" in message


class TestBadValues:
    """One line that names the file and its first bad row."""

    HEADER = "user_id,item_id,rating,timestamp\n"
    GOOD = "1,2,3.5,978300760\n"

    @pytest.mark.parametrize(
        ("bad", "column"),
        [
            (",2,3,978300760", "user_id"),
            ("1,,3,978300760", "item_id"),
            ("1,2,,978300760", "rating"),
            ("1,2,nan,978300760", "rating"),
            ("1,2,good,978300760", "rating"),
            ("1,2,3", "timestamp"),
            ("1,2,3,", "timestamp"),
            ("1,2,3,soon", "timestamp"),
            ("", "user_id"),
        ],
    )
    @pytest.mark.parametrize("before", [1, 3000])
    def test_csv(self, tmp_path, bad, column, before):
        path = write(
            tmp_path / "a.csv", self.HEADER + self.GOOD * before + bad + "\n" + self.GOOD + bad + "\n"
        )
        message = one_line_error(path)
        assert f"{path}, line {before + 2}: {column} is " in message

    def test_files_without_a_header_count_from_their_first_line(self, tmp_path):
        path = write(tmp_path / "a.dat", "1::2::3::978300760\n1::2::x::978300760\n")
        assert f"{path}, line 2: rating is missing or unreadable (found 'x')" in one_line_error(path)

    def test_the_file_of_several_is_named(self, tmp_path):
        write(tmp_path / "a.csv", self.HEADER + self.GOOD)
        bad = write(tmp_path / "b.csv", self.HEADER + self.GOOD + "1,2,,978300760\n")
        assert f"{bad}, line 3: rating" in one_line_error(tmp_path / "*.csv")

    @pytest.mark.parametrize(
        ("column", "values"),
        [("user_id", [1, None]), ("rating", [1.0, None]), ("rating", [1.0, float("nan")])],
    )
    def test_frames(self, column, values):
        frame = pl.DataFrame({"user_id": [1, 2], "item_id": [1, 2], "rating": [1.0, 2.0]})
        frame = frame.with_columns(pl.Series(column, values))
        assert f"the frame, row 2: {column} is" in one_line_error(frame)

    @pytest.mark.parametrize(
        ("column", "values"), [("user_id", [1.5, 2.5]), ("rating", [[1], [2]]), ("timestamp", [True, False])]
    )
    def test_columns_of_another_kind(self, column, values):
        frame = pl.DataFrame({"user_id": [1, 2], "item_id": [1, 2], column: values})
        assert f"the frame: {column} is" in one_line_error(frame)

    def test_a_pandas_column_of_mixed_types(self):
        import pandas as pd

        frame = pd.DataFrame({"user_id": [1, "b"], "item_id": [1, 2]})
        assert "the frame: " in one_line_error(frame)


class TestNotWhatTheNameSays:
    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("a.csv", "", "empty"),
            ("a.csv", "user_id,item_id\n", "no rows"),
            ("a.csv", "user_id;item_id\n1;2\n", "found no ','"),
            ("a.tsv", "user_id,item_id\n1,2\n", "found no"),
            ("a.dat", "1,2,3,4\n", "found no '::'"),
            ("a.csv", "1,2,3,4\n1,2,3,4\n", "no column of user"),
            ("a.csv", "user_id,item_id\n1,2,3\n", "line 2: 3 fields, where the first line has 2"),
            ("a.csv", b"PK\x03\x04user,item\n", "not text"),
            ("a.csv", b"user,it\0em\n1,2\n", "not text"),
            ("a.csv", b"user_id,item_id,\xff\xfe\n1,2,3\n", "not UTF-8"),
            ("a.csv", b"user_id,item_id\n1,2\n\xff\xfe,3\n", "utf-8"),
            ("a.parquet", "user_id,item_id\n1,2\n", "cannot be read"),
            ("a.zip", "user_id,item_id\n1,2\n", "not a readable zip"),
            ("a.xlsx", "user_id,item_id\n1,2\n", "unknown kind of file '.xlsx'"),
        ],
    )
    def test_files(self, tmp_path, name, content, expected):
        path = write(tmp_path / name, content)
        message = one_line_error(path)
        assert str(path) in message
        assert expected in message

    def test_a_gzip_that_is_cut_short_or_none_or_goes_by_another_name(self, tmp_path):
        packed = gzip.compress(LAYOUTS["ratings.csv"].encode())
        path = tmp_path / "a.csv.gz"
        for content in (packed[:-12], packed[:20] + bytes(9) + packed[29:], b"user,item\n1,2\n"):
            message = one_line_error(write(path, content))
            assert f"{path}: not a readable gzip" in message
        path = write(tmp_path / "a.csv", packed)
        assert f"{path}: packed by gzip, though its name says .csv; call it a.csv.gz" in one_line_error(path)
        assert "unknown kind of file '.txt'" in one_line_error(write(tmp_path / "a.txt.gz", packed))

    def test_a_line_with_too_many_fields_is_named(self, tmp_path):
        row = '"a, b\nc",1,2\n'
        for before in (2, 2000):  # within what is looked at first, and behind it
            path = write(tmp_path / "a.csv", "user,item,rating\n" + row * before + "x,1,2,3\n" + row)
            message = one_line_error(path)
            assert f"{path}, line {2 * before + 2}: 4 fields, where the first line has 3" in message
        path = write(tmp_path / "a.csv", "user,item,rating\n" + "1,2,3,4\n" + "1" * 200_000 + ",2,3\n")
        assert f"{path}, line 2: 4 fields" in one_line_error(path)

    def test_a_zip_that_is_cut_short_or_damaged(self, tmp_path):
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("ratings.csv", delimited(",", "user,item,rating,timestamp", ROWS * 100))
        whole = path.read_bytes()
        for content in (whole[:-30], whole[:60] + bytes(20) + whole[80:]):
            assert "not a readable zip" in one_line_error(write(path, content))

    def test_a_zip_or_folder_without_one_table(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("readme.txt", "x")
        assert "found none" in one_line_error(tmp_path / "a.zip")
        (tmp_path / "folder").mkdir()
        write(tmp_path / "folder" / "a.csv", "x")
        write(tmp_path / "folder" / "b.csv", "x")
        assert "found a.csv, b.csv" in one_line_error(tmp_path / "folder")

    def test_blank_lines_at_the_end_are_no_rows(self, tmp_path):
        path = write(tmp_path / "a.csv", delimited(",", "user,item,rating,timestamp") + "\n\n")
        assert rows_of(read_interactions(path)) == ROWS

    def test_nothing_there(self, tmp_path):
        assert "path of the data is empty" in one_line_error("")
        assert str(tmp_path / "a.csv") in one_line_error(tmp_path / "a.csv")
        assert str(tmp_path / "*.csv") in one_line_error(tmp_path / "*.csv")
        assert "found list" in one_line_error([1, 2])

    def test_columns_are_listed(self, tmp_path):
        path = write(tmp_path / "a.csv", "who,item_id\n1,2\n")
        assert "'who', 'item_id'" in one_line_error(path)
        message = one_line_error(path, {"user_id": "whom"})
        assert "no column 'whom' (--user-column)" in message
        assert "'who', 'item_id'" in message
        assert "two things" in one_line_error(path, {"user_id": "item_id"})


def test_the_look_at_the_bytes_takes_ratings_and_times_for_what_they_are():
    block = np.frombuffer(b"\n\n1,20,0.5,978300760\n10,3,0,105\n-5,0,0.5,0\r\n,,\r\n", np.uint8)
    assert not readers._odd_spelling(block, ord(","))


def test_a_quoted_empty_id_is_a_missing_one(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text('user,item,timestamp\n"a","x",1\n"","y",2\n')
    with pytest.raises(FastTowerError, match="line 3: user_id is missing"):
        read_interactions(path)


def test_two_columns_of_one_name(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("user,user,item,timestamp\n1,2,3,4\n")
    with pytest.raises(FastTowerError, match="two columns are named 'user'"):
        read_interactions(path)


def test_an_infinite_timestamp_is_named(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("user,item,timestamp\n1,2,3.5\n1,3,inf\n")
    with pytest.raises(FastTowerError, match="line 3: timestamp is infinite"):
        read_interactions(path)
