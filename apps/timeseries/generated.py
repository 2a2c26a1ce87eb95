"""A generated series whose best possible error is known: seasons, echoes of events, and Gaussian noise.

    y[t] = season[t] + event[t] + event[t - lag] + noise[t]

An event is a bump that comes unannounced, and once more, `lag` steps later. With lag >= horizon every echo in the
horizon has its source in the past, so the best forecast is season[t] + event[t - lag], and its error is the noise and
the new events, which nobody can know. A linear map of the look-back repeats the noise together with the event; a model
that recognises an event repeats the event alone.
"""

from typing import NamedTuple

import numpy as np

from apps.timeseries.recipe import GeneratedSection

BUMP = np.hanning(10)[1:-1]
"""The shape of an event, 8 steps, height 1."""
HEIGHT = 5.0
"""Of an event, in standard deviations of the noise."""
RARITY = 40
"""Mean number of steps between two events."""


class Generated(NamedTuple):
    """values [T, C] and the best forecast of each of them, optimal [T, C], both in the same units."""

    values: np.ndarray
    optimal: np.ndarray


def generate(options: GeneratedSection) -> Generated:
    """Make the series; the same options give the same numbers."""
    rng = np.random.default_rng(options.seed)
    t = np.arange(options.rows)
    values, optimal = np.empty((2, options.rows, options.channels))
    for channel in range(options.channels):
        day, week = rng.uniform(0, 2 * np.pi, 2)
        season = 2 * np.sin(2 * np.pi * t / 24 + day) + np.sin(2 * np.pi * t / 168 + week)
        starts = rng.random(options.rows + options.lag) < 1 / RARITY
        signs = np.where(rng.random(options.rows + options.lag) < 0.5, -1.0, 1.0)
        event = np.convolve(starts * signs, HEIGHT * options.noise * BUMP)[: options.rows + options.lag]
        optimal[:, channel] = season + event[: options.rows]
        values[:, channel] = optimal[:, channel] + event[options.lag :] + rng.normal(0, options.noise, options.rows)
    return Generated(values, optimal)
