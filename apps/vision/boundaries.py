"""How well the outlines of segments are met: the boundary F of each class of one image.

A pixel is on the outline of its class where one of its four neighbours has another class. Precision is the share of the
answer's outline that has the true outline nearer than a tolerance, recall the share of the true outline that has the
answer's; F is their harmonic mean. The border of the image and of pixels without a class are no outlines.

Source:
    Csurka, Larlus & Perronnin 2013, "What is a good evaluation measure for semantic segmentation?", BMVC; its tolerance
    of 0.75 % of the image's diagonal.

Where we differ:
    There the scores of an image are averaged first; here those of a class, over the images that have it, so that a rare
    class counts as much as a frequent one, as it does in the mean IoU.
"""

import numpy as np
from scipy.spatial import KDTree

TOLERANCE = 0.0075
"""Share of the diagonal below which two points of an outline meet."""


def outline(mask: np.ndarray) -> np.ndarray:
    """Which pixels of a mask [H, W] of class numbers, -1 where there is none, are on the outline of their class."""
    found = np.zeros(mask.shape, dtype=bool)
    for here, there in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        apart = (mask[here] != mask[there]) & (mask[here] >= 0) & (mask[there] >= 0)
        found[here] |= apart
        found[there] |= apart
    return found


def boundary_f(answer: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """F of each class of an image, [K]; NaN for a class that has no outline in either.

    Args:
        answer: class numbers [H, W].   truth: likewise, -1 where there is no class: such pixels count in neither.
        classes: K.
    """
    answer = np.where(truth >= 0, answer, -1)
    reach = TOLERANCE * float(np.hypot(*truth.shape))
    points = [(np.argwhere(outline(mask)), mask) for mask in (answer, truth)]
    kinds = [mask[tuple(places.T)] for places, mask in points]
    found = np.full(classes, np.nan)
    for k in range(classes):
        own, true = (places[kind == k] for (places, _), kind in zip(points, kinds))
        if len(own) and len(true):
            precision, recall = _met(own, true, reach), _met(true, own, reach)
            found[k] = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        elif len(own) or len(true):
            found[k] = 0.0
    return found


def _met(points: np.ndarray, others: np.ndarray, reach: float) -> float:
    """Share of points [N, 2] that are nearer than `reach` to one of the others [M, 2]."""
    distance, _ = KDTree(others).query(points, distance_upper_bound=reach)
    return float(np.isfinite(distance).mean())


def mean_over_classes(scores: np.ndarray) -> float:
    """Mean over the classes of the means over the images of scores [N, K] that have them; 0 if there is none."""
    there = np.isfinite(scores)
    counts = there.sum(0)
    sums = np.where(there, scores, 0.0).sum(0)
    return float((sums[counts > 0] / counts[counts > 0]).mean()) if counts.any() else 0.0
