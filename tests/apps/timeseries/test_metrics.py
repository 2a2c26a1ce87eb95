"""Errors of forecasts: both units, every batch size, quantile scores against their definitions."""

import numpy as np
import pytest
import torch

from apps.timeseries.metrics import ForecastErrors, pinball

MEAN, STD = [10.0, -5.0], [2.0, 0.5]


def batch(windows: int = 11, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(windows, 2, 4, generator=generator) for _ in range(2))


def test_both_units_against_numpy():
    forecast, future = batch()
    errors = ForecastErrors(MEAN, STD, 4)
    errors.update(forecast, future)
    values = errors.compute()
    difference = (forecast.double() - future.double()).numpy()
    raw = difference * np.array(STD)[:, None]
    assert values["mse"] == pytest.approx(np.mean(difference**2), rel=1e-12)
    assert values["mae"] == pytest.approx(np.mean(np.abs(difference)), rel=1e-12)
    assert values["mse_raw"] == pytest.approx(np.mean(raw**2), rel=1e-12)
    assert values["mae_raw"] == pytest.approx(np.mean(np.abs(raw)), rel=1e-12)
    by_step = errors.by_step()
    assert [row["step"] for row in by_step] == [1, 2, 3, 4]
    assert by_step[2]["mse_raw"] == pytest.approx(np.mean(raw[:, :, 2] ** 2), rel=1e-12)
    by_series = errors.by_series(["a", "b"])
    assert by_series[1]["unique_id"] == "b"
    assert by_series[1]["mae_raw"] == pytest.approx(np.mean(np.abs(raw[:, 1])), rel=1e-12)


@pytest.mark.parametrize("size", [1, 3, 7, 11])
def test_the_batch_size_changes_nothing(size):
    # The trap of published code: a mean of batch means weighs the short last batch too much, or drops it.
    forecast, future = batch()
    whole, parts = ForecastErrors(MEAN, STD, 4), ForecastErrors(MEAN, STD, 4)
    whole.update(forecast, future)
    for one, other in zip(forecast.split(size), future.split(size)):
        parts.update(one, other)
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_unobserved_values_do_not_count():
    forecast, future = batch()
    seen = torch.rand(future.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    errors = ForecastErrors(MEAN, STD, 4)
    errors.update(forecast, torch.where(seen, future, 1e6), seen)
    expected = (forecast.double() - future.double())[seen].square().mean()
    assert errors.compute()["mse"] == pytest.approx(float(expected), rel=1e-12)


def test_pinball_by_hand():
    # Forecast 2, truth 5: three too low costs 3q; truth 0: two too high costs 2(1 - q).
    losses = pinball(torch.tensor([[2.0, 2.0], [2.0, 2.0]]), torch.tensor([5.0, 0.0]), torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(losses, torch.tensor([[0.3, 2.7], [1.8, 0.2]]))


def test_quantile_scores_of_known_quantiles():
    # A standard normal truth, and its own quantiles as forecast: coverage is the level, pinball of the median is
    # E|y|/2 = 0.39894, and of q10 and q90 0.17550 = the density at the quantile (Gneiting & Raftery 2007).
    future = torch.randn(40000, 1, 1, generator=torch.Generator().manual_seed(0))
    levels = [0.1, 0.5, 0.9]
    quantiles = torch.distributions.Normal(0, 1).icdf(torch.tensor(levels)).expand(40000, 1, 1, 3)
    errors = ForecastErrors([0.0], [3.0], 1, levels)
    errors.update(quantiles[..., 1], future, quantiles=quantiles)
    values = errors.compute()
    assert values["coverage_80"] == pytest.approx(0.8, abs=0.006)
    expected = (2 * 0.17550 + 0.39894) / 3
    assert values["pinball"] == pytest.approx(expected, rel=0.01)
    # WQL = 2 sum pinball / sum |y|, and E|y| = 0.79788: the scale 3 cancels.
    assert values["wql_raw"] == pytest.approx(2 * expected / 0.79788, rel=0.01)


def test_intervals_pair_levels_around_one_half():
    assert ForecastErrors([0.0], [1.0], 1, [0.05, 0.25, 0.5, 0.75, 0.95]).intervals() == [(0, 4), (1, 3)]
    assert ForecastErrors([0.0], [1.0], 1, [0.2, 0.5, 0.9]).intervals() == []
