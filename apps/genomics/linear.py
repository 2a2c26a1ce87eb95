"""Linear models that need no deep network: they are floors, and the start of a shortcut.

Features of a sequence are those of `terms.py`; of a base, the letters around it. Columns that do not vary are left
out, the others scaled; weights come back for the plain features.
"""

from collections.abc import Sequence

import numpy as np

from apps.genomics.alphabet import Alphabet

ROWS = 60_000
"""Bases that a window model is fitted on, drawn evenly: more no longer move the third digit."""
LOGISTIC = (0.001, 0.01, 0.1)
"""Inverse strengths that a floor chooses from by its validation score."""
RIDGE = (1.0, 10.0, 100.0)
"""Ridge strengths that a floor chooses from."""


def windows(sequences: Sequence[np.ndarray], size: int, alphabet: Alphabet, rows: np.ndarray) -> np.ndarray:
    """Letters around bases, [rows, size * atoms]; zeros beyond the ends. `rows` count through all sequences."""
    half, atoms = size // 2, len(alphabet.atoms)
    composition = np.concatenate([alphabet.composition, np.zeros((1, atoms), dtype=np.float32)])
    ends = np.cumsum([len(one) for one in sequences])
    nothing = len(alphabet.letters)
    edge = np.full(half, nothing, dtype=np.uint8)
    joined = np.concatenate([edge, *(part for one in sequences for part in (one, edge))])
    # Sequences stand half a window apart, so that no window sees two of them.
    at = rows + half * (np.searchsorted(ends, rows, side="right") + 1)
    return composition[joined[at[:, None] + np.arange(-half, half + 1)]].reshape(len(rows), -1)


def fit_classes(x: np.ndarray, y: np.ndarray, classes: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Multinomial logistic regression: weights [F, K] and bias [K]; classes that do not occur get a low bias."""
    from sklearn.linear_model import LogisticRegression

    used, centre, scale = _scaling(x)
    present = np.unique(y)
    weights, bias = np.zeros((x.shape[1], classes)), np.full(classes, -10.0)
    if len(present) == 1:
        bias[present] = 10.0
        return weights, bias
    fitted = LogisticRegression(C=strength, max_iter=200, tol=1e-3).fit((x[:, used] - centre) / scale, y)
    coefficients, offsets = fitted.coef_, fitted.intercept_
    if len(present) == 2:
        coefficients = np.concatenate([-coefficients / 2, coefficients / 2])
        offsets = np.concatenate([-offsets / 2, offsets / 2])
    plain = coefficients / scale
    weights[np.ix_(used, present)] = plain.T
    bias[present] = offsets - plain @ centre
    return weights, bias


def fit_labels(x: np.ndarray, y: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """One logistic regression per label: y [n, K] of 0 and 1; weights [F, K] and bias [K] of the logits."""
    both = [fit_classes(x, column.astype(int), 2, strength) for column in y.T]
    return (
        np.stack([weights[:, 1] - weights[:, 0] for weights, _ in both], axis=1),
        np.stack([bias[1] - bias[0] for _, bias in both]),
    )


def fit_numbers(x: np.ndarray, y: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Ridge with an unpenalised mean: y [n, T]; weights [F, T] and bias [T]. One-hot columns keep their scale."""
    used, centre, scale = _scaling(x)
    if x.max(initial=0) == 1:  # letters by position: the published ridge does not scale them
        scale = np.ones_like(scale)
    z = (x[:, used].astype(np.float64) - centre) / scale
    mean = y.mean(axis=0)
    if z.shape[1] <= z.shape[0]:
        inner = np.linalg.solve(z.T @ z + strength * np.eye(z.shape[1]), z.T @ (y - mean))
    else:
        inner = z.T @ np.linalg.solve(z @ z.T + strength * np.eye(z.shape[0]), y - mean)
    weights = np.zeros((x.shape[1], y.shape[1]))
    weights[used] = inner / scale[:, None]
    return weights, mean - (centre / scale) @ inner


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis."""
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probability of each label."""
    return 1 / (1 + np.exp(-np.clip(logits, -60, 60)))


def _scaling(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns that vary, their mean and deviation."""
    deviation = x.std(axis=0, dtype=np.float64)
    used = np.flatnonzero(deviation > 1e-8)
    return used, x[:, used].mean(axis=0, dtype=np.float64), deviation[used]
