"""Intervals of figures that rank all examples at once: areas under curves, Spearman.

Examples are drawn anew by whole groups (a sequence, a stretch of a genome), since neighbouring bases are not
independent. A draw is a weight per example: what is equal in all draws, the order of the scores, is found once.
"""

from collections.abc import Callable, Iterator

import numpy as np

from core.training.scores import Scores

DRAWS, WORK = 1000, 2e8
"""Draws behind an interval, and examples times draws: a million bases are drawn 200 times, which takes seconds."""

Values = dict[str, float]


def area_intervals(probabilities: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> Scores:
    """95 % of auroc and auprc as `core.training.scores` defines them; {} where no class or label occurs both ways.

    Args:
        probabilities: [N, K].   labels: classes [N] int, or 0 and 1 [N, K].
        groups: [N], what is drawn together; None: each for itself.
    """
    hits = labels == 1 if labels.ndim == 2 else labels[:, None] == np.arange(probabilities.shape[1])
    if labels.ndim == 1 and probabilities.shape[1] == 2:  # of two classes the second counts
        hits, probabilities = hits[:, 1:], probabilities[:, 1:]
    mixed = np.flatnonzero(hits.any(0) & ~hits.all(0))
    ready = [(np.unique(-probabilities[:, one], return_inverse=True)[1], hits[:, one]) for one in mixed]
    if not ready:
        return {}

    def score(weights: np.ndarray) -> Values:
        # As in the figure itself, the mean is over the classes that occur in a draw.
        areas = [found for order, positive in ready if (found := _areas(order, positive, weights)) is not None]
        return dict(zip(("auroc", "auprc"), np.mean(areas, axis=0))) if areas else {}

    return _interval(score, len(labels), groups)


def spearman_interval(predicted: np.ndarray, target: np.ndarray, groups: np.ndarray | None = None) -> Scores:
    """95 % of the rank correlation of two arrays [N], drawn by groups [N]."""
    orders = [np.unique(values, return_inverse=True)[1] for values in (predicted, target)]

    def score(weights: np.ndarray) -> Values:
        a, b = (_ranks(order, weights) for order in orders)
        total = weights.sum()
        a, b = a - a @ weights / total, b - b @ weights / total
        scale = np.sqrt((a * a) @ weights * ((b * b) @ weights))
        return {"spearman": float((a * b) @ weights / scale) if scale > 0 else 0.0}

    return _interval(score, len(target), groups)


def _areas(order: np.ndarray, hits: np.ndarray, weights: np.ndarray) -> tuple[float, float] | None:
    """Areas under ROC and precision-recall curve; `order` is 0 for the highest score, equal for equal ones.

    None: only hits were drawn, or none.
    """
    positive = np.bincount(order, weights * hits)
    negative = np.bincount(order, weights * ~hits)
    if not positive.any() or not negative.any():
        return None
    found, alarms = positive.cumsum(), negative.cumsum()
    called = found + alarms
    precision = np.divide(found, called, out=np.zeros_like(called), where=called > 0)
    roc = negative @ (found - positive / 2) / (found[-1] * alarms[-1])
    return float(roc), float(positive @ precision / found[-1])


def _ranks(order: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Ranks of examples that stand for `weights` examples each; equal values share the mean of theirs."""
    sizes = np.bincount(order, weights)
    return (sizes.cumsum() - sizes / 2)[order]


def _interval(score: Callable[[np.ndarray], Values], count: int, groups: np.ndarray | None) -> Scores:
    drawn: dict[str, list[float]] = {}
    for weights in _weights(count, groups):
        for name, value in score(weights).items():
            drawn.setdefault(name, []).append(value)
    found: Scores = {}
    for name, values in drawn.items():
        low, high = np.quantile(values, [0.025, 0.975])
        found |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def _weights(count: int, groups: np.ndarray | None) -> Iterator[np.ndarray]:
    """How often each example is drawn, [N], for every draw; nothing where there is one group alone."""
    groups = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]
    members = int(groups.max()) + 1
    random = np.random.default_rng(0)
    for _ in range(0 if members < 2 else int(min(DRAWS, max(100, WORK / count)))):
        drawn = np.bincount(random.integers(members, size=members), minlength=members)
        yield drawn[groups].astype(np.float64)
