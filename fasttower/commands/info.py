"""`fasttower info`: what a run is, and how good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from fasttower.cli import parse
from fasttower.commands.inputs import RunFlags
from fasttower.commands.output import metrics_frame, say, show_frame
from fasttower.console import counted_noun

DESCRIPTION = "What a run is, and how good.\n\nExample: fasttower info runs/mine"


@dataclass(frozen=True, kw_only=True)
class Flags(RunFlags):
    """Which run."""


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(Flags, arguments, prog="fasttower info", description=DESCRIPTION)
    trained = flags.load()
    config, metrics = trained.config, trained.metrics
    bias = "with" if config.item_bias else "without"
    say(f"{flags.run}: {config.data}, seed {config.seed}")
    say(
        f"{len(trained.users):,} users, {len(trained.items):,} items, "
        f"{len(trained.known_positives.items):,} distinct pairs"
    )
    say(f"{metrics['settings']}, {bias} item bias")
    say(f"batch size {config.batch_size:,}, learning rate {config.learning_rate:g}")
    epochs = counted_noun(metrics["best_epoch"], "epoch")
    say(f"trained for {epochs} on {trained.device}, backend {trained.backend}")
    if metrics.get("search"):
        tried = sorted(metrics["search"], key=lambda row: -(row["score"] or 0))
        show_frame(pl.DataFrame(tried).drop("seconds"), "tried by the search; NDCG on the validation part")
    if metrics.get("test"):
        table = metrics_frame(metrics["test"], metrics["popularity"])
        show_frame(table, f"test part: {metrics['test_users']:,} users")
        if config.filter_seen and metrics.get("test_pairs_in_fit"):
            say(f"{metrics['test_pairs_in_fit']:,} test pairs were left out as seen; each is a miss")
    else:
        why = "not measured since its update" if metrics.get("updates") else "no test part"
        say(f"{why}; fasttower evaluate takes a later file")
    for number, update in enumerate(metrics.get("updates", ()), start=1):
        counts = (
            counted_noun(update["rows"], "row"),
            counted_noun(update["new_users"], "new user"),
            counted_noun(update["new_items"], "new item"),
            counted_noun(update["epochs"], "epoch"),
        )
        say(f"update {number}: {', '.join(counts)}")
    if trained.interrupted:
        say("its training was interrupted")
    return 0
