"""Forecast beyond the end of a user's file, from a checkpoint alone."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from apps.timeseries.clock import Clock
from apps.timeseries.data import reading_options
from apps.timeseries.plots import draw_forecast
from apps.timeseries.results import quantile_names
from apps.timeseries.table import Table, read_table
from apps.timeseries.task import ForecastTask
from apps.timeseries.windows import Scaler, fill_forward
from core.training.errors import UserError
from core.training.run import LoadedRun


def predict(run: LoadedRun, input: Path, output: Path) -> list[Path]:
    """Read a file like the one that the run was trained on and forecast what follows its last row.

    Writes a long CSV: unique_id (the series), origin (last row seen), ds (continues the file's dates or index), step,
    mean, and a column per quantile (q10, q50, q90), in the units of the file; and beside it a PNG fan chart. Quantiles
    come from the quantile output, or from the residuals of the validation part, see `intervals.py`.

    Args:
        run: the trained run; scaler, series, look-back and reading options come from its checkpoint.
        input: CSV or Parquet with the same series; other columns and their order do not matter.
        output: CSV to write.

    Returns:
        The two files.

    Raises:
        UserError: a series is missing, the frequency differs, the file is shorter than the look-back, or the output is
            no .csv file.
    """
    if output.suffix.lower() != ".csv":
        raise UserError(f"--output {output}: forecasts are written to a .csv file")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; a file is wanted")
    task, spec = run.task, run.spec
    assert isinstance(task, ForecastTask)
    table = read_table(input, reading_options(spec))
    _check_fits(table, spec, input)
    known = fill_forward(table.values)[-spec["lookback"] :]
    scaler = Scaler(**spec["scaler"])
    past = torch.from_numpy(scaler.standardise(known).astype(np.float32).T.copy())[None]
    with torch.no_grad():
        point, quantiles = task.forecast(past)
    levels, names = run.recipe.model.quantiles, quantile_names(run.recipe.model.quantiles)  # type: ignore[attr-defined]
    forecast = _long(table, spec["horizon"], scaler, point[0].double().numpy(), quantiles[0].double().numpy(), names)
    output.parent.mkdir(parents=True, exist_ok=True)
    forecast.to_csv(output, index=False, float_format="%.10g")
    rows = min(len(table.values), max(4 * spec["horizon"], 48))
    history = pd.DataFrame(table.values[-rows:], index=table.stamps[-rows:], columns=table.columns)
    return [output, draw_forecast(output.with_suffix(".png"), history, forecast, table.columns, levels, names)]


def _check_fits(table: Table, spec: dict, path: Path) -> None:
    trained = Clock(**spec["clock"])
    if (table.clock.kind == "date") != (trained.kind == "date"):
        with_dates, without = ("the run", path) if trained.kind == "date" else (path, "the run")
        raise UserError(f"{with_dates} has dates, {without} has none; use data of the same kind")
    if table.clock.kind == "date" and table.clock.frequency != trained.frequency:
        raise UserError(
            f"{path}: its rows are {table.clock.frequency} apart, the run was trained on {trained.frequency}"
        )
    if len(table.values) < spec["lookback"]:
        raise UserError(f"{path}: {len(table.values)} rows, the run needs a look-back of {spec['lookback']}")
    recent = table.values[-spec["lookback"] :]
    unseen = np.isnan(recent).all(axis=0)
    if unseen.any():
        raise UserError(
            f"{path}: column {table.columns[int(unseen.argmax())]!r} has no value in its last {len(recent)} rows"
        )


def _long(
    table: Table, horizon: int, scaler: Scaler, point: np.ndarray, quantiles: np.ndarray, names: list[str]
) -> pd.DataFrame:
    """A row per series and step, in the units of the file; point [C, H], quantiles [C, H, Q] are standardised."""
    last = table.stamps[-1]
    series = len(table.columns)
    columns = {
        "unique_id": np.repeat(table.columns, horizon),
        "origin": [last] * (series * horizon),
        "ds": np.tile(table.clock.after(last, horizon).to_numpy(), series),
        "step": np.tile(np.arange(1, horizon + 1), series),
        "mean": scaler.restore(point.T).T.ravel(),
    }
    columns |= {name: scaler.restore(quantiles[..., i].T).T.ravel() for i, name in enumerate(names)}
    return pd.DataFrame(columns)
