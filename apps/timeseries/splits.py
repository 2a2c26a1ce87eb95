"""Where a table is cut: the rows of the training, validation and test parts, in this order of time.

The rules are those of published work, to the row (zhouhaoyi/ETDataset, thuml/Time-Series-Library data_provider):
a part's *forecasts* lie inside it, its look-back may reach into the part before.
"""

from typing import NamedTuple

import pandas as pd

from apps.timeseries.clock import read_stamps, written
from apps.timeseries.recipe import DataSection
from core.training.errors import UserError

MONTH_HOURS = 30 * 24
ETT_MONTHS = (12, 16, 20)
"""Ends of train, validation and test in months of 30 days."""


class Borders(NamedTuple):
    """Row numbers: train [0, train), validation [train, val), test [val, test); rows from `test` on are unused."""

    train: int
    val: int
    test: int


def find_borders(options: DataSection, stamps: pd.Index) -> Borders:
    """The borders that `data.split` means for a table with these stamps.

    Raises:
        UserError: the table is too short for the preset, or a date lies outside of it.
    """
    rows = len(stamps)
    if options.split.startswith("ett_"):
        per_hour = 4 if options.split == "ett_minute" else 1
        borders = Borders(*(months * MONTH_HOURS * per_hour for months in ETT_MONTHS))
        if rows < borders.test:
            raise UserError(
                f"data.split={options.split} needs {borders.test} rows, the file has {rows}; use split=ratio"
            )
        return borders
    if options.split == "ratio":
        train = int(rows * options.train_share)
        return Borders(train, rows - int(rows * options.test_share), rows)
    val, test = (
        _row_of(str(text), name, stamps)
        for text, name in ((options.val_from, "val_from"), (options.test_from, "test_from"))
    )
    if not 0 < val < test < rows:
        raise UserError(
            f"data.val_from={options.val_from} and data.test_from={options.test_from} must be in this order and inside "
            f"the table, which runs from {written(stamps[0])} to {written(stamps[-1])}"
        )
    return Borders(val, test, rows)


def _row_of(text: str, name: str, stamps: pd.Index) -> int:
    """First row at or after a date, or after a number where the table has no dates."""
    dated = isinstance(stamps, pd.DatetimeIndex)
    try:
        at = read_stamps(pd.Series([text]), name)[0] if dated else float(text)
    except (UserError, ValueError) as error:
        what = "a date such as 2017-10-24" if dated else "a row number or index (the file has no dates)"
        raise UserError(f"data.{name} must be {what}, got {text!r}") from error
    return int(stamps.searchsorted(at))
