"""The pages of a comparison: report.html (self-contained), report.md, summary.csv, summary.json, and a console table.

Everything is made again from `compare.json`, `runs.jsonl` and the runs' `metrics.csv`, without torch, so a report can
be written on a laptop from a folder that a cluster filled, and after any interruption.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from core.training import tables, units
from core.training.answer import overall
from core.training.app import Sheet, apps
from core.training.durable import write_text
from core.training.errors import UserError
from core.training.ledger import PLAN, file_names, read_plan, read_runs
from core.training.plots import colour, plots
from core.training.summary import Compared, Summary, Table, summarize

SIGNS = {"better": "▲", "worse": "▼", "not separable": "≈"}
NOT_SHOWN = {"recipe", "command"}  # of a run's environment.json: the page has its own, and a run's carries local paths


def report(folder: str | Path) -> list[Path]:
    """Write the report of a compare folder again from what its runs left; returns the files written.

    Raises:
        UserError: the folder holds no comparison, or a damaged one.
    """
    summary = load_summary(Path(folder))
    return write_report(Path(folder), summary)


def load_summary(folder: Path) -> Summary:
    """The numbers of a compare folder; UserError if it is none."""
    plan = read_plan(folder)
    if plan is None:
        what = "does not exist" if not folder.exists() else f"holds no comparison ({PLAN} is missing)"
        raise UserError(f"{folder} {what}; make one with: longspan compare RECIPE --variants A,B --run-dir {folder}")
    return summarize(plan, read_runs(folder))


def write_report(folder: Path, summary: Summary) -> list[Path]:
    """Write the four files and, under plots/, the plots as SVG files of their own."""
    drawn = [plots(summary, table, folder) for table in summary.tables]
    written = {
        "summary.csv": tables.summary_csv(summary),
        "summary.json": json.dumps(_plain(summary), indent=2, allow_nan=False) + "\n",
        "report.md": _render("report.md", summary, drawn, folder),
        "report.html": _render("report.html", summary, drawn, folder),
    }
    for i, by_name in enumerate(drawn):
        for name, svg in by_name.items():
            (folder / "plots").mkdir(exist_ok=True)
            written[_plot_file(summary, i, name)] = svg
    for name, text in written.items():
        write_text(folder / name, text)
    return [folder / name for name in written]


def _render(template: str, summary: Summary, drawn: list[dict[str, str]], folder: Path) -> str:
    plan = summary.plan
    html = template.endswith(".html")
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    jinja.filters.update(
        fixed=units.fixed,
        count=units.count,
        bytes=units.byte_size,
        duration=units.duration,
        milliseconds=tables.milliseconds,
        options=tables.options,
    )
    return jinja.get_template(template).render(
        plan=plan,
        runs=summary.runs,
        failures=summary.failures,
        tables=summary.tables,
        cells=tables,
        drawn=[{name: Markup(_inline(svg, name)) for name, svg in by_name.items()} for by_name in drawn],
        plot_file=lambda i, name: _plot_file(summary, i, name),
        sheet=_sheet(summary),
        pictures=[_pictures(summary, table, folder) for table in summary.tables],
        embedded=_embedded,
        answer=overall(plan, summary.tables),
        question=_question(summary),
        environment=_environment(summary, folder),
        folder=folder,
        verdict=_marked if html else tables.words,
        colour=lambda label: colour(plan, label),
        row=lambda table, label: next(row for row in table.rows if row.variant == label),
        step_ratio=lambda table, row: tables.step_ratio(summary, table, row),
        all_runs=tables.all_runs(summary),
        configs=[yaml.safe_dump(config, sort_keys=False, allow_unicode=True) for config in plan.configs],
    )


def _question(summary: Summary) -> str:
    plan = summary.plan
    seeds = "1 seed" if len(plan.seeds) == 1 else f"{len(plan.seeds)} seeds"
    grid = f" × {len(plan.settings)} settings" if len(plan.settings) > 1 else ""
    measured = " and ".join(sorted({tables.part(table) for table in summary.tables}))
    return (
        f"{len(plan.variants)} variants × {seeds}{grid}, judged by {measured} {plan.metric} ({plan.better} is better). "
        "Same recipe, data order and budget; only the attention differs."
    )


def _sheet(summary: Summary) -> Sheet | None:
    """What the app's runs leave to be seen side by side; the app need not be installed where a report is written."""
    app = apps().get(summary.plan.app)
    return app.sheet if app is not None else None


def _pictures(summary: Summary, table: Table, folder: Path) -> list[tuple[str, int, Path]]:
    """(variant, seed, picture) of the first seed of every variant that left one; the path is below the folder."""
    sheet, found = _sheet(summary), {}
    for run in sorted(summary.runs, key=lambda run: summary.plan.seeds.index(run.seed)):
        path = Path(run.run_dir) / (sheet.file if sheet else "")
        if run.setting == table.setting and run.status == "ok" and (folder / path).is_file():
            found.setdefault(run.variant, (run.variant, run.seed, path))
    return [found[label] for label in summary.plan.variants if label in found]


def _embedded(path: Path) -> Markup:
    """A picture as an address that holds all of it, so that the page needs no other file."""
    return Markup("data:image/png;base64," + b64encode(path.read_bytes()).decode())


def _environment(summary: Summary, folder: Path) -> dict[str, str]:
    """What compare knew of the machine, then what the first finished run says of itself."""
    found = dict(summary.plan.environment)
    for run in summary.runs:
        path = folder / run.run_dir / "environment.json"
        if run.status == "ok" and path.is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
            found |= {name: str(value) for name, value in values.items() if name not in NOT_SHOWN and value is not None}
            break
    return found


def _marked(compared: Compared | None) -> Markup:
    """A verdict with a sign and a colour; the reason for an odd one shows on hovering."""
    if compared is None:
        return Markup(units.MISSING)
    kind = "same" if compared.verdict == "not separable" else compared.verdict
    return Markup('<span class="{}" title="{}">{} {}</span>').format(
        kind, compared.difference.note, SIGNS[compared.verdict], compared.verdict
    )


def _plot_file(summary: Summary, index: int, name: str) -> str:
    setting = file_names([" ".join(table.setting) for table in summary.tables])[index]
    return f"plots/{setting}-{name}.svg" if setting else f"plots/{name}.svg"


def _inline(svg: str, name: str) -> str:
    """The <svg> element alone, sized by the page and named for screen readers."""
    svg = svg[svg.index("<svg") :]
    opening, rest = svg.split(">", 1)
    opening = re.sub(r'\s(?:width|height)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{name}">{rest}'


def _plain(summary: Summary) -> dict[str, Any]:
    """The summary as JSON types, every number at full precision."""
    return {
        "plan": asdict(summary.plan),
        "tables": [asdict(table) for table in summary.tables],
        "failures": [{"run_dir": run.run_dir, "status": run.status, "error": run.error} for run in summary.failures],
    }
