"""What a person sees while a comparison runs: one bar for all runs, one line for each that is running now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from core.training.ledger import Key, Plan, Run, read_curve
from core.training.workers import Worker


class Board:
    """Progress bars on stderr; nothing at all when it is not a terminal or `quiet` is set."""

    def __init__(self, quiet: bool | None, plan: Plan, *, total: int, epochs: int, folder: Path):
        console = Console(stderr=True)
        self.silent = not console.is_terminal if quiet is None else quiet
        self.plan, self.epochs, self.folder = plan, epochs, folder
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.progress = Progress(*columns, console=console, transient=True, disable=self.silent)
        self.all = self.progress.add_task("[bold]compare", total=total, unit="runs", note="")
        self.bad = 0
        self.lines: dict[Key, TaskID] = {}

    def __enter__(self) -> Board:
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def finished(self, run: Run) -> None:
        """One run less to wait for; a bad one is told at once."""
        if run.status != "ok":
            self.bad += 1
            if not self.silent:
                self.progress.console.print(Text(f"✗ {run.run_dir}: {run.error}", style="red"))
        note = f"[red]{self.bad} failed" if self.bad else ""
        self.progress.update(self.all, advance=1, note=note)

    def watch(self, running: Sequence[Worker]) -> None:
        """Show how far each running process is, from the rows of its metrics.csv."""
        if self.silent:
            return
        now = {(worker.job.setting, worker.job.variant, worker.job.seed): worker.job for worker in running}
        for key in self.lines.keys() - now.keys():
            self.progress.remove_task(self.lines.pop(key))
        for key, job in now.items():
            if key not in self.lines:
                name = " ".join([*job.setting, job.variant, f"seed {job.seed}"])
                self.lines[key] = self.progress.add_task(f"  {name}", total=self.epochs, unit="epochs", note="")
            column = f"val_{self.plan.metric}"
            curve = read_curve(self.folder / job.run_dir / "metrics.csv", column)
            note = f"{column} {curve[-1][1]:.4g}" if curve else ""
            self.progress.update(self.lines[key], completed=len(curve), note=note)
