"""What a trained run costs to use: everybody's top-10, new users, new rows.

    python -m benchmarks.after_training --data ml-1m

On RePlay's protocol of MovieLens-1M (ratings of at least 3, the last 20% of the time line as test part):

- wall time of `fasttower recommend RUN --output FILE` in a new process, start and imports included;
- how much of each user's own top-10 a newcomer with the same history gets, and the cost for 1,000 of them;
- a run on the first 70% of the time line, updated with the next 10%, beside a run on all 80%.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch

import fasttower
from fasttower.data import catalog
from fasttower.data.readers import read_interactions

# What every user has here: no search, so that the two runs of the update differ in their rows alone.
SETTINGS = {"min_rating": 3, "l2": 0.06}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="ml-1m")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = read_interactions(catalog.find_or_download(arguments.data)).frame.sort(
        "timestamp", maintain_order=True
    )
    rows = rows.filter(pl.col("rating") >= SETTINGS["min_rating"])
    first, new, test = (
        rows[int(len(rows) * a) : int(len(rows) * b)] for a, b in ((0, 0.7), (0.7, 0.8), (0.8, 1))
    )

    config = fasttower.Config(threads=arguments.threads, **SETTINGS)
    fasttower.fit(first[:20_000], config)  # the compiled kernels are there
    began = time.perf_counter()
    run = fasttower.fit(rows, config)
    whole_s = time.perf_counter() - began
    print(f"{run!r}, {arguments.threads} threads")
    everybody(run)
    folding_in(run)
    updating(run, whole_s, first, new, test, config)


def everybody(run: fasttower.Run) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run.save(Path(folder) / "run")
        command = [sys.executable, "-m", "fasttower", "recommend", Path(folder) / "run"]
        times = []
        for _ in range(3):
            began = time.perf_counter()
            subprocess.run(
                [*command, "--output", Path(folder) / "out.parquet"], check=True, capture_output=True
            )
            times.append(time.perf_counter() - began)
        count = len(pl.read_parquet(Path(folder) / "out.parquet"))
    began = time.perf_counter()
    run.recommend()
    inside = time.perf_counter() - began
    print(f"everybody's top-10 ({count:,} rows): {min(times):.2f} s as a command, {inside:.2f} s as a call")


def folding_in(run: fasttower.Run) -> None:
    known = run.known_positives
    users = np.repeat(np.arange(known.num_users), known.degrees.numpy())
    history = pl.DataFrame(
        [run.users["user_id"].gather(users), run.items["item_id"].gather(known.items.numpy())]
    )
    began = time.process_time(), time.perf_counter()
    folded = run.recommend_new(history, k=10)
    cpu_s, wall_s = time.process_time() - began[0], time.perf_counter() - began[1]
    own = run.recommend(k=10)
    same = len(own.join(folded, on=["user_id", "item_id"], how="semi")) / len(own)
    each = 1000 / known.num_users
    print(
        f"newcomers with the history of each of {known.num_users:,} users: {same:.1%} of its own top-10;"
        f" {cpu_s * each:.2f} s CPU time, {wall_s * each:.2f} s wall time for 1,000 users"
    )


def updating(
    whole: fasttower.Run,
    whole_s: float,
    first: pl.DataFrame,
    new: pl.DataFrame,
    test: pl.DataFrame,
    config: fasttower.Config,
) -> None:
    old = fasttower.fit(first, dataclasses.replace(config, test_fraction=0))
    began = time.perf_counter()
    updated = old.update(new)
    update_s = time.perf_counter() - began
    counts = updated.metrics["updates"][-1]
    print(
        f"update: {counts['rows']:,} rows, {counts['new_users']:,} new users, {counts['new_items']:,} new "
        f"items: {update_s:.2f} s; a run on all rows from the start: {whole_s:.2f} s"
    )
    for name, run in (("before", old), ("updated", updated), ("from the start", whole)):
        found = run.evaluate(test)
        ndcg = found.metrics["NDCG@10"]
        print(f"  {name:15s} NDCG@10 {ndcg:.4f} over the {found.users:,} test users it knows")


if __name__ == "__main__":
    main()
