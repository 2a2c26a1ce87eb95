"""A generated series whose best possible error is known: seasons, echoes of events, and Gaussian noise.

    y[t] = season[t] + event[t] + event[t - lag] + noise[t]

An event is a bump that comes unannounced, and comes back once, `lag` steps later. With lag >= horizon every echo in the
horizon has its source in the past. So nobody can forecast better than season + echo + the rest of a bump that has
begun, and the error of that forecast, the noise and the new events, is the noise floor. A linear map of the look-back
repeats the noise together with the event; a model that recognises an event repeats the event alone.
"""

from dataclasses import dataclass

import numpy as np

from apps.timeseries.recipe import GeneratedSection

BUMP = np.hanning(10)[1:-1]
"""The shape of an event, 8 steps, height 1."""
HEIGHT = 8.0
"""Of an event, in standard deviations of the noise."""
RARITY = 80
"""Mean number of steps between two events."""


@dataclass(frozen=True)
class Generated:
    """values: the series; signal: the same without noise; starts: heights of events at their first step; all [T, C]."""

    values: np.ndarray
    signal: np.ndarray
    starts: np.ndarray

    def best_forecast(self, origin: int, horizon: int) -> np.ndarray:
        """[H, C]: the signal after row `origin`, less the events that begin there or later."""
        rows = slice(origin, origin + horizon)
        new = np.apply_along_axis(lambda starts: np.convolve(starts, BUMP)[:horizon], 0, self.starts[rows])
        return self.signal[rows] - new


def generate(options: GeneratedSection) -> Generated:
    """Make the series; the same options give the same numbers."""
    rng = np.random.default_rng(options.seed)
    rows, lag = options.rows, options.lag
    t = np.arange(rows)
    values, signal, starts = np.empty((3, rows, options.channels))
    for channel in range(options.channels):
        day, week = rng.uniform(0, 2 * np.pi, 2)
        season = 2 * np.sin(2 * np.pi * t / 24 + day) + np.sin(2 * np.pi * t / 168 + week)
        begins = rng.random(rows + lag) < 1 / RARITY
        heights = begins * np.where(rng.random(rows + lag) < 0.5, -1.0, 1.0) * HEIGHT * options.noise
        event = np.convolve(heights, BUMP)[: rows + lag]
        starts[:, channel] = heights[lag:]
        signal[:, channel] = season + event[lag:] + np.abs(event[:rows])
        values[:, channel] = signal[:, channel] + rng.normal(0, options.noise, rows)
    return Generated(values, signal, starts)
