"""The table at the end of `fit` and `test`: the model beside its floors, and what it cost."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from core.training.app import get_app


def print_result(metrics: dict[str, Any], run_dir: Path, app: str, console: Console | None = None) -> None:
    """Print to stdout: a table on a terminal; elsewhere only the run folder, for scripts."""
    console = console or Console()
    if console.is_terminal:
        console.print(result_table(metrics, app))
        console.print(cost_line(metrics["cost"]), highlight=False)
    console.print(str(run_dir), highlight=False, soft_wrap=True)


def result_table(metrics: dict[str, Any], app: str) -> Table:
    """The model's row, then the floors, best first; columns are the test metrics, the primary one first."""
    primary, better = get_app(app).metric, get_app(app).better
    shown = metrics["test"] or metrics["val"]
    names = sorted(shown, key=lambda name: name != primary)
    table = Table(title="test" if metrics["test"] else "val (there is no test part)")
    table.add_column("")
    for name in names:
        table.add_column(f"{name} ({better} is better)" if name == primary else name, justify="right")
    table.add_row("[bold]model", *(f"[bold]{shown[name]:.4g}" for name in names))
    sign = 1 if better == "lower" else -1
    floors = metrics["floors"].items()
    for floor, values in sorted(floors, key=lambda item: sign * item[1].get(primary, sign * float("inf"))):
        table.add_row(f"floor: {floor}", *(f"{values[name]:.4g}" if name in values else "" for name in names))
    return table


def cost_line(cost: dict[str, Any]) -> str:
    """Parameters, throughput, memory and time in one line."""
    parts = [f"{cost['parameters']:,} parameters"]
    if "tokens_per_s" in cost:
        parts += [
            f"{cost['tokens_per_s']:,.0f} tokens/s",
            f"{cost['step_ms']:.1f} ms per step",
            f"peak {cost['peak_bytes'] / 2**20:,.0f} MiB",
        ]
    return ", ".join([*parts, f"{cost['seconds']:.1f} s of training"])
