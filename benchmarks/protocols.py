"""The data sets and protocols on which quality is measured."""

from __future__ import annotations

import functools
import os
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fasttower import Config

PROTOCOLS: dict[str, dict[str, Any]] = {
    "ml-1m": {"data": "ml-1m", "min_rating": 3},
    "ml-1m-last": {"data": "ml-1m", "split": "leave-last"},
    "ml-100k": {"data": "ml-100k", "min_user_interactions": 20, "test_min_rating": 4},
    "amazon-beauty": {"data": "train.csv", "valid_data": "valid.csv", "test_data": "test.csv", "k": 20},
    "synthetic-1m": {"data": "synthetic-1m"},
    "synthetic-20m": {"data": "synthetic-20m"},
}
"""By name, the fields of a configuration:

ml-1m          RePlay's published one: ratings of at least 3, test part the last 20% of the time line
ml-1m-last     each user's last rating is the test part, the one before it validates
ml-100k        the published notebook's: users with at least 20 ratings, test ratings of at least 4
amazon-beauty  a published fixed split without timestamps (LightGCN++, RecSys 2024), cutoff 20
synthetic-1m   generated, in MovieLens-1M's shape, new for each seed; synthetic-20m in MovieLens-20M's
"""


def configuration(protocol: str, **settings: Any) -> Config:
    """The default with a protocol's fields, and with these settings."""
    fields = dict(PROTOCOLS[protocol])
    if protocol == "amazon-beauty":
        folder = Path(_unpacked(protocol).name)
        fields |= {name: str(folder / fields[name]) for name in ("data", "valid_data", "test_data")}
    return Config(**fields | settings)


@functools.cache
def _unpacked(name: str) -> TemporaryDirectory[str]:
    """The contents of a zip in the data folder, until the program ends."""
    folder = TemporaryDirectory()
    with zipfile.ZipFile(Path(os.environ["FASTTOWER_DATA"]) / f"{name}.zip") as archive:
        archive.extractall(folder.name)
    return folder
