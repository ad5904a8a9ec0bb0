"""What a person sees while settings are tuned, and at the end."""

from __future__ import annotations

from pathlib import Path

from fasttower.console import counted_noun, literal
from fasttower.report import ConsoleObserver
from fasttower.tuning.space import described
from fasttower.tuning.study import TuneRow, best_of
from fasttower.tuning.tune import Tuned, TuneObserver


class ConsoleTuneObserver(ConsoleObserver, TuneObserver):
    """The progress of a training, and a line per trial."""

    def on_study(self, rows: list[TuneRow], varied: list[str]) -> None:
        """Show what is varied, and how far earlier calls have come."""
        self._console.print(f"varied: {', '.join(varied)}", soft_wrap=True)
        best = best_of(rows)
        if best is not None:
            trials = counted_noun(len(rows), "earlier trial")
            self._console.print(f"going on after {trials}, the best NDCG {best['score']:.4f}")

    def on_trial_end(self, row: TuneRow, best: TuneRow | None) -> None:
        """Show in one line what a trial has come to."""
        if row["state"] == "failed":
            result = f"failed ({row.get('reason')})"
        else:
            state = "best so far" if row == best else "pruned" if row["state"] == "pruned" else ""
            trained = f"epochs {row['epochs']:2d}  best {row['best_epoch']:2d}  NDCG {row['score']:.4f}"
            result = f"{trained}  coverage {row['coverage']:.3f}  {row['seconds']:5.1f} s  {state:11s}"
        self._console.print(literal(f"trial {row['trial']:3d}  {result}  {row['settings']}"), soft_wrap=True)

    def show_tuned(self, tuned: Tuned, to: Path, storage: Path) -> None:
        """Show the best settings, and what to do with them."""
        states = tuned.trials["state"].value_counts(sort=True).iter_rows()
        counts = ", ".join(f"{count} {state}" for state, count in states)
        self._console.print(f"{counted_noun(tuned.trials.height, 'trial')}: {counts}")
        epochs = counted_noun(tuned.config.epochs, "epoch")
        choice = f"chosen: NDCG {tuned.score:.4f} on the validation part, {described(tuned.config)}, {epochs}"
        self._console.print(literal(choice), soft_wrap=True)
        if tuned.interrupted:
            self._warnings.print("interrupted: the best of the trials that had been finished by then")
        self._console.print(literal(f"configuration written to {to}, trials to {storage}"), soft_wrap=True)
        self._console.print(literal(f"next: fasttower train --config {to}"), soft_wrap=True)
