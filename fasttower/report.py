"""What a person sees while a run goes on, and at its end."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from fasttower.config import Config
from fasttower.console import Console, counted_noun, literal
from fasttower.data.preparation import PreparedData
from fasttower.pipeline import FitObserver
from fasttower.run import Run
from fasttower.run.record import Outcome as Metrics
from fasttower.training.observer import EpochRecord
from fasttower.training.search import Trial


class DownloadBar:
    """A bar of a progress display, moved by a download.

    Attributes:
        total: bytes to come; 0 until they are known.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bar: TaskID | None = None
        self.total = 0

    def update(self, count: int) -> None:
        """`count` more bytes have come."""
        if self._bar is None:
            self._bar = self._progress.add_task("download", speed="")
        self._progress.update(self._bar, total=self.total, advance=count)

    def reset(self) -> None:
        """Start over."""
        if self._bar is not None:
            self._progress.reset(self._bar)

    def close(self) -> None:
        """Everything has come."""
        if self._bar is not None:
            self._progress.update(self._bar, completed=self.total)


class ConsoleObserver(FitObserver):
    """Tables and a progress bar on the terminal.

    Args:
        quiet: show nothing.
        to_stderr: leave stdout to the caller.

    Attributes:
        training: whether the training has begun, so that there will be a run to write.
    """

    def __init__(self, *, quiet: bool = False, to_stderr: bool = False) -> None:
        self._console = Console(quiet=quiet, stderr=to_stderr)
        self._warnings = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )
        self._bars: dict[str, TaskID] = {}
        self._stop = False
        self.training = False

    def __enter__(self) -> ConsoleObserver:
        """Start the progress display."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the progress display."""
        self._progress.stop()

    def stop(self) -> None:
        """Ask the training to stop; may be called from a signal handler."""
        self._stop = True

    def should_stop(self) -> bool:
        """Whether `stop` was called."""
        return self._stop

    def download_progress(self) -> DownloadBar:
        """A bar for the bytes of a download."""
        return DownloadBar(self._progress)

    def on_warning(self, line: str) -> None:
        """Show a line that must not be missed, on stderr, even when quiet."""
        self._warnings.print(f"[bold yellow]warning:[/] {literal(line)}")

    def on_prepared(self, prepared: PreparedData, config: Config) -> None:
        """Show what each step of the preparation kept and dropped."""
        unit = f", timestamps in {prepared.timestamp_unit}" if prepared.timestamp_unit else ""
        table = Table(title=literal(config.data + unit), title_justify="left")
        table.add_column("step")
        for name in ("rows", "users", "items", "dropped rows"):
            table.add_column(name, justify="right")
        for step in prepared.steps:
            counts = (step.rows, step.users, step.items, step.dropped_rows)
            table.add_row(step.step, *(f"{count:,}" for count in counts))
        self._console.print(table)
        if prepared.test_pairs_in_fit:
            self._console.print(
                f"{prepared.test_pairs_in_fit:,} test pairs were there before the test cut too"
                + ("; left out as seen, each is a miss (--no-filter-seen)" if config.filter_seen else "")
            )

    def on_training(self, device: str, backend: str, why: str, threads: int) -> None:
        """Show where the training runs."""
        self.training = True
        where = f"{device}, {threads} threads" if device == "cpu" else device
        self._console.print(f"training on {where}, backend {backend} ({why})")

    def on_seed(self, seed: int) -> None:
        """Show which of several seeds trains now."""
        self._console.print(f"seed {seed}")
        for bar in self._bars.values():
            self._progress.remove_task(bar)
        self._bars.clear()

    def on_progress(self, phase: str, epoch: int, epochs: int, done: int, total: int) -> None:
        """Move the phase's bar."""
        if phase not in self._bars:
            self._bars[phase] = self._progress.add_task(phase, total=total, speed="")
        bar = self._bars[phase]
        if done < self._progress.tasks[self._progress.task_ids.index(bar)].completed:
            self._progress.reset(bar, total=total)  # the next candidate
        speed = self._progress.tasks[self._progress.task_ids.index(bar)].speed
        text = f"{speed:,.0f} positives/s" if speed else ""
        self._progress.update(bar, completed=done, description=f"{phase} {epoch}/{epochs}", speed=text)

    def on_epoch(self, record: EpochRecord) -> None:
        """Show an epoch in one line; those of a search only move the bar."""
        if record.phase == "search":
            return
        parts = [
            f"{record.phase:6s} {record.epoch:2d}",
            f"loss {record.train_loss:.4f}",
        ]
        if record.valid_loss is not None:
            parts.append(f"valid {record.valid_loss:.4f}")
        parts += [f"{name} {value:.4f}" for name, value in record.valid.items() if name.startswith("NDCG")]
        parts += [f"{record.epoch_s:.2f} s", f"{record.positives_per_s / 1e6:.2f} M/s"]
        self._console.print("  ".join(parts))

    def on_phase(self, phase: str, settings: str, epochs: int) -> None:
        """Show what has been chosen before it is trained."""
        if phase == "refit":
            self._console.print(f"chosen: {settings}, {counted_noun(epochs, 'epoch')}", soft_wrap=True)

    def on_trial(self, trial: Trial) -> None:
        """Show in one line what a candidate of the search has come to."""
        if trial.diverged:
            self._console.print(f"diverged  {trial.candidate}", soft_wrap=True)
            return
        best = trial.best()
        trained = f"epochs {trial.epochs:2d}  best {best.epoch:2d}  NDCG {best.mean:.4f}"
        line = f"{trained}  coverage {best.coverage:.3f}  {trial.seconds:5.1f} s  {trial.candidate}"
        self._console.print(line, soft_wrap=True)

    def show_result(self, run: Run, run_dir: Path) -> None:
        """Show the metrics beside popularity's, the times, and where the run is."""
        metrics = run.metrics
        if metrics["test"]:
            self._show_test(metrics)
        else:
            self._console.print("no test part; fasttower evaluate takes a later file")
            if not run.config.refit and any(record.phase == "search" for record in run.history):
                self._console.print("the validation part was not trained on (--no-refit)")
        epochs = counted_noun(metrics["best_epoch"], "epoch")
        self._console.print(f"trained for {epochs}: {metrics['settings']}")
        main = next(iter(metrics["test"]), None)
        if main and metrics["test"][main] < metrics["popularity"][main]:
            self._console.print(f"[bold yellow]the model loses to popularity in {main}[/]")
        times = "  ".join(f"{name} {seconds:.1f} s" for name, seconds in metrics["timing_s"].items())
        self._console.print(times)
        if run.interrupted:
            in_search = any(record.phase == "search" for record in run.history)
            on = " on the rows before the validation cut, the best epoch so far" if in_search else ""
            self._warnings.print(f"interrupted: the run holds what had been trained by then{on}")
        self._console.print(f"run written to {literal(run_dir)}")

    def _show_test(self, metrics: Metrics) -> None:
        table = Table(
            title=f"test part: {metrics['test_users']:,} users",
            title_justify="left",
        )
        table.add_column("metric")
        table.add_column("model", justify="right")
        if "test_std" in metrics:
            table.add_column("std", justify="right")
        table.add_column("popularity", justify="right")
        for name, value in metrics["test"].items():
            row = [f"{value:.4f}"]
            if "test_std" in metrics:
                deviation = metrics["test_std"][name]
                row.append("-" if deviation is None else f"{deviation:.4f}")
            table.add_row(name, *row, f"{metrics['popularity'][name]:.4f}")
        self._console.print(table)
