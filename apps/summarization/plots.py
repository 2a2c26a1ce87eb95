"""Plots of a test: scores by length of the source, and how well each part of it gets into the summary."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

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
