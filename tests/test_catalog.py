import sys
import types
import warnings

import pytest

from fasttower.data import catalog
from fasttower.errors import FastTowerError


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The three places, in the order of their search, all there and empty."""
    import pooch

    places = [tmp_path / name for name in ("root", "env", "cache")]
    for place in places:
        place.mkdir()
    monkeypatch.setenv("FASTTOWER_DATA", str(places[1]))
    monkeypatch.setattr(pooch, "os_cache", lambda project: places[2])
    return places


@pytest.fixture
def no_network(monkeypatch):
    import requests

    def refuse(*args, **kwargs):
        raise requests.exceptions.ConnectionError("no route to host\nand more")

    monkeypatch.setattr(requests, "get", refuse)


@pytest.fixture
def server(monkeypatch):
    """Answers every address with these bytes, and notes what was asked."""
    import requests

    asked = []

    def get(address, **kwargs):
        asked.append((address, kwargs))
        content = b"not the archive"
        return types.SimpleNamespace(
            raise_for_status=lambda: None,
            headers={"content-length": str(len(content))},
            iter_content=lambda chunk_size: [content],
            close=lambda: None,
        )

    monkeypatch.setattr(requests, "get", get)
    return asked


def test_places_are_searched_in_order_and_nothing_found_there_is_checked(folders, no_network):
    root, env, cache = folders
    for place in (cache, env, root):
        (place / "ml-1m.zip").write_bytes(b"whatever the user put there")
        assert catalog.find_or_download("ml-1m", root) == place / "ml-1m.zip"
    assert catalog.find_or_download("ml-1m") == env / "ml-1m.zip"


@pytest.mark.parametrize(("name", "folder"), [("ml-100k", "ml-100k"), ("ml-10m", "ml-10M100K")])
def test_an_unpacked_folder_is_found(folders, no_network, name, folder):
    (folders[1] / folder).mkdir()
    assert catalog.find_or_download(name) == folders[1] / folder


def test_without_a_network_one_line_names_the_address_and_the_folder(folders, no_network):
    with pytest.raises(FastTowerError) as raised:
        catalog.find_or_download("ml-20m")
    message = str(raised.value)
    assert "https://files.grouplens.org/datasets/movielens/ml-20m.zip" in message
    assert str(folders[2]) in message
    assert "no connection" in message
    assert "\n" not in message


def test_a_download_with_the_wrong_checksum_is_refused_and_not_kept(folders, server):
    with pytest.raises(FastTowerError, match="hash"):
        catalog.find_or_download("ml-20m")
    assert list(folders[2].iterdir()) == []


def test_a_set_without_a_checksum_downloads_with_a_warning_and_progress(folders, server):
    class Progress:
        total = 0
        done = 0

        def update(self, count):
            self.done += count

        def reset(self):
            self.done = 0

        def close(self):
            pass

    progress = Progress()
    with pytest.warns(UserWarning, match="no checksum is known"):
        path = catalog.find_or_download("ml-latest-small", on_download=progress)
    assert path == folders[2] / "ml-latest-small.zip"
    assert path.read_bytes() == b"not the archive"
    assert progress.total == len(b"not the archive")
    address, options = server[0]
    assert address == "https://files.grouplens.org/datasets/movielens/ml-latest-small.zip"
    assert options["timeout"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert catalog.find_or_download("ml-latest-small") == path
    assert len(server) == 1


def test_an_unknown_name_is_told_the_known_ones(folders):
    with pytest.raises(FastTowerError, match=r"'ml-2m'.*ml-1m.*synthetic-1m"):
        catalog.find_or_download("ml-2m")


def test_pooch_is_imported_only_to_search():
    import subprocess

    code = "import sys, fasttower.data.catalog; sys.exit('pooch' in sys.modules or 'polars' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
