"""The table at the end of `fit` and `test`: the model beside its floors, and what it cost."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from core.training.app import App
from core.training.summary import OPTIMUM


def print_result(metrics: dict[str, Any], run_dir: Path, app: App, console: Console | None = None) -> None:
    """Print to stdout: a table on a terminal; elsewhere only the run folder, for scripts."""
    console = console or Console()
    if console.is_terminal:
        console.print(result_table(metrics, app))
        console.print(floor_line(metrics, app), highlight=False)
        console.print(cost_line(metrics["cost"]), highlight=False)
    console.print(str(run_dir), highlight=False, soft_wrap=True)


def result_table(metrics: dict[str, Any], app: App) -> Table:
    """A row per metric, the primary one first; a column for the model, then one per floor, best first."""
    shown = metrics["test"] or metrics["val"]
    table = Table(title="test" if metrics["test"] else "val (there is no test part)", title_justify="left")
    table.add_column(f"{app.metric}, {app.better} is better", style="dim", no_wrap=True)
    table.add_column("model", justify="right", style="bold")
    floors = _sorted_floors(metrics, app)
    for name, _ in floors:
        table.add_column(name, justify="right")
    ends = {f"{name}{end}" for name in shown for end in ("_low", "_high") if f"{name}_low" in shown}
    for metric in sorted(shown.keys() - ends, key=lambda name: (name != app.metric, list(shown).index(name))):
        values = [_cell(floor, metric) for _, floor in floors]
        table.add_row(metric, _cell(shown, metric), *values)
    return table


def _cell(figures: dict[str, float], metric: str) -> str:
    """The figure, with its 95 % interval over the test examples where there is one."""
    if metric not in figures:
        return ""
    low, high = figures.get(f"{metric}_low"), figures.get(f"{metric}_high")
    return f"{figures[metric]:.4g}" + ("" if low is None or high is None else f" [{low:.4g}, {high:.4g}]")


def floor_line(metrics: dict[str, Any], app: App) -> str:
    """Whether the model was worth its training, in one sentence."""
    floors = [(name, values[app.metric]) for name, values in _sorted_floors(metrics, app) if name != OPTIMUM]
    if not floors or app.metric not in metrics["test"]:
        return "No floors were computed, so nothing says what the model's figures are worth."
    (name, floor), ours = floors[0], metrics["test"][app.metric]
    figures = f"{app.metric} {ours:.4g} against {floor:.4g}"
    low, high = metrics["test"].get(f"{app.metric}_low"), metrics["test"].get(f"{app.metric}_high")
    if low is not None and high is not None and low <= floor <= high:
        return f"Not separable from {name} by this test set: {figures}, inside the interval [{low:.4g}, {high:.4g}]."
    if app.improves(ours, floor):
        return f"Better than the best floor, {name}: {figures} (one seed; `longspan compare` tells the noise)."
    return f"Not better than {name}, which needs no deep model: {figures}."


def _sorted_floors(metrics: dict[str, Any], app: App) -> list[tuple[str, dict[str, float]]]:
    floors = [(name, values) for name, values in metrics["floors"].items() if app.metric in values]
    return sorted(floors, key=lambda floor: floor[1][app.metric], reverse=app.better == "higher")


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
