"""Floors: what forecasting costs without a deep model. Every report prints them beside the model.

- last value: the horizon repeats the newest observation;
- seasonal naive: the horizon repeats the newest season;
- ridge: one closed-form linear map from the look-back to the horizon, shared by all series;
- optimum: generated data only, the error of the best possible forecast.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apps.timeseries.metrics import ForecastErrors
from apps.timeseries.windows import Windows
from core.training.data import Data
from core.training.recipe import Recipe

RIDGE_STRENGTH = 1e-4
"""Lambda per training row (values are standardised); fixed, so that the floor has nothing to tune."""
RIDGE_ROWS = 60_000
"""Training windows x series are thinned evenly to this number: more rows no longer move the third digit."""
BATCH = 256


def last_value(past: Tensor, horizon: int) -> Tensor:
    """Past [B, C, L] -> [B, C, H], the newest value repeated."""
    return past[..., -1:].expand(*past.shape[:-1], horizon)


def seasonal_naive(past: Tensor, horizon: int, season: int) -> Tensor:
    """Past [B, C, L] -> [B, C, H], the newest `season` values repeated; season <= L."""
    return past[..., -season:].repeat(1, 1, -(-horizon // season))[..., :horizon]


def ridge(past: Tensor, weights: Tensor) -> Tensor:
    """Past [B, C, L] times weights [L, H], with the window's mean removed before and added back after."""
    mean = past.mean(dim=-1, keepdim=True)
    return (past - mean) @ weights + mean


def fit_ridge(windows: Windows, strength: float = RIDGE_STRENGTH, most_rows: int = RIDGE_ROWS) -> Tensor:
    r"""Closed-form ridge over windows x series: \( W = (A^\top A + \lambda n I)^{-1} A^\top B \).

    A [n, L] are look-backs and B [n, H] horizons, both minus the mean of their look-back. Rows whose horizon holds
    unobserved values are left out.

    Args:
        windows: the training part; every origin is used, whatever its `stride` is.
        strength: lambda, per row.
        most_rows: thin evenly to at most this many rows.

    Returns:
        [L, H] float32. Memory: L * (L + H) doubles and one block of windows.
    """
    series, lookback = windows.values.shape[0], windows.lookback
    first, last = int(windows.origins[0]), int(windows.origins[-1])
    step = max(1, -(-(last - first + 1) * series // most_rows))
    gram = torch.zeros(lookback, lookback + windows.horizon, dtype=torch.float64)
    rows = 0
    both = windows.values.unfold(-1, lookback + windows.horizon, 1)
    seen = None if windows.observed is None else windows.observed.unfold(-1, windows.horizon, 1)
    # Series take turns: thinned by `step`, each series still gets its share.
    for channel in range(series):
        origins = torch.arange(first + channel % step, last + 1, step)
        for chosen in origins.split(8192):
            block = both[channel, chosen - lookback].double()
            if seen is not None:
                block = block[seen[channel, chosen].all(dim=-1)]
            block = block - block[:, :lookback].mean(dim=-1, keepdim=True)
            gram += block[:, :lookback].T @ block
            rows += len(block)
    left = gram[:, :lookback] + max(rows, 1) * strength * torch.eye(lookback, dtype=torch.float64)
    return torch.linalg.solve(left, gram[:, lookback:]).float()


def floors(recipe: Recipe, data: Data) -> dict[str, dict[str, float]]:
    """Metrics of every floor on all windows of the test part, by the same sums as the model's."""
    test: Any = data.test
    train: Any = data.train
    spec, horizon = data.spec, data.spec["horizon"]
    weights = fit_ridge(train)
    found = {
        "last_value": _score(test, spec, lambda past: last_value(past, horizon)),
        "ridge": _score(test, spec, lambda past: ridge(past, weights)),
    }
    season = spec["season"]
    if season is not None and season <= spec["lookback"]:
        found["seasonal_naive"] = _score(test, spec, lambda past: seasonal_naive(past, horizon, season))
    if test.best is not None:
        errors = ForecastErrors(spec["scaler"]["mean"], spec["scaler"]["std"], horizon)
        for index, origin in enumerate(test.origins.tolist()):
            errors.update(torch.from_numpy(test.best(origin).T)[None], test[index]["future"][None])
        found["optimum"] = errors.compute()
    return found


def _score(windows: Windows, spec: dict[str, Any], forecast: Callable[[Tensor], Tensor]) -> dict[str, float]:
    errors = ForecastErrors(spec["scaler"]["mean"], spec["scaler"]["std"], spec["horizon"])
    for chosen in torch.arange(len(windows)).split(BATCH):
        batch = windows.__getitems__(chosen.tolist())
        errors.update(forecast(batch["past"]), batch["future"], batch.get("observed"))
    return errors.compute()
