"""MovieLens' titles, found beside the ratings and never needed."""

import zipfile

import polars as pl
import pytest

from fasttower.config import Config
from fasttower.data.preparation import prepare
from fasttower.data.titles import read_titles

FILES = {
    "ml-100k": ("u.data", "u.item", "1|Misérables, Les (1995)|01-Jan-1995||x|0\n2|B|x|y\n", "iso-8859-1"),
    "ml-1m": ("ratings.dat", "movies.dat", "1::Misérables, Les (1995)::Drama\n2::B::Comedy\n", "iso-8859-1"),
    "ml-20m": (
        "ratings.csv",
        "movies.csv",
        'movieId,title,genres\n1,"Misérables, Les (1995)",Drama\n2,B,Comedy\n',
        "utf-8",
    ),
}
EXPECTED = pl.DataFrame({"item_id": [1, 2], "title": ["Misérables, Les (1995)", "B"]})


def folder_of(tmp_path, name):
    ratings, titles, text, encoding = FILES[name]
    folder = tmp_path / name
    folder.mkdir()
    (folder / ratings).write_text("")
    (folder / titles).write_bytes(text.encode(encoding))
    return folder


@pytest.mark.parametrize("name", FILES)
def test_titles_of_a_folder_the_folder_around_it_and_the_ratings_file(tmp_path, name):
    folder = folder_of(tmp_path, name)
    for source in (folder, tmp_path, folder / FILES[name][0]):
        assert read_titles(source).equals(EXPECTED)


@pytest.mark.parametrize("name", FILES)
def test_titles_of_a_zip(tmp_path, name):
    folder = folder_of(tmp_path, name)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in folder.iterdir():
            archive.writestr(f"__MACOSX/{name}/{file.name}", b"\0\5\x16\7")
            archive.write(file, f"{name}/{file.name}")
    assert read_titles(tmp_path / "set.zip").equals(EXPECTED)


def test_a_file_of_another_name_has_no_titles_whatever_lies_beside_it(tmp_path):
    folder = folder_of(tmp_path, "ml-20m")
    (folder / "mine.csv").write_text("user,item\n1,1\n")
    assert read_titles(folder / "mine.csv") is None


@pytest.mark.parametrize(
    "content", [b"id,name\n1,A\n", b"", b"movieId,title\nx,A\n", b"\xff\xfe\x00", b"movieId,title\n1\n"]
)
def test_titles_that_cannot_be_read_are_no_titles(tmp_path, content):
    folder = folder_of(tmp_path, "ml-20m")
    (folder / "movies.csv").write_bytes(content)
    found = read_titles(folder)
    assert found is None or found.is_empty()


def test_a_broken_zip_and_a_missing_path_have_none(tmp_path):
    (tmp_path / "broken.zip").write_bytes(b"nonsense")
    assert read_titles(tmp_path / "broken.zip") is None
    assert read_titles(tmp_path / "nothing" / "there") is None


def test_items_of_movielens_have_titles_in_their_own_rows(ml_100k):
    items = prepare(ml_100k, Config()).items
    assert items.columns == ["item_id", "item_index", "title"]
    assert items["item_index"].to_list() == list(range(len(items)))
    titles = dict(items.select("item_id", "title").iter_rows())
    assert titles[1] == "Toy Story (1995)"
    assert titles[50] == "Star Wars (1977)"


def test_items_whose_ids_are_text_get_none(tmp_path):
    folder = folder_of(tmp_path, "ml-20m")
    rows = "".join(f"u{i % 7},a{i % 5},3,{i}\n" for i in range(100))
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + rows)
    assert prepare(folder, Config()).items.columns == ["item_id", "item_index"]
