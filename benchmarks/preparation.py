"""A large csv of ratings to tensors and the known positives' rows: fasttower's way beside the pandas way.

    python -m benchmarks.preparation [--rows 20000263] [--string-ids] [--csv FILE] [--repeats 3]

Both ways read a csv in ML-20M's layout, keep ratings >= 3, users with 20 and items with 5 interactions or
more, cut test and validation off the end of the time line, drop cold rows and repeated pairs, index ids
densely, and hand over int32 tensors and compressed rows. Each runs in a process of its own, by turns;
reported are the minimum of the wall times without imports, the processor time that went with it, and the peak
resident memory of the whole process. Wall times need a machine that is otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

MIN_RATING, MIN_USER, MIN_ITEM, TEST_FRACTION, VALID_FRACTION = 3.0, 20, 5, 0.2, 0.1
USERS, ITEMS = 138_493, 26_744


def fasttower_way(csv: str) -> dict[str, int]:
    import torch

    from fasttower.config import DataConfig
    from fasttower.data.preparation import prepare
    from fasttower.pipeline import to_training_data

    def work():
        config = DataConfig(
            min_rating=MIN_RATING,
            min_user_interactions=MIN_USER,
            min_item_interactions=MIN_ITEM,
            test_fraction=TEST_FRACTION,
            valid_fraction=VALID_FRACTION,
        )
        data = prepare(csv, config)
        parts = to_training_data(data)
        tensors = {
            name: (part.user_index, part.item_index)
            for name, part in (("fit", parts.fit), ("train", parts.train), ("valid", parts.valid))
        }
        tensors["test"] = tuple(torch.tensor(column.to_numpy()) for column in data.test)
        return tensors, parts.known_positives

    return timed(work)


def pandas_way(csv: str) -> dict[str, int]:
    import pandas as pd
    import torch
    from replay.preprocessing.filters import LowRatingFilter, MinCountFilter
    from replay.splitters import TimeSplitter
    from sklearn.preprocessing import LabelEncoder

    from fasttower_kernels.known_positives import KnownPositives

    def work():
        columns = {"userId": "user_id", "movieId": "item_id"}
        rows = pd.read_csv(csv).rename(columns=columns)
        rows = LowRatingFilter(MIN_RATING).transform(rows)
        rows = MinCountFilter(MIN_USER, "user_id").transform(rows)
        rows = MinCountFilter(MIN_ITEM, "item_id").transform(rows)
        warm = {"query_column": "user_id", "drop_cold_users": True, "drop_cold_items": True}
        fit, test = TimeSplitter(TEST_FRACTION, **warm).split(rows)
        train, valid = TimeSplitter(VALID_FRACTION, **warm).split(fit)
        users, items = LabelEncoder().fit(fit["user_id"]), LabelEncoder().fit(fit["item_id"])
        pairs = ["user_id", "item_id"]
        parts = {
            "fit": fit,
            "train": train,
            "valid": valid.drop_duplicates(pairs),
            "test": test.drop_duplicates(pairs),
        }
        tensors = {
            name: [
                torch.from_numpy(encoder.transform(part[column]).astype(np.int32))
                for encoder, column in ((users, "user_id"), (items, "item_id"))
            ]
            for name, part in parts.items()
        }
        known = KnownPositives.from_pairs(*tensors["fit"], len(users.classes_), len(items.classes_))
        return tensors, known

    return timed(work)


def peak_rss_gib() -> float:
    """The peak of this process; getrusage's would be its parent's where that was larger when it forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def timed(work):
    start, start_cpu = time.perf_counter(), time.process_time()
    tensors, known = work()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_rss_gib": peak_rss_gib(),
        **{name: len(part[0]) for name, part in tensors.items()},
        "known_pairs": len(known.items),
    }


WAYS = {"fasttower": fasttower_way, "pandas": pandas_way}


def write_ratings(path: Path, rows: int, string_ids: bool) -> None:
    """Random ratings in ML-20M's shape, by user: a heavy tail of users and items, two months a user."""
    import polars as pl

    rng = np.random.default_rng(0)
    users, items = max(1, USERS * rows // 20_000_263), min(ITEMS, max(1, rows // 20))
    activity = rng.lognormal(0, 1.2, users)
    counts = 20 + rng.multinomial(max(0, rows - 20 * users), activity / activity.sum())
    user = np.repeat(np.arange(users), counts)
    popularity = np.cumsum((np.arange(1, items + 1) + 50.0) ** -1.3)
    place = np.searchsorted(popularity, rng.random(len(user)) * popularity[-1])
    # MovieLens' item ids have gaps, and popularity has nothing to do with them.
    item = rng.permutation(rng.choice(5 * items, items, replace=False) + 1)[place]
    came = rng.integers(789_652_009, 1_420_000_000, users)
    frame = pl.DataFrame(
        {
            "userId": user + 1,
            "movieId": item,
            "rating": rng.choice(
                np.arange(1, 11) / 2, len(user), p=np.array([1, 3, 1, 7, 4, 21, 11, 28, 8, 16]) / 100
            ),
            "timestamp": came[user] + rng.integers(0, 60 * 86_400, len(user)),
        }
    )
    if string_ids:
        frame = frame.with_columns(
            pl.format("u{}", "userId").alias("userId"), pl.format("i{}", "movieId").alias("movieId")
        )
    frame.write_csv(path)


def run_way(way: str, csv: Path) -> dict:
    command = [sys.executable, "-m", "benchmarks.preparation", "--way", way, "--csv", str(csv)]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000_263, help="rows of the random csv")
    parser.add_argument("--string-ids", action="store_true", help='ids such as "u17" and "i42"')
    parser.add_argument("--csv", type=Path, help="a csv in ML-20M's layout, instead of random ratings")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each way")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(WAYS[args.way](str(args.csv))))
        return
    with tempfile.TemporaryDirectory() as folder:
        csv = args.csv or Path(folder) / "ratings.csv"
        if args.csv is None:
            write_ratings(csv, args.rows, args.string_ids)
        runs = [(way, run_way(way, csv)) for _ in range(args.repeats) for way in WAYS]
    best = {
        way: min((run for name, run in runs if name == way), key=lambda run: run["seconds"]) for way in WAYS
    }
    ratio = best["pandas"]["seconds"] / best["fasttower"]["seconds"]
    print(f"{'':10}{'seconds':>9}{'cpu s':>9}{'peak GiB':>10}{'fit':>12}{'train':>12}{'valid':>9}{'test':>9}")
    for way, run in best.items():
        parts = f"{run['fit']:>12}{run['train']:>12}{run['valid']:>9}{run['test']:>9}"
        print(f"{way:10}{run['seconds']:>9.2f}{run['cpu_seconds']:>9.2f}{run['peak_rss_gib']:>10.2f}{parts}")
    print(f"fasttower is {ratio:.1f} times as fast")
    print(json.dumps({"ratio": ratio, "cores": os.cpu_count(), "machine": platform.machine(), **best}))


if __name__ == "__main__":
    main()
