"""Figures of classification and regression, each with its interval: what every app reports is computed here, once.

All functions take whole test sets and sum over examples, never over batches. What a name means is torchmetrics' or
scipy's definition; the bootstrap is that of `statistics`, over examples.
"""

from collections.abc import Callable

import numpy as np
import torch
from torchmetrics.functional import classification as tm

from core.training.statistics import bootstrap_each

RESAMPLES = 1000
"""Draws behind an interval: its ends move by about 3 % of its width from one seed to another."""

Scores = dict[str, float]


def classification(probabilities: np.ndarray, labels: np.ndarray, *, intervals: bool = False) -> Scores:
    """Figures of single-label classification.

    Args:
        probabilities: [N, K], rows that sum to one, K >= 2.
        labels: [N] int, 0 <= label < K.
        intervals: also `<name>_low` and `<name>_high`, 95 % over examples, for all but auroc, auprc and ece.

    Returns:
        accuracy; balanced_accuracy (mean recall of the classes that occur); f1_macro (over these classes);
        mcc (Matthews, multiclass: Gorodkin's R_K); auroc and auprc (two classes: of class 1; more: mean over the
        classes that occur, one against the rest); ece (expected calibration error, 15 equal bins); top5 where K > 5.
        auroc and auprc are left out where only one class occurs.

    Raises:
        ValueError: shapes that do not fit, no example, a label outside the classes.
    """
    probabilities, labels = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    _check(probabilities, labels)
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    found = from_confusion(_confusion(predicted, labels, classes))
    if classes > 5:
        top = np.argpartition(-probabilities, 5, axis=1)[:, :5]
        found["top5"] = float((top == labels[:, None]).any(axis=1).mean())
    if len(np.unique(labels)) > 1:
        found |= _ranking(probabilities, labels)
    if intervals:
        found |= _intervals(lambda a, b: from_confusion(_confusion(a, b, classes)), predicted, labels)
    p, y = torch.from_numpy(probabilities), torch.from_numpy(labels.astype(np.int64))
    found["ece"] = float(tm.multiclass_calibration_error(p, y, num_classes=classes, n_bins=15))
    return found


def multilabel(
    probabilities: np.ndarray, labels: np.ndarray, *, threshold: float = 0.5, intervals: bool = False
) -> Scores:
    """Figures of multi-label classification.

    Args:
        probabilities, labels: [N, K]; labels are 0 or 1.
        threshold: from which probability on a label is predicted.
        intervals: also `<name>_low` and `<name>_high` for accuracy, exact_match and f1_micro.

    Returns:
        accuracy (of single labels), exact_match (of whole rows), f1_micro, f1_macro, and auroc, auprc: means over the
        labels that occur both ways, left out if there is none.
    """
    probabilities, labels = np.asarray(probabilities, dtype=np.float64), np.asarray(labels).astype(bool)
    if probabilities.shape != labels.shape or probabilities.ndim != 2 or not len(labels):
        raise ValueError(f"probabilities and labels must both be [N, K], got {probabilities.shape} and {labels.shape}")
    predicted = probabilities >= threshold
    found = _multilabel(predicted, labels)
    hits, calls, truths = (predicted & labels).sum(0), predicted.sum(0), labels.sum(0)
    found["f1_macro"] = float(_ratio(2 * hits, calls + truths)[calls + truths > 0].mean()) if truths.any() else 0.0
    mixed = [k for k in range(labels.shape[1]) if 0 < truths[k] < len(labels)]
    if mixed:
        both = [_binary_ranking(probabilities[:, k], labels[:, k]) for k in mixed]
        found |= {name: float(np.mean([one[name] for one in both])) for name in ("auroc", "auprc")}
    if intervals:
        found |= _intervals(_multilabel, predicted, labels)
    return found


def regression(predicted: np.ndarray, target: np.ndarray, *, intervals: bool = False) -> Scores:
    """Figures of regression on one target.

    Args:
        predicted, target: [N].
        intervals: also `<name>_low` and `<name>_high` for each figure.

    Returns:
        spearman, pearson (0 where a side is constant), r2 (against the mean of these targets; 0 where they are
        constant), mse, mae.
    """
    predicted, target = np.asarray(predicted, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if predicted.shape != target.shape or predicted.ndim != 1 or not len(target):
        raise ValueError(f"predicted and target must both be [N], got {predicted.shape} and {target.shape}")
    found = _regression(predicted, target)
    if intervals:
        found |= _intervals(_regression, predicted, target)
    return found


def _check(probabilities: np.ndarray, labels: np.ndarray) -> None:
    if probabilities.ndim != 2 or probabilities.shape[1] < 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(f"wants probabilities [N, K >= 2] and labels [N], got {probabilities.shape}, {labels.shape}")
    if not len(labels):
        raise ValueError("no example to score")
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(f"labels must lie in 0..{probabilities.shape[1] - 1}, got {labels.min()}..{labels.max()}")


def _intervals(score: Callable[..., Scores], *arrays: np.ndarray) -> Scores:
    found: Scores = {}
    for name, (low, high) in bootstrap_each(score, *arrays, resamples=RESAMPLES).items():
        found |= {f"{name}_low": low, f"{name}_high": high}
    return found


def _confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """[K, K] counts, rows are the true classes."""
    flat = np.bincount(labels.astype(np.int64) * classes + predicted, minlength=classes * classes)
    return flat.reshape(classes, classes).astype(np.float64)


def from_confusion(counts: np.ndarray) -> Scores:
    """accuracy, balanced_accuracy, f1_macro and mcc of counts [K, K], rows being the true classes."""
    truths, calls, hits = counts.sum(1), counts.sum(0), np.diag(counts)
    total, there = counts.sum(), truths > 0
    covariance = hits.sum() * total - truths @ calls
    spread = np.sqrt(total**2 - calls @ calls) * np.sqrt(total**2 - truths @ truths)
    return {
        "accuracy": float(hits.sum() / total),
        "balanced_accuracy": float(_ratio(hits, truths)[there].mean()),
        "f1_macro": float(_ratio(2 * hits, truths + calls)[there].mean()),
        "mcc": float(covariance / spread) if spread > 0 else 0.0,
    }


def _ranking(probabilities: np.ndarray, labels: np.ndarray) -> Scores:
    if probabilities.shape[1] == 2:
        return _binary_ranking(probabilities[:, 1], labels == 1)
    each = [_binary_ranking(probabilities[:, k], labels == k) for k in np.unique(labels)]
    return {name: float(np.mean([one[name] for one in each])) for name in ("auroc", "auprc")}


def _binary_ranking(scores: np.ndarray, labels: np.ndarray) -> Scores:
    p, y = torch.from_numpy(scores), torch.from_numpy(labels.astype(np.int64))
    return {"auroc": float(tm.binary_auroc(p, y)), "auprc": float(tm.binary_average_precision(p, y))}


def _multilabel(predicted: np.ndarray, labels: np.ndarray) -> Scores:
    hits = (predicted & labels).sum()
    named = predicted.sum() + labels.sum()
    return {
        "accuracy": float((predicted == labels).mean()),
        "exact_match": float((predicted == labels).all(axis=1).mean()),
        "f1_micro": float(2 * hits / named) if named else 0.0,
    }


def _regression(predicted: np.ndarray, target: np.ndarray) -> Scores:
    error, spread = predicted - target, target - target.mean()
    return {
        "spearman": _correlation(_ranks(predicted), _ranks(target)),
        "pearson": _correlation(predicted, target),
        "r2": 0.0 if _constant(target) else 1 - float(error @ error) / float(spread @ spread),
        "mse": float(np.mean(error**2)),
        "mae": float(np.mean(np.abs(error))),
    }


def _constant(values: np.ndarray) -> bool:
    """Whether values differ by rounding alone; their mean may miss them by a digit, so squares tell nothing then."""
    return float(np.ptp(values)) <= 8 * np.finfo(np.float64).eps * float(np.abs(values).max())


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if _constant(a) or _constant(b):
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt(a @ a) * np.sqrt(b @ b))
    return float(a @ b) / scale if scale > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below > 0)
