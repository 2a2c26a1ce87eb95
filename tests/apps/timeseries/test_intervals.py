"""Intervals from validation residuals: rank, coverage, batches, missing values."""

import pytest
import torch

from apps.timeseries.intervals import ResidualIntervals


def learned(residuals: torch.Tensor, levels, size: int = 16, observed=None) -> ResidualIntervals:
    """Intervals from residuals [N, C, H] of a forecast that is always 3."""
    windows, series, horizon = residuals.shape
    intervals = ResidualIntervals(series, horizon, levels, 100, windows)
    for start in range(0, windows, size):
        rows = slice(start, start + size)
        seen = None if observed is None else observed[rows]
        future = 3 + residuals[rows]
        intervals.collect(torch.full_like(future, 3.0), future, 100 + torch.arange(windows)[rows], seen)
    intervals.learn()
    return intervals


def test_the_rank_is_that_of_split_conformal():
    # 19 residuals 1..19: k = ceil(20 * 0.9) = 18, floor(20 * 0.1) = 2, the median is the 10th.
    residuals = torch.arange(1.0, 20.0)[torch.randperm(19, generator=torch.Generator().manual_seed(0))]
    offsets = learned(residuals.view(19, 1, 1), [0.1, 0.5, 0.9]).offsets
    assert offsets.flatten().tolist() == [2, 10, 18]
    # Too few residuals for the level: the extreme ones.
    assert learned(torch.tensor([4.0, 1.0, 2.0, 3.0]).view(4, 1, 1), [0.01, 0.5, 0.99]).offsets.flatten().tolist() == [
        1,
        2.5,
        4,
    ]


def test_each_series_and_step_has_its_own_width():
    residuals = torch.randn(500, 2, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1.0, 2, 3], [10, 20, 30]]
    )
    intervals = learned(residuals, [0.1, 0.5, 0.9])
    width = intervals.offsets[..., 2] - intervals.offsets[..., 0]
    torch.testing.assert_close(width, 2.563 * torch.tensor([[1.0, 2, 3], [10, 20, 30]]), rtol=0.15, atol=0)


@pytest.mark.parametrize("size", [1, 7, 500])
def test_the_batch_size_changes_nothing(size):
    residuals = torch.randn(2500, 1, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(learned(residuals, [0.1, 0.5, 0.9], size).offsets, learned(residuals, [0.1, 0.5, 0.9]).offsets)


def test_fresh_values_are_covered():
    generator = torch.Generator().manual_seed(0)
    residuals, fresh = torch.randn(2, 1000, 2, 1, generator=generator).exp()  # lopsided: signed residuals matter
    quantiles = learned(residuals, [0.05, 0.5, 0.95])(torch.full_like(fresh, 3.0))
    inside = (3 + fresh >= quantiles[..., 0]) & (3 + fresh <= quantiles[..., 2])
    assert float(inside.double().mean()) == pytest.approx(0.9, abs=0.025)
    assert float((3 + fresh <= quantiles[..., 0]).double().mean()) == pytest.approx(0.05, abs=0.02)


def test_missing_values_are_not_residuals():
    residuals = torch.arange(1.0, 20.0).view(19, 1, 1).repeat(1, 2, 1)
    seen = torch.ones(19, 2, 1, dtype=torch.bool)
    seen[9:, 1] = False  # the second series keeps 1..9
    offsets = learned(residuals.masked_fill(~seen, 1e9), [0.1, 0.5, 0.9], observed=seen).offsets
    assert offsets[:, 0].tolist() == [[2, 10, 18], [1, 5, 9]]
    nothing = learned(residuals, [0.1, 0.5, 0.9], observed=torch.zeros_like(seen)).offsets
    assert nothing.flatten().tolist() == [0] * 6, "without any residual the interval is the forecast"
