"""Files that `test` leaves in the run folder: errors by step and by series, forecasts with dates, plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from apps.timeseries.metrics import ForecastErrors
from apps.timeseries.plots import draw_errors_by_series, draw_errors_by_step, draw_windows
from apps.timeseries.windows import Scaler


class Kept(NamedTuple):
    """One test window, standardised: past [C, L], future and forecast [C, H], quantiles [C, H, Q]."""

    origin: int
    past: np.ndarray
    future: np.ndarray
    forecast: np.ndarray
    quantiles: np.ndarray
    observed: np.ndarray | None = None


def write_results(
    run_dir: Path, spec: dict[str, Any], levels: Sequence[float], errors: ForecastErrors, kept: Sequence[Kept]
) -> list[Path]:
    """Write and draw; returns the files.

    errors_by_step.csv, errors_by_series.csv: mse, mae (standardised) and mse_raw, mae_raw (units of the file).
    forecasts.csv: every row of the test part once (origins one horizon apart, at most 1,000), in units of the file.
    """
    steps, series = errors.by_step(), errors.by_series(spec["columns"])
    windows = restore(kept, spec)
    origins = [spec["test_stamps"][window.origin - spec["test_from"]] for window in windows]
    plots = run_dir / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    files = [run_dir / name for name in ("errors_by_step.csv", "errors_by_series.csv", "forecasts.csv")]
    pd.DataFrame(steps).to_csv(files[0], index=False)
    pd.DataFrame(series).to_csv(files[1], index=False)
    table = pd.concat([_rows(window, spec, levels) for window in windows], ignore_index=True)
    table.to_csv(files[2], index=False, float_format="%.8g")
    return [
        *files,
        draw_errors_by_step(plots / "errors_by_step.png", steps),
        draw_errors_by_series(plots / "errors_by_series.png", series),
        draw_windows(plots / "windows.png", windows, origins, spec["columns"], levels),
    ]


def restore(kept: Sequence[Kept], spec: dict[str, Any]) -> list[Kept]:
    """The windows in the units of the file, in order of time; values that were not observed become NaN."""
    scaler = Scaler(**spec["scaler"])

    def back(values: np.ndarray) -> np.ndarray:
        return scaler.restore(values.T).T

    found = []
    for one in sorted(kept, key=lambda window: window.origin):
        future = back(one.future)
        if one.observed is not None:
            future = np.where(one.observed, future, np.nan)
        quantiles = np.stack([back(q) for q in np.moveaxis(one.quantiles, -1, 0)], axis=-1)
        found.append(Kept(one.origin, back(one.past), future, back(one.forecast), quantiles))
    return found


def quantile_names(levels: Sequence[float]) -> list[str]:
    """ "q10" for 0.1, "q2.5" for 0.025."""
    return [f"q{100 * level:.6g}" for level in levels]


def _rows(window: Kept, spec: dict[str, Any], levels: Sequence[float]) -> pd.DataFrame:
    """A row per series and step of one window."""
    series, horizon = window.forecast.shape
    at = window.origin - spec["test_from"]
    stamps = spec["test_stamps"][at : at + horizon]
    columns: dict[str, Any] = {
        "unique_id": np.repeat(spec["columns"], horizon),
        "origin": stamps[0],
        "ds": list(stamps) * series,
        "step": np.tile(np.arange(1, horizon + 1), series),
        "actual": window.future.ravel(),
        "mean": window.forecast.ravel(),
    }
    columns |= {name: window.quantiles[..., i].ravel() for i, name in enumerate(quantile_names(levels))}
    return pd.DataFrame(columns)
