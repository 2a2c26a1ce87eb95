"""The statistics against hand-computed numbers and scipy's own tests, and what they say when the data cannot tell."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from core.training.statistics import (
    Difference,
    bootstrap,
    difference_to,
    holm,
    paired_difference,
    spread,
    verdict,
)


def test_spread_divides_by_n_minus_one():
    result = spread([1.0, 2.0, 4.0])
    assert result.mean == pytest.approx(7 / 3)
    assert result.sd == pytest.approx(math.sqrt(((1 - 7 / 3) ** 2 + (2 - 7 / 3) ** 2 + (4 - 7 / 3) ** 2) / 2))
    assert result.n == 3


def test_one_value_has_no_spread():
    assert spread([3.0]).sd is None


def test_paired_difference_by_hand():
    # Differences -1, -2, -3: mean -2, SD 1, standard error 1/sqrt(3); t(0.975, df 2) = 4.302653 from any t table.
    result = paired_difference({0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 4.0, 2: 6.0})
    assert result.mean == pytest.approx(-2)
    assert result.low == pytest.approx(-2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert result.high == pytest.approx(-2 + 4.302653 / math.sqrt(3), abs=1e-6)


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=2, max_size=12))
def test_paired_difference_is_scipys_paired_t_test(pairs):
    a, b = zip(*pairs)
    differences = np.subtract(a, b)
    # scipy warns of cancellation below this; the degenerate cases have their own tests
    assume(np.ptp(differences) > max(1e-6 * np.max(np.abs(pairs)), 1e-140))
    ours = paired_difference(dict(enumerate(a)), dict(enumerate(b)), confidence=0.9)
    theirs = stats.ttest_rel(a, b)
    interval = theirs.confidence_interval(0.9)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-12)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-9)


def test_pairing_removes_the_noise_that_both_share():
    shared = np.random.default_rng(0).normal(scale=10, size=5)
    variant = {seed: float(x + 0.1 + 0.01 * seed) for seed, x in enumerate(shared)}
    baseline = {seed: float(x) for seed, x in enumerate(shared)}
    paired = paired_difference(variant, baseline)
    unpaired = stats.ttest_ind(list(variant.values()), list(baseline.values()))
    assert paired.p is not None
    assert paired.p < 0.001 < 0.5 < unpaired.pvalue


def test_only_shared_seeds_count():
    # Seed 9 failed on one side; its value on the other would turn the sign of the mean if it counted.
    result = paired_difference({0: 1.0, 1: 1.2, 9: 1000.0}, {0: 2.0, 1: 2.4, 3: -1000.0})
    assert (result.mean, result.n) == (pytest.approx(-1.1), 2)


def test_what_one_seed_and_no_seed_can_tell():
    one = paired_difference({0: 1.0, 1: 5.0}, {0: 2.0})
    assert (one.mean, one.low, one.high, one.p, one.n) == (-1.0, None, None, None, 1)
    assert "noise between seeds is unknown" in one.note
    none = paired_difference({0: 1.0}, {1: 2.0})
    assert (none.mean, none.p, none.n) == (None, None, 0)
    for result in (one, none):
        assert verdict(result, result.p, "lower") == "not separable"


def test_identical_runs_differ_by_nothing():
    result = paired_difference({0: 0.3, 1: 0.4}, {0: 0.3, 1: 0.4})
    assert (result.mean, result.low, result.high, result.p) == (0.0, 0.0, 0.0, 1.0)


def test_equal_differences_are_not_certainty():
    # 0.1 + 0.2 style rounding: the differences agree but for their last bits, a t statistic of them would be ~1e16.
    baseline = {0: 0.1, 1: 0.2, 2: 0.3}
    result = paired_difference({seed: value + 0.1 for seed, value in baseline.items()}, baseline)
    assert (result.p, result.low, result.high) == (0.25, None, None)
    assert verdict(result, result.p, "higher") == "not separable"
    eight = paired_difference(dict.fromkeys(range(8), 0.75), dict.fromkeys(range(8), 0.5))
    assert eight.p == stats.binomtest(8, 8).pvalue
    assert verdict(eight, eight.p, "higher") == "better"


def test_nan_is_the_callers_decision():
    with pytest.raises(ValueError, match="finite"):
        paired_difference({0: math.nan}, {0: 1.0})
    with pytest.raises(ValueError, match="finite"):
        spread([1.0, math.inf])
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_difference_to_a_floor_is_the_one_sample_t_test():
    values = {0: 0.35, 1: 0.36, 2: 0.34, 3: 0.352}
    theirs = stats.ttest_1samp(list(values.values()), 0.37)
    ours = difference_to(values, 0.37)
    assert ours.p == pytest.approx(theirs.pvalue)
    assert ours.mean == pytest.approx(np.mean(list(values.values())) - 0.37)


def test_holm_by_hand():
    # Three comparisons: .01 * 3, then .03 * 2 = .06, then .04 * 1, lifted to .06 to stay in order.
    adjusted = holm({"a": 0.03, "b": 0.01, "c": 0.04})
    assert adjusted == {"a": pytest.approx(0.06), "b": pytest.approx(0.03), "c": pytest.approx(0.06)}


def test_holm_leaves_out_what_has_no_p_value():
    assert holm({"a": 0.02, "b": None, "c": 0.9}) == {"a": pytest.approx(0.04), "b": None, "c": 0.9}
    assert holm({}) == {}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_helps_and_keeps_the_order(p_values):
    raw = dict(enumerate(p_values))
    adjusted = holm(raw)
    values = [adjusted[key] for key in sorted(raw, key=lambda key: raw[key])]
    assert values == sorted(values)
    assert all(raw[key] <= adjusted[key] <= min(1, len(raw) * raw[key]) + 1e-12 for key in raw)


@pytest.mark.parametrize(
    ("mean", "better", "words"),
    [(-0.1, "lower", "better"), (0.1, "lower", "worse"), (0.1, "higher", "better"), (-0.1, "higher", "worse")],
)
def test_verdict_follows_the_direction_of_the_metric(mean, better, words):
    difference = Difference(mean, None, None, 0.01, 5)
    assert verdict(difference, 0.01, better) == words
    assert verdict(difference, 0.05, better) == "not separable"


def test_bootstrap_of_a_mean_agrees_with_scipy_and_repeats():
    values = np.random.default_rng(1).normal(5, 2, size=400)
    reference = stats.bootstrap(
        (values,), np.mean, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    low, high = bootstrap(np.mean, values)
    # The end points are themselves random by about 2 % of the interval's width at 2,000 resamples.
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=0.1 * (reference.high - reference.low))
    assert bootstrap(np.mean, values) == (low, high)


def test_bootstrap_keeps_rows_together():
    x = np.arange(50.0)
    low, high = bootstrap(lambda a, b: float(np.mean(a - b)), x, x + 1)
    assert (low, high) == (-1.0, -1.0)  # resampled apart, the difference would spread by several units


def test_bootstrap_refuses_arrays_that_do_not_match():
    with pytest.raises(ValueError, match="same number of examples"):
        bootstrap(np.mean, [1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="at least 1"):
        bootstrap(np.mean, [])


def test_statistics_and_report_do_not_import_torch():
    code = "import sys, core.training.statistics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
