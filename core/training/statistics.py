"""What may be said about variants that ran with the same seeds: spread, paired differences, Holm, verdicts.

Two runs with the same seed see the same data in the same order, so they are compared in pairs: the noise that both
share cancels. With 3 to 5 seeds the interval is Student's t (a bootstrap over so few runs is too narrow); the bootstrap
here is for examples of a test set, of which there are hundreds.

Nothing here imports torch. Non-finite values are an error: a run that went NaN is a failure to be shown, and whoever
calls decides that before asking for a mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from scipy.special import stdtr, stdtrit  # scipy.stats takes 2.6 s to import, these two functions are all we need

Better = Literal["lower", "higher"]
Verdict = Literal["better", "worse", "not separable"]

Key = TypeVar("Key", bound=Hashable)

ALPHA = 0.05
CONFIDENCE = 1 - ALPHA


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of `n` values; `sd` is None when one value cannot tell."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, in the metric's unit, over the `n` seeds that both sides finished.

    `low`, `high` bound the mean with the confidence asked for, `p` is two-sided; None where the data cannot tell, and
    then `note` says why.
    """

    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int
    note: str = ""


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation over seeds; ValueError for no value or a non-finite one."""
    _require_finite(values)
    if not values:
        raise ValueError("spread needs at least one value")
    array = np.asarray(values, dtype=np.float64)
    return Spread(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None, len(array))


def paired_difference(
    values: Mapping[int, float], reference: Mapping[int, float], *, confidence: float = CONFIDENCE
) -> Difference:
    """Difference `values - reference` over shared seeds, with a t interval and a two-sided p value.

    Args:
        values: metric by seed of the variant in question.
        reference: metric by seed of what it is compared with. Seeds that only one side has are left out.
        confidence: of the interval, between 0 and 1.

    Where the t statistic does not exist we say less, never more:
        no or one shared seed: no interval and no p;
        all differences exactly equal but not zero (a metric in coarse steps, a seed without effect): no interval, and
        the exact sign test, p = 2^(1-n), so that two equal differences do not count as certainty;
        all differences zero: the interval [0, 0] and p = 1.

    Raises:
        ValueError: a value is not finite.
    """
    _require_finite([*values.values(), *reference.values()])
    seeds = sorted(values.keys() & reference.keys())
    n = len(seeds)
    if n == 0:
        return Difference(None, None, None, None, 0, "no shared seed")
    differences = np.array([values[seed] - reference[seed] for seed in seeds], dtype=np.float64)
    mean = float(differences.mean())
    if n == 1:
        return Difference(mean, None, None, None, 1, "one shared seed: the noise between seeds is unknown")
    largest = max(max(abs(values[seed]), abs(reference[seed])) for seed in seeds)
    # The second term: below it squares underflow, and the standard deviation of unequal numbers would be 0.
    rounding = max(8 * np.finfo(np.float64).eps * largest, 1e-150)
    if float(np.ptp(differences)) <= rounding:
        if abs(mean) <= rounding:
            return Difference(0.0, 0.0, 0.0, 1.0, n, "identical in every seed")
        return Difference(mean, None, None, 2.0 ** (1 - n), n, "the same difference in every seed: exact sign test")
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * error
    p = float(2 * stdtr(n - 1, -abs(mean / error)))
    return Difference(mean, mean - half, mean + half, p, n)


def difference_to(values: Mapping[int, float], constant: float, *, confidence: float = CONFIDENCE) -> Difference:
    """Difference of every seed to one number that has no seed, such as a floor."""
    return paired_difference(values, dict.fromkeys(values, constant), confidence=confidence)


def holm(p_values: Mapping[Key, float | None]) -> dict[Key, float | None]:
    """Adjust p values so that the chance of any false "separable" among them stays below alpha (Holm 1979).

    A comparison without a p value (None) asks nothing: it stays None and does not make the others stricter.
    """
    ranked = sorted(((p, key) for key, p in p_values.items() if p is not None), key=lambda pair: pair[0])
    adjusted: dict[Key, float | None] = dict.fromkeys(p_values)
    largest = 0.0
    for rank, (p, key) in enumerate(ranked):
        largest = max(largest, min(1.0, (len(ranked) - rank) * p))
        adjusted[key] = largest
    return adjusted


def verdict(difference: Difference, p_adjusted: float | None, better: Better, *, alpha: float = ALPHA) -> Verdict:
    """Say a difference in words; "not separable" unless the adjusted p value is below `alpha`."""
    if difference.mean is None or p_adjusted is None or p_adjusted >= alpha:
        return "not separable"
    return "better" if (difference.mean < 0) == (better == "lower") else "worse"


def bootstrap(
    statistic: Callable[..., float],
    *examples: Sequence[float] | np.ndarray,
    confidence: float = CONFIDENCE,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic over the examples of one test set (never over seeds).

    Args:
        statistic: called with one array per entry of `examples`, returns a number: `np.mean`, or an AUC of
            (label, score).
        examples: arrays whose first axis counts the examples; several are resampled together, row by row.
        confidence: of the interval, between 0 and 1.
        resamples: how many times the examples are drawn with replacement.
        seed: of the draws; the same seed gives the same interval.
    Returns:
        (low, high) in the unit of the statistic.
    Raises:
        ValueError: no example, or arrays of different lengths.
    """

    def one(*drawn: np.ndarray) -> dict[str, float]:
        return {"": statistic(*drawn)}

    return bootstrap_each(one, *examples, confidence=confidence, resamples=resamples, seed=seed)[""]


def bootstrap_each(
    statistics: Callable[..., Mapping[str, float]],
    *examples: Sequence[float] | np.ndarray,
    confidence: float = CONFIDENCE,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """`bootstrap` of several statistics at once, from the same draws; `statistics` returns them by name."""
    arrays = [np.asarray(array) for array in examples]
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"bootstrap needs arrays with the same number of examples, at least 1; got {sorted(lengths)}")
    (count,) = lengths
    draws = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {}
    for _ in range(resamples):
        rows = draws.integers(count, size=count)
        for name, value in statistics(*(array[rows] for array in arrays)).items():
            drawn.setdefault(name, []).append(value)
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    return {
        name: (float(low), float(high)) for name, (low, high) in ((n, np.quantile(v, ends)) for n, v in drawn.items())
    }


def _require_finite(values: Sequence[float]) -> None:
    wrong = [value for value in values if not math.isfinite(value)]
    if wrong:
        raise ValueError(f"statistics need finite values, got {wrong[0]}; a run that went NaN is counted as a failure")
