"""The MovieLens data sets by name: found on disk, or fetched from GroupLens."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, Protocol

from fasttower.errors import FastTowerError, quoted, reason, shown

ADDRESS = "https://files.grouplens.org/datasets/movielens"

# MD5 of GroupLens' archives; None where none was published.
MOVIELENS: dict[str, str | None] = {
    "ml-100k": "0e33842e24a9c977be4e0107933c0723",
    "ml-1m": "c4d9eecfca2ab87c1945afe126590906",
    "ml-10m": "ce571fd55effeba0271552578f2648bd",
    "ml-20m": "cd245b17a1ae2cc31bb14903e1204af3",
    "ml-25m": "6b51fb2759a8657d3bfcbfc42b592ada",
    "ml-32m": None,
    "ml-latest-small": None,
}
SYNTHETIC = ("synthetic-100k", "synthetic-1m", "synthetic-20m")

# Folders that an archive unpacks to, where not named as the set.
_FOLDERS = {"ml-10m": "ml-10M100K"}
_CONNECT_AND_READ_S = (10, 60)


class Progress(Protocol):
    """What a download reports to: bytes in `total` and `update`, as pooch wants it."""

    total: int

    def update(self, count: int) -> Any:  # noqa: ANN401
        """`count` more bytes have come."""

    def reset(self) -> Any:  # noqa: ANN401
        """Start over."""

    def close(self) -> Any:  # noqa: ANN401
        """All has come."""


def find_or_download(name: str, data_root: Path | None = None, on_download: Progress | None = None) -> Path:
    """Path of a MovieLens set: a zip or an unpacked folder.

    Looked for in `data_root`, then $FASTTOWER_DATA, then the cache folder, and else downloaded into that.
    What is found is taken as it is; what is downloaded is checked against its MD5.

    Raises:
        FastTowerError: an unknown name, or nothing found and nothing to be downloaded.
    """
    if name not in MOVIELENS:
        known = ", ".join((*MOVIELENS, *SYNTHETIC))
        raise FastTowerError(f"no data set is named {quoted(name)}; expected one of {known}")
    import pooch  # noqa: PLC0415 - only for the named sets

    try:
        cache = Path(pooch.os_cache("fasttower"))
    except RuntimeError:  # there is no home directory
        cache = Path(tempfile.gettempdir()) / "fasttower"
    folders = [folder for folder in (data_root, os.environ.get("FASTTOWER_DATA"), cache) if folder]
    for folder in map(Path, folders):
        for candidate in (f"{name}.zip", name, _FOLDERS.get(name, name)):
            try:
                if (folder / candidate).exists():
                    return folder / candidate
            except OSError as error:
                raise FastTowerError(
                    f"the data folder {shown(folder)} cannot be looked into ({reason(error)});"
                    " name another with --data-root"
                ) from error
    return _download(name, cache, on_download)


def _download(name: str, folder: Path, on_download: Progress | None) -> Path:
    import pooch  # noqa: PLC0415

    address, md5 = f"{ADDRESS}/{name}.zip", MOVIELENS[name]
    if md5 is None:
        warnings.warn(f"{name}: no checksum is known, {address} is taken as it comes", stacklevel=3)
    pooch.get_logger().setLevel("WARNING")
    try:
        path = pooch.retrieve(
            address,
            known_hash=f"md5:{md5}" if md5 else None,
            fname=f"{name}.zip",
            path=folder,
            downloader=pooch.HTTPDownloader(progressbar=on_download or False, timeout=_CONNECT_AND_READ_S),
        )
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong checksum is a ValueError
        # requests' own words for a missing network are three exceptions inside each other.
        offline = getattr(error, "response", error) is None
        why = "no connection" if offline else reason(error)
        raise FastTowerError(
            f"{name} is not on this machine and {address} could not be downloaded ({why});"
            f" download it elsewhere and put it in {shown(folder)}, or name its folder with --data-root"
        ) from error
    return Path(path)
