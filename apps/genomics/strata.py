"""Where errors sit: the figures of the test part by share of G and C and by length, as a table and a plot.

strata.csv    a row per fifth of the sequences (of the stretches, for answers per base and language models)
strata.png    the first figure against both, with its 95 % interval; dotted: all together
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from apps.genomics.tables import write_table
from core.training.figures import canvas
from core.training.plots import COLOURS, INK
from core.training.statistics import bootstrap_each

PARTS, LEAST, DRAWS = 5, 20, 200
"""Strata of one trait, at most; items of a stratum, at least; draws behind an interval."""

Score = Callable[[np.ndarray], dict[str, float]]


def write_strata(run_dir: Path, traits: np.ndarray, score: Score) -> list[Path]:
    """Write the figures of each stratum; nothing where there are too few items for two, or all are alike.

    Args:
        traits: [items, 2], letters and share of G and C (NaN: proteins have none).
        score: figures of the items with these numbers; the first is drawn.
    """
    rows, panels = [], {}
    for name, values in (("GC share", traits[:, 1]), ("letters", traits[:, 0])):
        drawn = []
        for low, high, items in _cut(values):
            found = score(items)
            first = next(iter(found))
            ends = bootstrap_each(score, items, resamples=DRAWS)[first]
            told = {figure: f"{value:.4g}" for figure, value in found.items()}
            told |= {f"{first}_low": f"{ends[0]:.4g}", f"{first}_high": f"{ends[1]:.4g}"}
            rows.append({"by": name, "from": f"{low:.4g}", "to": f"{high:.4g}", "items": len(items), **told})
            drawn.append((float(np.median(values[items])), found[first], *ends, len(items)))
        if drawn:
            panels[name] = drawn
    if not rows:
        return []
    whole = score(np.arange(len(traits)))
    first = next(iter(whole))
    with canvas(run_dir / "strata.png", 0.6 + 3.8 * len(panels), 3.4) as figure:
        for number, (name, drawn) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(1, len(panels), number)
            at, value, low, high, counts = (np.array(column) for column in zip(*drawn))
            axes.axhline(whole[first], color=INK, lw=0.7, ls=":")
            axes.errorbar(at, value, np.abs([value - low, high - value]), fmt="o-", color=COLOURS[0], capsize=3)
            for x, y, count in zip(at, high, counts):
                axes.annotate(f"{count}", (x, y), (0, 4), textcoords="offset points", ha="center", fontsize=7)
            axes.set(xlabel=name, ylabel=first, title=f"{first} by {name}, test part")
            axes.margins(x=0.08, y=0.16)
    return [write_table(run_dir / "strata.csv", rows), run_dir / "strata.png"]


def _cut(values: np.ndarray) -> Iterator[tuple[float, float, np.ndarray]]:
    """(smallest, largest value, numbers of the items) of parts of about equal size; equal values stay together."""
    parts = min(PARTS, len(values) // LEAST)
    if parts < 2 or np.isnan(values).any() or np.ptp(values) == 0:
        return
    borders = np.unique(np.quantile(values, np.arange(1, parts) / parts))
    place = np.searchsorted(borders, values)
    for number in np.unique(place):
        items = np.flatnonzero(place == number)
        yield float(values[items].min()), float(values[items].max()), items
