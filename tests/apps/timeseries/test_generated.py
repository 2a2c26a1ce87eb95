"""The demo's series: its best forecast is known, and nothing that sees the past alone can do better."""

import numpy as np
import pytest

from apps.timeseries.baselines import floors
from apps.timeseries.data import build_data
from apps.timeseries.generated import BUMP, HEIGHT, RARITY, generate
from apps.timeseries.recipe import GeneratedSection
from core.training.recipe import build_recipe


def test_the_same_options_give_the_same_numbers():
    options = GeneratedSection(rows=500, channels=2)
    assert np.array_equal(generate(options).values, generate(options).values)
    assert not np.array_equal(generate(options).values, generate(GeneratedSection(rows=500, channels=2, seed=1)).values)


def test_the_noise_is_gaussian_of_the_stated_size():
    made = generate(GeneratedSection(rows=20000, channels=1, noise=0.7))
    noise = made.values - made.signal
    assert np.std(noise) == pytest.approx(0.7, rel=0.02)
    assert abs(np.corrcoef(noise[1:, 0], noise[:-1, 0])[0, 1]) < 0.03


def test_an_event_comes_back_upright_after_the_lag():
    options = GeneratedSection(rows=3000, channels=1, lag=100)
    made = generate(options)
    begins = np.flatnonzero(made.starts[:, 0])
    begins = begins[begins + options.lag + len(BUMP) < options.rows]
    assert len(begins) > 10
    first = made.starts[begins[0], 0]
    assert abs(first) == HEIGHT * options.noise
    # Without seasons, events and echoes are all there is.
    events = np.convolve(made.starts[:, 0], BUMP)[: options.rows]
    echoes = np.abs(np.concatenate([np.zeros(options.lag), events[: -options.lag]]))
    season = made.signal[:, 0] - events - echoes
    rows = slice(options.lag + len(BUMP), None)  # the first echoes come from before the series
    hours = np.arange(options.rows)[rows]
    waves = np.stack([f(2 * np.pi * hours / p) for p in (24, 168) for f in (np.sin, np.cos)], axis=1)
    rest = season[rows] - waves @ np.linalg.lstsq(waves, season[rows], rcond=None)[0]
    assert np.abs(rest).max() < 1e-9


def test_the_best_forecast_knows_no_event_before_it_begins():
    made = generate(GeneratedSection(rows=3000, channels=1, lag=100))
    begin = int(np.flatnonzero(made.starts[:, 0])[5])
    before, during = made.best_forecast(begin, 20), made.best_forecast(begin + 2, 18)
    new = np.convolve(made.starts[begin : begin + 20, 0], BUMP)[:20]
    np.testing.assert_allclose(before[:, 0] + new, made.signal[begin : begin + 20, 0])
    assert np.abs(before[2:10] - during[:8]).max() > 0.5, "once it has begun, its rest is known"


def test_the_optimum_is_below_every_other_and_as_computed_by_hand():
    recipe = build_recipe(
        {
            "app": "timeseries",
            "data": {"generated": {"rows": 4000, "channels": 2, "lag": 60}, "lookback": 168, "horizon": 48},
        }
    )
    data = build_data(recipe)
    found = floors(recipe, data)
    assert found["optimum"]["mse"] < found["ridge"]["mse"] < found["seasonal_naive"]["mse"] < found["last_value"]["mse"]
    # Noise, and events that begin inside the horizon: step h sees min(h, 8) of the bump's squares, each with 1/RARITY.
    noise = 0.5
    seen = np.mean([np.sum(BUMP[: h + 1] ** 2) for h in range(48)])
    expected = noise**2 * (1 + HEIGHT**2 * seen / RARITY)
    assert found["optimum"]["mse_raw"] == pytest.approx(expected, rel=0.15)
