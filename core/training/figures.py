"""PNG plots of classification and regression on a test set, in one look for all apps."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from core.training.plots import COLOURS, FAINT, INK, STYLE

LOOK = {**STYLE, "axes.grid": True, "savefig.transparent": False, "figure.dpi": 110, "legend.handlelength": 1.6}
"""Settings of matplotlib for PNG files; `plots.STYLE` is that of the SVG in reports."""
SCRIPTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Noto Sans", "Unifont")
"""Fonts that are asked, where the machine has them, for letters that matplotlib's own does not hold."""
MOST_CLASSES = 20
"""Classes in one plot; the figures beside it count all."""


@contextmanager
def canvas(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches in our look; saved to `path` when the block ends without an error."""
    look: dict[Any, Any] = {**LOOK, "font.family": ["DejaVu Sans", *_more_fonts()]}
    with mpl.rc_context(look), warnings.catch_warnings():
        # Names of classes come in any script; a letter that no font here holds is drawn as a box, the tables have it.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


@cache
def _more_fonts() -> tuple[str, ...]:
    from matplotlib.font_manager import fontManager

    there = set(fontManager.get_font_names())
    return tuple(name for name in SCRIPTS if name in there)


def draw_confusion(
    path: Path, labels: np.ndarray, predicted: np.ndarray, names: Sequence[str], what: str = "examples"
) -> Path:
    """Counts of true class (rows) against predicted class (columns), shaded by the share of the row.

    Args:
        path: PNG to write.
        labels, predicted: [N] int, indices into `names`.
        names: of the classes. Of more than `MOST_CLASSES`, those that occur most are shown.
        what: is counted, for the title.
    """
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    often = np.argsort(-np.bincount(labels, minlength=len(names)), kind="stable")[:MOST_CLASSES]
    chosen = np.sort(often)
    counts = np.array([[np.sum((labels == row) & (predicted == column)) for column in chosen] for row in chosen])
    share = counts / np.maximum(1, np.bincount(labels, minlength=len(names))[chosen])[:, None]
    short = [_short(name) for k, name in enumerate(names) if k in chosen]
    size = 2.2 + 0.52 * len(chosen)
    with canvas(path, size + 0.8, size) as figure:
        axes = figure.add_subplot()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if share[row, column] > 0.55 else INK
                axes.text(column, row, f"{count}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(chosen)), short, rotation=45, ha="right")
        axes.set_yticks(range(len(chosen)), short)
        axes.grid(visible=False)
        more = f" ({len(chosen)} of {len(names)} classes)" if len(chosen) < len(names) else ""
        axes.set(
            xlabel="predicted", ylabel="true", title=f"Confusion, test part{more}: {what}\n(shade: share of the row)"
        )
    return path


def draw_curves(path: Path, probabilities: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Path:
    """ROC and precision-recall curves; for two classes of the second one, else one against the rest.

    Args:
        path: PNG to write.
        probabilities: [N, K].
        labels: [N] int.
        names: K names; at most five classes, the most frequent, are drawn.
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    counts = np.bincount(labels, minlength=len(names))
    order = [1] if len(names) == 2 else np.argsort(-counts, kind="stable")[:5].tolist()
    drawn = [k for k in order if 0 < counts[k] < len(labels)]
    with canvas(path, 8.4, 3.9) as figure:
        roc, recall = figure.subplots(1, 2)
        for colour, k in zip(COLOURS, drawn):
            hits, alarms, precision = _sweep(probabilities[:, k], labels == k)
            roc.plot(alarms, hits, color=colour, label=_short(names[k]))
            recall.step(hits[1:], precision[1:], where="pre", color=colour)
            recall.axhline(counts[k] / len(labels), color=colour, lw=0.7, ls=":")
        roc.plot([0, 1], [0, 1], color=INK, lw=0.7, ls=":")
        roc.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC, test part")
        title = "Precision and recall (dotted: the class's share)"
        recall.set(xlabel="recall", ylabel="precision", ylim=(0, 1.03), title=title)
        if drawn:
            few = f"{len(drawn)} most frequent of {len(names)}" if len(drawn) < len(names) > 2 else None
            roc.legend(loc="lower right", title=few)
    return path


def draw_calibration(path: Path, probabilities: np.ndarray, labels: np.ndarray) -> Path:
    """Share of right answers against the probability of the predicted class, with how often each is said.

    Args:
        path: PNG to write.
        probabilities: [N, K].
        labels: [N] int.
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    said, right = probabilities.max(1), probabilities.argmax(1) == labels
    edges = np.linspace(0, 1, 11)
    bins = np.clip(np.digitize(said, edges) - 1, 0, 9)
    filled = [b for b in range(10) if (bins == b).any()]
    with canvas(path, 4.6, 4.6) as figure:
        above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
        above.plot([0, 1], [0, 1], color=INK, lw=0.7, ls=":")
        points = [(said[bins == b].mean(), right[bins == b].mean()) for b in filled]
        above.plot(*zip(*points), "o-", color=COLOURS[0])
        above.set(
            ylabel="share of right answers",
            xlim=(0, 1),
            ylim=(0, 1.02),
            title="Calibration, test part (dotted: perfect)",
        )
        below.bar(edges[:-1] + 0.05, np.bincount(bins, minlength=10), 0.09, color=FAINT, edgecolor=INK, lw=0.6)
        below.set(xlabel="probability of the predicted class", ylabel="examples")
    return path


def draw_scatter(path: Path, predicted: np.ndarray, target: np.ndarray, names: Sequence[str]) -> Path:
    """Predicted against true values, a panel per target.

    Args:
        path: PNG to write.
        predicted, target: [N] or [N, T].
        names: T names of the targets, with their unit where they have one; at most six are drawn.
    """
    predicted, target = (np.asarray(a).reshape(len(a), -1)[:, :6] for a in (predicted, target))
    panels = target.shape[1]
    columns = min(3, panels)
    with canvas(path, 0.6 + 3.6 * columns, 0.4 + 3.6 * -(-panels // columns)) as figure:
        for k in range(panels):
            axes: Axes = figure.add_subplot(-(-panels // columns), columns, k + 1)
            both = np.concatenate([predicted[:, k], target[:, k]])
            ends = [both.min(), both.max()]
            axes.plot(ends, ends, color=INK, lw=0.7, ls=":")
            axes.scatter(target[:, k], predicted[:, k], s=9, alpha=0.4, lw=0, color=COLOURS[0], rasterized=True)
            axes.set(xlabel="true", ylabel="predicted", title=_short(names[k]))
    return path


def _sweep(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True positive rate, false positive rate and precision at every threshold, from the strictest on."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # equal scores cross the threshold together
    hits = np.cumsum(positive[order])[last]
    called = (np.arange(len(scores)) + 1)[last]
    alarms = called - hits
    rates = hits / max(1, positive.sum()), alarms / max(1, (~positive).sum()), hits / called
    first = (0.0, 0.0, 1.0)
    return tuple(np.insert(rate, 0, start) for rate, start in zip(rates, first))  # type: ignore[return-value]


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:22]}…"
