"""Plots of a test: scores by length of the source, and how well each part of it gets into the summary."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from core.training.plots import COLOURS, STYLE

LOOK = {**STYLE, "axes.grid": True, "savefig.transparent": False, "figure.dpi": 110}


def draw_lengths(path: Path, rows: Sequence[dict[str, float]]) -> Path:
    """ROUGE-1, 2 and L in buckets of source length."""
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.add_subplot()
        names = [f"{row['least_words']:,.0f} to\n{row['most_words']:,.0f}" for row in rows]
        for metric, colour, marker in zip(("rouge1", "rouge2", "rougeL"), COLOURS, "osD"):
            axes.plot(names, [row[metric] for row in rows], color=colour, marker=marker, ms=4, label=metric)
        axes.set(xlabel="words of the document", ylabel="F x 100", ylim=(0, None))
        axes.set_title("Score by length of the document, test part")
        figure.legend(loc="outside right upper")
        figure.savefig(path)
    return path


def draw_cost(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Seconds and memory of the middle document of each bucket, summarised alone."""
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        words = [row["middle_words"] for row in rows]
        seconds = [row["middle_words"] / max(row["words_per_s"], 1e-9) for row in rows]
        left.plot(words, seconds, color=COLOURS[0], marker="o", ms=4)
        left.set(xlabel="words of the document", ylabel="seconds", ylim=(0, None), title="Time")
        peaks = [np.nan if row["peak_mb"] is None else row["peak_mb"] for row in rows]
        right.plot(words, peaks, color=COLOURS[1], marker="s", ms=4)
        right.set(xlabel="words of the document", ylabel="MB above rest", ylim=(0, None), title="Peak memory")
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        figure.savefig(path)
    return path


def draw_places(path: Path, rows: Sequence[dict[str, float]]) -> Path:
    """Where in the source the references come from, and how much of that the summaries have."""
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.add_subplot()
        at = np.arange(len(rows))
        axes.bar(
            at - 0.2,
            [100 * row["wanted"] for row in rows],
            0.38,
            color=COLOURS[5],
            label="wanted: share of\nwhat references hold",
        )
        axes.bar(
            at + 0.2,
            [100 * row["recalled"] for row in rows],
            0.38,
            color=COLOURS[0],
            label="recalled: share of\nit in the summaries",
        )
        axes.set_xticks(at, [str(int(row["tenth"])) for row in rows])
        axes.grid(visible=False, axis="x")
        axes.set(xlabel="tenth of the document", ylabel="% of bigrams")
        axes.set_title("From where in the document, test part")
        figure.legend(loc="outside right upper")
        figure.savefig(path)
    return path
