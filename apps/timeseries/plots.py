"""Plots of forecasts and their errors, as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from core.training.figures import LOOK
from core.training.plots import COLOURS, INK

PAST, FORECAST = INK, COLOURS[0]
MOST_PANELS = 8
"""Series in one fan chart; half as many in the windows of the test part. The tables beside them hold all."""


def draw_errors_by_step(path: Path, rows: Sequence[dict[str, float]]) -> Path:
    """MSE and MAE (standardised) against the horizon step."""
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.add_subplot()
        steps = [row["step"] for row in rows]
        marker = "o" if len(steps) < 30 else None
        for name, colour, line in (("mse", COLOURS[0], "-"), ("mae", COLOURS[1], "--")):
            axes.plot(steps, [row[name] for row in rows], line, color=colour, label=name.upper(), marker=marker, ms=3)
        axes.set(xlabel="step of the horizon", ylabel="error (training standard deviations)", ylim=(0, None))
        axes.set_title("Error by horizon step, test part")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.02)
        figure.legend(loc="outside right upper")
        return _saved(figure, path)


def draw_errors_by_series(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """MSE and MAE (standardised) of each series, the worst on top; at most 40 series."""
    worst = sorted(rows, key=lambda row: row["mse"], reverse=True)[:40]
    shown = worst[::-1]  # bars are drawn from below
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(7, 1.4 + 0.34 * len(shown)), layout="constrained")
        axes = figure.add_subplot()
        at = np.arange(len(shown))
        axes.barh(at + 0.2, [row["mse"] for row in shown], 0.36, color=COLOURS[0], label="MSE")
        axes.barh(at - 0.2, [row["mae"] for row in shown], 0.36, color=COLOURS[1], label="MAE")
        axes.set_yticks(at, [_short(row["unique_id"]) for row in shown])
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("error (training standard deviations)")
        more = f", the worst {len(shown)} of {len(rows)}" if len(rows) > len(shown) else ""
        axes.set_title(f"Error by series, test part{more}")
        figure.legend(loc="outside right upper")
        return _saved(figure, path)


def draw_windows(
    path: Path, windows: Sequence[Any], origins: Sequence[str], columns: Sequence[str], levels: Sequence[float]
) -> Path:
    """Sample windows of the test part in the units of the file: rows are series, columns are origins.

    Args:
        path: PNG to write.
        windows: `results.Kept` in the units of the file, in order of time.
        origins: the first stamp that each of them forecasts.
        columns: names of the series.
        levels: quantile levels of the windows.
    """
    spread = np.unique(np.linspace(0, len(windows) - 1, min(3, len(windows))).astype(int))
    chosen = [windows[i] for i in spread]
    names = list(columns)[: MOST_PANELS // 2]
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(3.6 * len(chosen) + 0.4, 1.9 * len(names) + 0.8), layout="constrained")
        panels = figure.subplots(len(names), len(chosen), squeeze=False, sharex=True, sharey="row")
        for series, name in enumerate(names):
            for panel, window in zip(panels[series], chosen):
                horizon = window.forecast.shape[1]
                past = window.past[series, -3 * horizon :]
                panel.plot(np.arange(-len(past), 0), past, color=PAST, lw=0.9)
                ahead = np.arange(horizon)
                _fan(panel, ahead, window.forecast[series], window.quantiles[series], levels)
                panel.plot(ahead, window.future[series], color=PAST, lw=0.9, label="observed", **_dot(horizon))
                panel.axvline(-0.5, color="#9aa5b1", lw=0.8)
            panels[series][0].set_ylabel(_short(name))
        for panel, i in zip(panels[0], spread):
            panel.set_title(f"from {origins[i]}")
        for panel in panels[-1]:
            panel.set_xlabel("steps from the origin")
        more = f"; {len(names)} of {len(columns)} series" if len(columns) > len(names) else ""
        figure.suptitle(f"Forecasts of the test part, units of the file{more}", x=0.01, ha="left", fontsize=10)
        figure.align_ylabels(panels[:, 0])
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return _saved(figure, path)


def draw_forecast(
    path: Path,
    history: pd.DataFrame,
    forecast: pd.DataFrame,
    columns: Sequence[str],
    levels: Sequence[float],
    names: Sequence[str],
) -> Path:
    """A fan chart per series: what was seen, then the forecast with its intervals.

    Args:
        path: PNG to write.
        history: the last rows of the file, index = stamps, a column per series.
        forecast: long table with unique_id, ds, mean and the quantile columns.
        columns: the series.   levels: quantile levels.   names: their columns.
    """
    shown = list(columns)[:MOST_PANELS]
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(8, 1.9 * len(shown) + 0.9), layout="constrained")
        panels = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
        for panel, series in zip(panels, shown):
            rows = forecast[forecast["unique_id"] == series]
            stamps = pd.Index(rows["ds"])
            panel.plot(history.index, history[series], color=PAST, lw=1, label="history")
            _fan(panel, stamps, np.asarray(rows["mean"]), np.asarray(rows[list(names)]), levels)
            # The line from the last observation to the first forecast is part of neither.
            if len(history):
                joint = [history.index[-1], stamps[0]]
                panel.plot(
                    joint, [history[series].iloc[-1], np.asarray(rows["mean"])[0]], color=FORECAST, lw=0.8, ls=":"
                )
            panel.set_ylabel(_short(series))
        more = f" ({len(shown)} of {len(columns)} series)" if len(columns) > len(shown) else ""
        figure.align_ylabels(panels)
        panels[0].set_title(f"Forecast beyond the end of the file{more}")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        if isinstance(history.index, pd.DatetimeIndex):
            locator = AutoDateLocator(minticks=4, maxticks=9)
            panels[-1].xaxis.set_major_locator(locator)
            panels[-1].xaxis.set_major_formatter(ConciseDateFormatter(locator))
        return _saved(figure, path)


def _fan(axes: Axes, x: Any, mean: np.ndarray, quantiles: np.ndarray, levels: Sequence[float]) -> None:
    """The forecast as a line, its intervals as bands, narrower ones darker."""
    count = len(levels)
    for i in range(count // 2):
        low, high = levels[i], levels[count - 1 - i]
        label = f"{100 * (high - low):.3g} % interval"
        shade = 0.15 + 0.25 * i / max(1, count // 2)
        axes.fill_between(
            x, quantiles[:, i], quantiles[:, count - 1 - i], color=FORECAST, alpha=shade, lw=0, label=label
        )
    axes.plot(x, mean, color=FORECAST, lw=1.4, label="forecast", **_dot(len(mean)))


def _dot(steps: int) -> dict[str, Any]:
    return {"marker": "o", "ms": 3} if steps < 4 else {}


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _saved(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path
