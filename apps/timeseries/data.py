"""From a recipe to train, validation and test windows, with everything that was found on the way."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from apps.timeseries.baselines import fit_ridge
from apps.timeseries.clock import Clock, written
from apps.timeseries.generated import Generated, generate
from apps.timeseries.recipe import DataSection, TimeSeriesRecipe
from apps.timeseries.splits import Borders, find_borders
from apps.timeseries.table import Table, read_table
from apps.timeseries.windows import Scaler, Windows, fill_forward
from core.training.data import Data
from core.training.errors import UserError
from core.training.files import find_file
from core.training.matrices import pack

READING = ("time", "targets", "frequency", "timestamps", "missing", "sentinels")
"""Options of `data` that say how a file is read; `predict` reads the next file in the same way."""


def build_data(recipe: TimeSeriesRecipe) -> Data:
    """Read or make the series, check them, and cut them into windows.

    Raises:
        UserError: one line for any mistake in the file, or a series too short for the windows.
    """
    options = recipe.data
    if options.generated is not None:
        made = generate(options.generated)
        stamps = pd.date_range("2024-01-01", periods=len(made.values), freq="h")
        names = [f"series_{c + 1}" for c in range(made.values.shape[1])]
        report = {"rows": len(made.values), "frequency": "h", "warnings": []}
        table = Table(made.values, names, stamps, Clock("date", "date", "h"), report)
        return cut(table, recipe, "generated", made)
    path = find_file(options.path, app=recipe.app, public=options.file, origin=options.origin)
    return cut(read_table(path, options), recipe, str(path))


def cut(table: Table, recipe: TimeSeriesRecipe, source: str, made: Generated | None = None) -> Data:
    """Windows of a checked table: borders, scaler from the training part alone, one tensor that all parts share."""
    options = recipe.data
    borders = find_borders(options, table.stamps)
    season = options.season or table.clock.season
    lookback, horizon = window_sizes(options, borders, season)
    check_lengths(borders, lookback, horizon)
    holes = np.isnan(table.values)
    unseen = holes[: borders.train].all(axis=0)
    if unseen.any():
        raise UserError(f"column {table.columns[int(unseen.argmax())]!r} has no value in the training part")
    # With missing=fill a filled value counts as real; with mask it is neither learned nor scored.
    known = fill_forward(table.values) if holes.any() else table.values
    masked = options.missing == "mask" and bool(holes.any())
    scaler = Scaler.fit(np.where(holes, np.nan, table.values)[: borders.train] if masked else known[: borders.train])

    values = _rows(scaler.standardise(known).astype(np.float32))
    observed = _rows(~holes) if masked else None
    best = None if made is None else lambda origin: scaler.standardise(made.best_forecast(origin, horizon))
    ends = {"train": (0, borders.train), "val": (borders.train, borders.val), "test": (borders.val, borders.test)}
    parts = {
        part: Windows(
            values,
            *rows,
            lookback,
            horizon,
            part=part,
            stride=options.train_stride if part == "train" else 1,
            observed=observed,
            best=best,
        )
        for part, rows in ends.items()
    }
    for part, windows in parts.items():
        if not len(windows):
            raise UserError(f"{source}: no window of the {part} part has an observed value to forecast")
    spec: dict[str, Any] = {
        "columns": table.columns,
        "scaler": {"mean": scaler.mean.tolist(), "std": scaler.std.tolist()},
        "clock": {"kind": table.clock.kind, "column": table.clock.column, "frequency": table.clock.frequency},
        "lookback": lookback,
        "horizon": horizon,
        "season": season,
        "reading": {name: getattr(options, name) for name in READING},
        # Of the test part alone, so that its forecasts carry dates also where the rows keep no regular step.
        "val_from": borders.train,
        "test_from": borders.val,
        "test_stamps": [written(stamp) for stamp in table.stamps[borders.val : borders.test]],
    }
    if recipe.model.shortcut == "ridge":
        spec["ridge"] = pack(fit_ridge(parts["train"]))
    summary = _summary(table, options, source, borders, parts, spec)
    return Data(parts["train"], parts["val"], parts["test"], spec=spec, summary=summary)


def window_sizes(options: DataSection, borders: Borders, season: int | None) -> tuple[int, int]:
    """Look-back and horizon; where the recipe leaves them open, from the season and the length of the parts.

    Horizon: one season (24 without one), at most 96 and three quarters of the validation part. Look-back: seven
    seasons, at most 512 and a third of the training part, whole seasons where one fits, at least the horizon.
    """
    cycle = season or 24
    horizon = options.horizon or max(1, min(cycle, 96, (borders.val - borders.train) * 3 // 4))
    if options.lookback is not None:
        return options.lookback, horizon
    longest = max(1, min(7 * cycle, 512, borders.train // 3))
    whole = longest // cycle * cycle or longest
    return max(whole, min(horizon, borders.train // 2), 1), horizon


def check_lengths(borders: Borders, lookback: int, horizon: int) -> None:
    """Refuse parts that hold no window.

    Raises:
        UserError: with the rows of each part and the largest sizes that fit.
    """
    rows = {"train": borders.train, "val": borders.val - borders.train, "test": borders.test - borders.val}
    have = ", ".join(f"{part} {count}" for part, count in rows.items())
    if rows["train"] < lookback + horizon:
        fits = max(0, rows["train"] - horizon)
        raise UserError(
            f"the series is too short: look-back {lookback} + horizon {horizon} = {lookback + horizon} rows do not fit "
            f"into the training part (rows: {have}); "
            + (f"data.lookback={fits} would" if fits else "use a smaller data.horizon")
        )
    for part in ("val", "test"):
        if rows[part] < horizon:
            raise UserError(
                f"the series is too short: a horizon of {horizon} does not fit into the {part} part (rows: {have}); "
                f"use data.horizon={rows[part]} or less, or another data.split"
            )


def reading_options(spec: dict[str, Any]) -> DataSection:
    """How the training file was read, with the target columns it had: for the files of `predict`."""
    return DataSection(**{**spec["reading"], "targets": spec["columns"]})


def _rows(values: np.ndarray) -> torch.Tensor:
    """[T, C] -> contiguous [C, T], so that a window of a series is a slice of memory."""
    return torch.from_numpy(np.ascontiguousarray(values.T))


def _summary(
    table: Table, options: DataSection, source: str, borders: Borders, parts: dict[str, Windows], spec: dict[str, Any]
) -> dict[str, Any]:
    total = len(table.stamps)
    ends = {"train": (0, borders.train), "val": (borders.train, borders.val), "test": (borders.val, borders.test)}
    stride = f", every {options.train_stride}th" if options.train_stride > 1 else ""
    counts = {part: f"{len(w)}{stride if part == 'train' else ''}" for part, w in parts.items()}
    return {
        "source": source,
        "series": len(table.columns),
        **table.report,
        "missing": table.report.get("missing") or "none",
        "missing_policy": options.missing,
        "split": options.split,
        "parts": {
            p: f"{written(table.stamps[a])} to {written(table.stamps[b - 1])} ({b - a} rows)"
            for p, (a, b) in ends.items()
        },
        "rows_unused": total - borders.test,
        "windows": counts,
        "lookback": spec["lookback"],
        "horizon": spec["horizon"],
        "season": spec["season"],
        "units": "mse, mae: training standard deviations (published convention); *_raw: units of the file",
    }
