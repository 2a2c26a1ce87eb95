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
    """95 % of auroc and auprc as `core.training.scores.classification` defines them; {} where one class alone occurs.

    Args:
        probabilities: [N, K].   labels: [N] int.   groups: [N], what is drawn together; None: each for itself.
    """
    present = np.unique(labels)
    if len(present) < 2:
        return {}
    classes = [1] if probabilities.shape[1] == 2 else present.tolist()
    ready = []
    for one in classes:
        _, order = np.unique(-probabilities[:, one], return_inverse=True)
        ready.append((order, labels == one))

    def score(weights: np.ndarray) -> Values:
        areas = [_areas(order, hits, weights) for order, hits in ready]
        return dict(zip(("auroc", "auprc"), np.mean(areas, axis=0)))

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


def _areas(order: np.ndarray, hits: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Areas under ROC and precision-recall curve; `order` is 0 for the highest score, equal for equal ones."""
    positive = np.bincount(order, weights * hits)
    negative = np.bincount(order, weights * ~hits)
    if not positive.any() or not negative.any():
        return float("nan"), float("nan")
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
    draws = list(map(score, _weights(count, groups)))
    found: Scores = {}
    for name in draws[0] if draws else ():
        values = np.array([one[name] for one in draws])
        low, high = np.quantile(values[~np.isnan(values)], [0.025, 0.975])
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
