"""The plots of a comparison as SVG text: seeds and differences, learning curves, quality against cost.

A variant keeps its colour, marker and line style in all plots; each alone tells the first five apart, for readers who
do not see colours and for grey printouts. Text stays text, so that it can be searched and takes the page's font.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from core.training.ledger import Plan, Run, read_curve
from core.training.summary import Row, Summary, Table

# Okabe & Ito 2008, https://jfly.uni-koeln.de/color/, without its yellow, which is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P")
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
INK, FAINT = "#1f2933", "#d9dee3"
WIDTH = 9.6  # inches; the page scales it to its own width

# (cost, title, (unit, its size) in ascending order)
COST_PANELS: tuple[tuple[str, str, tuple[tuple[str, float], ...]], ...] = (
    ("step_ms", "training step", (("ms", 1), ("s", 1e3))),
    ("flops_per_item", "forward FLOPs per item", (("", 1), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12))),
    ("peak_bytes", "peak memory", (("B", 1), ("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30))),
    ("state_bytes", "decoding state", (("B", 1), ("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30))),
)

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "longspan",  # the same data gives the same file
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "grid.color": "#eceff2",
    "grid.linewidth": 0.8,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "savefig.transparent": True,
}


def plots(summary: Summary, table: Table, folder: Path) -> dict[str, str]:
    """All plots of one table as {name: SVG}; a plot without data is left out.

    Args:
        summary: the comparison that the table belongs to.
        table: one setting of it.
        folder: the compare folder, where the runs' metrics.csv are.
    """
    runs = [run for run in summary.runs if run.setting == table.setting and run.status == "ok"]
    with mpl.rc_context(STYLE):
        drawn = {
            "differences": differences(summary.plan, table),
            "curves": curves(summary.plan, runs, folder),
            "costs": costs(summary.plan, table),
        }
        return {name: _svg(figure) for name, figure in drawn.items() if figure is not None}


def differences(plan: Plan, table: Table) -> Figure | None:
    """Left: every seed, the mean and the floors. Right: the paired difference to the baseline with its interval."""
    rows = [row for row in table.rows if row.metric]
    if not rows:
        return None
    figure = Figure(figsize=(WIDTH, 1.25 + 0.36 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.15, 1))
    for y, row in enumerate(rows):
        look = _look(plan, row.variant)
        values = list(row.values.values())
        left.plot(values, [y] * len(values), look["marker"], color=look["color"], alpha=0.35, markersize=5, mew=0)
        left.plot(np.mean(values), y, look["marker"], color=look["color"], markersize=8, mec="white")
        if row.baseline is None or row.baseline.difference.mean is None:
            continue
        difference = row.baseline.difference
        if difference.low is not None and difference.high is not None:
            right.plot([difference.low, difference.high], [y, y], color=look["color"], lw=2, solid_capstyle="round")
        right.plot(difference.mean, y, look["marker"], color=look["color"], markersize=8, mec="white")
    left.set_yticks(range(len(rows)), [row.variant for row in rows])
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_title(f"{_metric(plan, table.part)}: seeds and mean")
    right.axvline(0, color=INK, lw=1)
    right.set_title(f"difference to {plan.baseline}, with 95 % interval")
    right.set_xlabel("← better   ·   worse →" if plan.better == "lower" else "← worse   ·   better →")
    left.set_xlabel(plan.metric)
    _draw_floors(plan, table, left)
    for axes in (left, right):
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    return figure


def curves(plan: Plan, runs: Sequence[Run], folder: Path) -> Figure | None:
    """Mean over seeds of the validation metric and of the training loss by step, with a band of one SD."""
    wanted = ((f"val_{plan.metric}", _metric(plan, "val")), ("train_loss", "training loss"))
    found = [
        (title, by_variant)
        for column, title in wanted
        if (by_variant := {label: _curves(runs, label, column, folder) for label in plan.variants})
        and any(by_variant.values())
    ]
    if not found:
        return None
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    for axes, (title, by_variant) in zip(figure.subplots(1, len(found), squeeze=False)[0], found):
        shown: list[tuple[np.ndarray, np.ndarray]] = []
        for label, lines in by_variant.items():
            if lines:
                shown.append(_draw_curve(axes, _look(plan, label), lines))
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid()
        _zoom(axes, shown)
    _legend(figure, plan, [label for label in plan.variants if any(lines.get(label) for _, lines in found)], lines=True)
    return figure


def costs(plan: Plan, table: Table) -> Figure | None:
    """The primary metric against each cost: up-front time, memory and arithmetic on one row of panels."""
    rows = [row for row in table.rows if row.metric]
    panels = [panel for panel in COST_PANELS if any(row.cost[panel[0]] for row in rows)]
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, title, prefixes) in zip(all_axes, panels):
        prices = {row.variant: price for row in rows if (price := row.cost[name])}
        least, most = min(prices.values()), max(prices.values())
        prefix, factor = [p for p in prefixes if p[1] <= max(most, prefixes[0][1])][-1]
        for row in rows:
            if row.variant in prices:
                _draw_point(axes, plan, row, prices[row.variant] / factor)
        axes.set_title(f"{title} ({prefix})" if prefix else title)
        axes.grid()
        if most > 8 * least:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 100 * least else (1,)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.margins(x=0.15)
            axes.xaxis.set_major_locator(MaxNLocator(4))
    if table.best_floor and _within_reach(table.best_floor[1], *all_axes[0].get_ylim()):
        floor, value = table.best_floor
        for axes in all_axes:
            axes.axhline(value, color="#7b8794", lw=1, ls=(0, (4, 3)), zorder=1)
        above = value <= float(np.mean(all_axes[0].get_ylim()))
        all_axes[0].annotate(floor, (0, value), (4, 3 if above else -3), xycoords=("axes fraction", "data"),
                             textcoords="offset points", va="bottom" if above else "top",
                             color="#52606d", fontsize=8.5)  # fmt: skip
    all_axes[0].set_ylabel(_metric(plan, table.part))
    _legend(figure, plan, [row.variant for row in rows], lines=False)
    return figure


def _draw_floors(plan: Plan, table: Table, axes: Axes) -> None:
    """Vertical lines for the floors that fall within reach of the seeds."""
    low, high = axes.get_xlim()
    for name, metrics in table.floors.items():
        value = metrics.get(plan.metric)
        if value is None or not _within_reach(value, low, high):
            continue
        axes.axvline(value, color="#7b8794", lw=1, ls=(0, (4, 3)), zorder=1)
        left_of = value > (low + high) / 2  # so that the name stays inside the panel
        axes.annotate(name, (value, 0), (-3 if left_of else 3, 3), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha="right" if left_of else "left",
                      color="#52606d", fontsize=8.5)  # fmt: skip


def _within_reach(value: float, low: float, high: float) -> bool:
    """Whether a line fits beside the data; a far one would squeeze the variants together."""
    return low - 1.5 * (high - low) <= value <= high + 1.5 * (high - low)


def _curves(runs: Sequence[Run], label: str, column: str, folder: Path) -> list[dict[float, float]]:
    read = [dict(read_curve(folder / run.run_dir / "metrics.csv", column)) for run in runs if run.variant == label]
    return [line for line in read if line]


def _draw_curve(axes: Axes, look: dict[str, Any], lines: list[dict[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and band over the steps that all seeds reached; beyond those, the seeds that went on, thin."""
    shared = sorted(set.intersection(*(set(line) for line in lines)))
    values = np.array([[line[step] for step in shared] for line in lines]).reshape(len(lines), len(shared))
    style = {"color": look["color"], "ls": look["ls"]}
    mean = values.mean(axis=0)
    axes.plot(shared, mean, lw=1.8, marker="o" if len(shared) == 1 else None, **style)
    if len(lines) > 1:
        sd = values.std(axis=0, ddof=1)
        axes.fill_between(shared, mean - sd, mean + sd, color=look["color"], alpha=0.15, lw=0)
    for line in lines:
        rest = sorted(step for step in line if shared and step >= shared[-1])
        axes.plot(rest, [line[step] for step in rest], lw=0.8, alpha=0.6, **style)
    return np.array(shared), mean


def _zoom(axes: Axes, shown: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Fit the y axis to what follows the first quarter of the steps; the fall from the start would flatten the rest."""
    last = max((steps[-1] for steps, _ in shown if len(steps)), default=0)
    settled = [mean[steps >= 0.25 * last] for steps, mean in shown]
    values = np.concatenate([*settled, np.empty(0)])
    if len(values) < 4 or np.ptp(values) == 0:
        return
    pad = 0.12 * float(np.ptp(values))
    axes.set_ylim(float(values.min()) - pad, float(values.max()) + pad)


def _draw_point(axes: Axes, plan: Plan, row: Row, price: float) -> None:
    assert row.metric is not None
    look = _look(plan, row.variant)
    axes.errorbar(
        [price],
        [row.metric.mean],
        yerr=[row.metric.sd or 0],
        fmt=look["marker"],
        color=look["color"],
        markersize=8,
        mec="white",
        elinewidth=1.4,
    )


def colour(plan: Plan, label: str) -> str:
    """Colour of a variant as #rrggbb, for tables that stand beside the plots."""
    return _look(plan, label)["color"]


def _look(plan: Plan, label: str) -> dict[str, Any]:
    """Colour, marker and line style of a variant. Their cycles have different lengths, so 35 lines stay distinct."""
    i = list(plan.variants).index(label)
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "ls": LINES[i % len(LINES)]}


def _legend(figure: Figure, plan: Plan, labels: Sequence[str], *, lines: bool) -> None:
    handles = []
    for label in labels:
        look = _look(plan, label)
        style = {"ls": look["ls"], "lw": 1.8} if lines else {"ls": "", "marker": look["marker"], "markersize": 7}
        handles.append(Line2D([], [], color=look["color"], label=label, **style))
    # A column is as wide as its longest name: 0.08 inches a letter of this size, and the sign beside it.
    fit = int(WIDTH / (0.62 + 0.08 * max((len(label) for label in labels), default=0)))
    figure.legend(handles=handles, loc="outside upper left", ncols=max(1, min(len(labels), 6, fit)), columnspacing=1.6)


def _metric(plan: Plan, part: str) -> str:
    return f"{'test' if part == 'test' else 'validation'} {plan.metric} ({plan.better} is better)"


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()
