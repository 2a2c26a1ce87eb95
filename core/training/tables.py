"""The tables of a report as text: their cells, the console's table, and summary.csv."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console, Group
from rich.table import Table as RichTable
from rich.text import Text

from core.training import units
from core.training.answer import overall
from core.training.ledger import Run
from core.training.statistics import Spread
from core.training.summary import COSTS, Compared, Row, Summary, Table

COLUMNS = (
    *("setting", "variant", "part", "metric", "mean", "sd", "seeds", "failed", "missing"),
    *(
        "baseline",
        "difference",
        "low",
        "high",
        "p_holm",
        "verdict",
        "floor",
        "floor_value",
        "floor_verdict",
        "optimum",
    ),
)

Cells = tuple[list[str], list[list[str]]]
"""Column names without the first, and the rows."""


def part(table: Table) -> str:
    """The part of the data that a table is about, in words."""
    return "test" if table.part == "test" else "validation"


def spread(found: Spread | None, decimals: int) -> str:
    """Mean ± SD; the mean alone where there is one value."""
    if found is None:
        return units.MISSING
    mean = units.fixed(found.mean, decimals)
    return mean if found.sd is None else f"{mean} ± {units.fixed(found.sd, decimals)}"


def mean(table: Table, row: Row) -> str:
    """The primary metric of a row."""
    return spread(row.metric, table.decimals)


def interval(table: Table, compared: Compared | None) -> str:
    """A difference and its interval; without the interval where the data cannot tell."""
    if compared is None or compared.difference.mean is None:
        return units.MISSING
    difference, decimals = compared.difference, table.decimals
    middle = units.fixed(difference.mean, decimals, sign=True)
    if difference.low is None or difference.high is None:
        return middle
    low, high = (units.fixed(end, decimals, sign=True) for end in (difference.low, difference.high))
    return f"{middle} [{low}, {high}]"


def holm_p(compared: Compared | None) -> str:
    """The adjusted p value."""
    return units.p_value(compared.p_holm if compared else None)


def words(compared: Compared | None) -> str:
    """The verdict."""
    return compared.verdict if compared else units.MISSING


def best_floor(table: Table) -> str:
    """Value and name of the best floor."""
    if table.best_floor is None:
        return units.MISSING
    name, value = table.best_floor
    return f"{units.fixed(value, table.decimals)} ({name})"


def milliseconds(value: float | None) -> str:
    """A step time."""
    return units.MISSING if value is None else f"{units.three_digits(value)} ms"


def step_ratio(summary: Summary, table: Table, row: Row) -> str:
    """Step time as a multiple of the baseline's."""
    baseline = next(other for other in table.rows if other.variant == summary.plan.baseline)
    return units.ratio(row.cost["step_ms"], baseline.cost["step_ms"])


def has_state(table: Table) -> bool:
    """Whether any variant decodes step by step; without that the column says nothing."""
    return any(row.cost["state_bytes"] for row in table.rows)


def options(attention: dict[str, Any]) -> str:
    """A section as one line of YAML."""
    return yaml.safe_dump(attention, default_flow_style=True, sort_keys=False, width=10_000).strip()


def floors(table: Table) -> Cells:
    """All metrics of all floors."""
    names = list(dict.fromkeys(name for metrics in table.floors.values() for name in metrics))
    values = {name: [metrics[name] for metrics in table.floors.values() if name in metrics] for name in names}
    decimals = {name: units.decimals_for(found, []) for name, found in values.items()}
    return names, [
        [floor, *(units.fixed(metrics.get(name), decimals[name]) for name in names)]
        for floor, metrics in table.floors.items()
    ]


def all_metrics(table: Table) -> Cells:
    """All metrics of all variants."""
    rows = [row for row in table.rows if row.metrics]
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    decimals = {}
    for name in names:
        found = [row.metrics[name] for row in rows if name in row.metrics]
        decimals[name] = units.decimals_for([s.mean for s in found], [s.sd for s in found if s.sd is not None])
    return names, [[row.variant, *(spread(row.metrics.get(name), decimals[name]) for name in names)] for row in rows]


def all_runs(summary: Summary) -> Cells:
    """One row per run with what it says of the primary metric."""
    metric = summary.plan.metric
    parts = [name for name in ("val", "test") if any(_value(run, name, metric) is not None for run in summary.runs)]
    rows = []
    for run in summary.runs:
        values = [_value(run, name, metric) for name in parts]
        shown = [units.MISSING if value is None else f"{value:#.5g}" for value in values]
        time = units.duration(run.cost.get("seconds") or run.seconds)
        rows.append([run.run_dir, run.status, *shown, milliseconds(run.cost.get("step_ms")), time])
    return ["status", *(f"{name} {metric}" for name in parts), "training step", "time"], rows


def console(summary: Summary) -> Group:
    """What the command prints at its end: the answer, a table per setting, warnings and failures."""
    plan = summary.plan
    parts: list[Any] = []
    for table in summary.tables:
        shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, title=" ".join(table.setting) or None)
        shown.add_column("attention")
        for name in (
            f"{part(table)} {plan.metric}",
            "seeds",
            f"difference to {plan.baseline} [95 %]",
            "step",
            "memory",
        ):
            shown.add_column(name, justify="right")
        shown.add_column("verdict")
        for row in table.rows:
            shown.add_row(
                row.variant,
                mean(table, row),
                f"{len(row.values)}/{len(plan.seeds)}",
                interval(table, row.baseline),
                milliseconds(row.cost["step_ms"]),
                units.byte_size(row.cost["peak_bytes"]),
                "baseline" if row.variant == plan.baseline else words(row.baseline),
            )
        if table.best_floor:
            name, value = table.best_floor
            shown.add_row(name, units.fixed(value, table.decimals), *[""] * 4, "best floor", style="dim")
        if table.optimum is not None:
            shown.add_row(
                "optimum", units.fixed(table.optimum, table.decimals), *[""] * 4, "best possible", style="dim"
            )
        parts += [shown, *(Text(f"! {warning}", style="yellow") for warning in table.warnings)]
        if len(summary.tables) > 1:
            parts += [Text(table.headline), Text("")]
    parts += [Text(f"✗ {run.run_dir}: {run.error}", style="red") for run in summary.failures]
    return Group(*parts, Text(overall(plan, summary.tables), style="bold"))


def print_comparison(summary: Summary, run_dir: Path, out: Console | None = None) -> None:
    """Print to stdout: all of `console` on a terminal, elsewhere the answer alone; then where the page is."""
    out = out or Console()
    if out.is_terminal:
        out.print(console(summary))
    else:
        out.print(Text(overall(summary.plan, summary.tables)), soft_wrap=True)
    out.print(str(run_dir / "report.html"), highlight=False, soft_wrap=True)


def summary_csv(summary: Summary) -> str:
    """One row per setting and variant, every number at full precision; empty where there is nothing to say."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([*COLUMNS, *COSTS])
    plan = summary.plan
    for table in summary.tables:
        for row in table.rows:
            difference = row.baseline.difference if row.baseline else None
            found = [
                *(" ".join(table.setting), row.variant, table.part, plan.metric),
                *((row.metric.mean, row.metric.sd) if row.metric else (None, None)),
                *(len(row.values), len(row.failed), len(row.missing)),
                plan.baseline,
                *((difference.mean, difference.low, difference.high) if difference else (None, None, None)),
                row.baseline.p_holm if row.baseline else None,
                "baseline" if row.variant == plan.baseline else row.baseline and row.baseline.verdict,
                *(table.best_floor or (None, None)),
                row.floor and row.floor.verdict,
                table.optimum,
            ]
            lines.writerow([*found, *(row.cost[name] for name in COSTS)])
    return text.getvalue()


def _value(run: Run, name: str, metric: str) -> float | None:
    return run.metrics.get(name, {}).get(metric)
