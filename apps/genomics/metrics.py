"""Figures of predictions, for models and floors alike: by examples for sequences, by counts for bases."""

from collections.abc import Sequence

import numpy as np

from apps.genomics.ranking import area_intervals
from core.training.scores import Scores, classification, from_confusion, multilabel, regression
from core.training.statistics import bootstrap_each

RESAMPLES = 1000
"""Draws behind an interval over sequences or stretches."""
RANKED = 1_000_000
"""Up to so many bases, areas under curves are computed; sorting more takes minutes."""


def sequence_figures(
    task: str,
    predicted: np.ndarray,
    target: np.ndarray,
    names: Sequence[str],
    *,
    copied: np.ndarray | None = None,
    leaks: str = "warn",
    intervals: bool = False,
) -> Scores:
    """Figures of answers about whole sequences.

    Args:
        predicted: probabilities [N, K], or numbers [N, T].   target: classes [N], 0 or 1 [N, K], or numbers [N, T].
        copied: bool [N], the sequence has a copy in the training part.
        leaks: "drop": the figures are those without copies, those of all sequences end in `_with_copies`; else the
            figures are of all sequences, and those of the others end in `_without_copies`.
        intervals: 95 % over sequences.
    """
    some = copied is not None and bool(copied.any()) and not bool(copied.all())
    if not some:
        return _figures(task, predicted, target, names, intervals)
    assert copied is not None
    clean = _figures(task, predicted[~copied], target[~copied], names, intervals)
    whole = _figures(task, predicted, target, names, intervals)
    main, rest, ending = (clean, whole, "with") if leaks == "drop" else (whole, clean, "without")
    beside = {f"{name}_{ending}_copies": value for name, value in rest.items() if not name.endswith(("_low", "_high"))}
    return main | beside


def _figures(task: str, predicted: np.ndarray, target: np.ndarray, names: Sequence[str], intervals: bool) -> Scores:
    if task == "classification":
        found = classification(predicted, target, intervals=intervals)
        return found | (area_intervals(predicted, target) if intervals else {})
    if task == "multilabel":
        return multilabel(predicted, target, intervals=intervals)
    each = [regression(predicted[:, t], target[:, t], intervals=intervals) for t in range(target.shape[1])]
    if len(each) == 1:
        return each[0]
    # Several targets: the mean over them is what counts; each one's Spearman stands beside it.
    mean = {
        name: float(np.mean([one[name] for one in each])) for name in each[0] if not name.endswith(("_low", "_high"))
    }
    return mean | {f"spearman_{name}": one["spearman"] for name, one in zip(names, each)}


def plain_figures(task: str, predicted: np.ndarray, target: np.ndarray) -> Scores:
    """Two figures of answers about sequences that cost little, for many small parts of a test."""
    if task == "classification":
        found = from_confusion(confusion(predicted.argmax(1), target, predicted.shape[1]))
        return {name: found[name] for name in ("accuracy", "mcc")}
    if task == "multilabel":
        right = (predicted >= 0.5) == (target > 0.5)
        return {"accuracy": float(right.mean()), "exact_match": float(right.all(1).mean())}
    each = [regression(predicted[:, t], target[:, t]) for t in range(target.shape[1])]
    return {name: float(np.mean([one[name] for one in each])) for name in ("spearman", "mae")}


def base_figures(confusions: np.ndarray, intervals: bool = False) -> Scores:
    """Figures of a class per base from counts [items, K, K], rows being the true classes; intervals over items."""

    def score(counts: np.ndarray) -> Scores:
        return from_confusion(counts.sum(0))

    found = score(confusions)
    return found | (_ends(score, confusions) if intervals and len(confusions) > 1 else {})


def confusion(predicted: np.ndarray, target: np.ndarray, classes: int) -> np.ndarray:
    """Counts [K, K] of the bases with a class."""
    known = target >= 0
    flat = np.bincount(target[known] * classes + predicted[known], minlength=classes * classes)
    return flat.reshape(classes, classes).astype(np.float64)


def moments(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Sums [7] over the bases with a value, from which `number_figures` works."""
    known = ~np.isnan(target)
    p, y = predicted[known].astype(np.float64), target[known].astype(np.float64)
    return np.array([len(y), p.sum(), y.sum(), p @ p, y @ y, p @ y, np.abs(p - y).sum()])


def number_figures(sums: np.ndarray, intervals: bool = False) -> Scores:
    """Figures of a number per base from sums [items, 7] of `moments`."""

    def score(each: np.ndarray) -> Scores:
        n, p, y, pp, yy, py, distance = each.sum(0)
        errors = pp - 2 * py + yy
        spread_p, spread_y = pp - p * p / n, yy - y * y / n
        shared = py - p * y / n
        scale = np.sqrt(max(spread_p, 0.0) * max(spread_y, 0.0))
        return {
            "pearson": float(shared / scale) if scale > 0 else 0.0,
            "r2": float(1 - errors / spread_y) if spread_y > 0 else 0.0,
            "mse": float(errors / n),
            "mae": float(distance / n),
        }

    return score(sums) | (_ends(score, sums) if intervals and len(sums) > 1 else {})


def language_figures(
    nats: np.ndarray,
    bases: np.ndarray,
    intervals: bool = False,
    prefix: str = "",
    *,
    tokens: np.ndarray | None = None,
) -> Scores:
    """Perplexity per base, nats and bits, from sums per item; items without an asked base count for nothing.

    Args:
        nats, bases: [items], of what was asked.   intervals: of the perplexities, over items.
        tokens: [items], how many tokens were asked, where a token is not a letter: also the perplexity per token,
            which depends on the tokens and cannot be compared between them.
    """
    counts = {"perplexity": bases} | ({} if tokens is None else {"perplexity_per_token": tokens})

    def score(n: np.ndarray, *units: np.ndarray) -> Scores:
        each = [float(n.sum() / max(unit.sum(), 1)) for unit in units]
        found = {f"{prefix}{name}": float(np.exp(min(value, 50.0))) for name, value in zip(counts, each)}
        return found | {f"{prefix}nats_per_base": each[0], f"{prefix}bits_per_base": each[0] / float(np.log(2))}

    found = score(nats, *counts.values())
    if not intervals or len(nats) < 2:
        return found
    return found | {name: value for name, value in _ends(score, nats, *counts.values()).items() if "perplexity" in name}


def _ends(score, *arrays: np.ndarray) -> Scores:
    found: Scores = {}
    for name, (low, high) in bootstrap_each(score, *arrays, resamples=RESAMPLES).items():
        found |= {f"{name}_low": low, f"{name}_high": high}
    return found
