"""Time in a table: which column it is, how its dates are written, how far rows are apart, and which dates come next."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, cast

import numpy as np
import pandas as pd

from core.training.errors import UserError

# Columns that are time whatever they hold, and columns that are time only if they never step back:
# "month" is as often a calendar feature (1..12, again and again) as it is a date.
TIME_NAMES = ("date", "ds", "datetime", "timestamp", "time", "date_time", "index", "t", "step")
MAYBE_TIME_NAMES = ("month", "week", "day", "hour", "quarter", "year", "period", "unnamed: 0")


@dataclass(frozen=True)
class Clock:
    """How rows relate to time.

    Attributes:
        kind: "date"; "number" (an index that counts); "row" (the file has no time column).
        column: name of the time column, None for "row".
        frequency: step between rows: a pandas alias or "3 months" for dates, a number as text otherwise.
    """

    kind: Literal["date", "number", "row"]
    column: str | None = None
    frequency: str = "1"

    @property
    def season(self) -> int | None:
        """Steps of the nearest natural cycle: a day, a week, a year; None where there is none or no date."""
        if self.kind != "date":
            return None
        step = offset(self.frequency)
        months = (
            getattr(step, "months", 0)
            or {"MS": 1, "ME": 1, "QS": 3, "QE": 3, "YS": 12, "YE": 12}.get(
                self.frequency.lstrip("0123456789").split("-")[0], 0
            )
            * step.n
        )
        if months:
            return 12 // months if 12 % months == 0 and months < 12 else None
        if self.frequency == "B":
            return 5
        seconds = (
            pd.Timedelta(step).total_seconds() if isinstance(step, (pd.offsets.Tick, pd.offsets.Day)) else 7 * 86400
        )
        # A season of a second-by-second series is its hour: 86,400 steps would never fit a look-back.
        for cycle in (3600, 86400, 7 * 86400, 364 * 86400):
            steps = cycle / seconds
            if steps == int(steps) and steps >= 4 and (cycle > 3600 or seconds < 60):
                return int(steps)
        return None

    def after(self, last: Any, steps: int) -> pd.Index:
        """The `steps` stamps that follow `last`."""
        if self.kind == "date":
            return pd.date_range(pd.Timestamp(last), periods=steps + 1, freq=offset(self.frequency))[-steps:]
        step = float(self.frequency)
        numbers = float(last) + step * np.arange(1, steps + 1)
        return pd.Index(numbers.astype(np.int64) if step == int(step) and float(last).is_integer() else numbers)


def offset(frequency: str) -> pd.DateOffset:
    """The pandas offset of "h", "15min", "MS", ..., and of our own "1 months" (the same day each month)."""
    count, _, unit = frequency.partition(" ")
    if unit == "months":
        return pd.DateOffset(months=int(count))
    try:
        return pd.tseries.frequencies.to_offset(frequency)  # type: ignore[return-value]
    except ValueError as error:
        raise UserError(
            f"data.frequency={frequency!r} is not a frequency; use pandas aliases such as 15min, h, D, 7D, MS, QS"
        ) from error


def nearest(word: str, choices: Sequence[str]) -> str:
    """ " (did you mean 'OT'?)" when a choice is spelled like `word`, whatever the case; else the empty string."""
    plain = {choice.lower(): choice for choice in reversed(choices)}
    close = get_close_matches(word.lower(), plain, n=1, cutoff=0.5)
    return f" (did you mean {plain[close[0]]!r}?)" if close else ""


def find_time(frame: pd.DataFrame, name: str | None) -> tuple[str | None, pd.Index]:
    """The time column and its parsed stamps (DatetimeIndex or numbers), in file order; (None, row numbers) if none.

    Args:
        frame: the table as it was read.
        name: the column that the user named; None: search by name, then by content.

    Raises:
        UserError: the named column is absent or unreadable.
    """
    columns = [str(column) for column in frame.columns]
    if name is not None:
        if name not in columns:
            raise UserError(f"there is no time column {name!r}{nearest(name, columns)}; columns: {listed(columns)}")
        return name, read_stamps(column_of(frame, name), name)
    for column in (c for wanted in (TIME_NAMES, MAYBE_TIME_NAMES) for c in columns if c.strip().lower() in wanted):
        stamps = _stamps(column_of(frame, column), column)
        if column.strip().lower() in TIME_NAMES:
            return column, stamps if stamps is not None else read_stamps(column_of(frame, column), column)
        if stamps is not None and stamps.is_monotonic_increasing and stamps.is_unique:
            return column, stamps
    for column in columns:
        if not pd.api.types.is_numeric_dtype(frame[column]) and _dates(column_of(frame, column).head(20)) is not None:
            return column, read_stamps(column_of(frame, column), column)
    return None, pd.RangeIndex(len(frame))


def column_of(frame: pd.DataFrame, name: str) -> pd.Series:
    """One column, by a name that is there once."""
    return cast(pd.Series, frame[name])


def read_stamps(cells: pd.Series, name: str) -> pd.Index:
    """All cells of a time column as dates or numbers; the first unreadable one is named in the error."""
    empty = np.flatnonzero(cells.isna())
    if len(empty):
        raise UserError(f"time column {name!r}: row {empty[0] + 1} is empty")
    stamps = _stamps(cells, name)
    if stamps is not None:
        return stamps
    if _dates(cells.head(1)) is not None:
        for row in range(1, len(cells)):
            if _dates(cells.iloc[: row + 1].tail(1)) is None:
                raise UserError(f"time column {name!r}: row {row + 1}, {cells.iloc[row]!r} is not a date")
    raise UserError(
        f"time column {name!r}: {cells.iloc[0]!r} (row 1) is not a date in one format with the rest; "
        f"write dates as 2024-01-31 13:00"
    )


def _stamps(cells: pd.Series, name: str) -> pd.Index | None:
    if pd.api.types.is_datetime64_any_dtype(cells):
        return _naive(pd.DatetimeIndex(cells))
    if not pd.api.types.is_numeric_dtype(cells) or cells.isna().any():
        return _dates(cells)
    numbers = cells.to_numpy()
    whole = bool(np.all(numbers == np.round(numbers)))
    if whole and name.strip().lower() == "year" and numbers.min() > 1000 and numbers.max() < 3000:
        return pd.to_datetime(pd.Series(numbers).astype(int).astype(str), format="%Y").pipe(pd.DatetimeIndex)
    if whole and numbers.min() > 19000000 and numbers.max() < 22000000:
        return _dates(pd.Series(numbers).astype(int).astype(str))
    for unit, low in (("ns", 1e17), ("us", 1e14), ("ms", 1e11), ("s", 1e8)):  # seconds since 1970: 1e8 is 1973
        if whole and numbers.min() > low:
            return pd.DatetimeIndex(pd.to_datetime(numbers, unit=unit))
    return pd.Index(numbers)


def _dates(cells: pd.Series) -> pd.DatetimeIndex | None:
    """Dates in any one format. 3/4/2021 is read the way that keeps the steps even; month first if both do."""
    year_first = bool(cells.astype(str).str.match(r"\s*\d{4}").all())
    slashed = [how for how in ({}, {"dayfirst": True}) if not (year_first and how)]
    found = [dates for how in slashed if (dates := _parsed(cells, **how)) is not None]
    if found:
        return max(found, key=_evenness)
    exact = _parsed(cells, format="ISO8601")  # a midnight may be written without its time
    return exact if exact is not None else _parsed(cells, utc=True)  # offsets that change in summer


def _parsed(cells: pd.Series, **how: Any) -> pd.DatetimeIndex | None:
    with warnings.catch_warnings(record=True) as guesses:
        warnings.simplefilter("always")  # pandas warns where it guesses cell by cell, and we do not want guesses
        try:
            dates = _naive(pd.DatetimeIndex(pd.to_datetime(cells, **how)))
        except (ValueError, TypeError):
            return None
    return None if guesses or dates.hasnans else dates


def _naive(dates: pd.DatetimeIndex) -> pd.DatetimeIndex:
    return dates.tz_convert("UTC").tz_localize(None) if dates.tz is not None else dates


def _evenness(dates: pd.DatetimeIndex) -> float:
    steps = pd.Series(dates).diff().dropna()
    return float(steps.value_counts(normalize=True).iloc[0]) if len(steps) else 1.0


def infer_frequency(stamps: pd.Index) -> str:
    """The step between rows: the most common one, months by the calendar. `stamps` are sorted and unique.

    Example:
        >>> infer_frequency(pd.DatetimeIndex(["2024-01-01", "2024-02-01", "2024-03-01"]))
        'MS'
    """
    if not isinstance(stamps, pd.DatetimeIndex):
        steps = pd.Series(np.diff(stamps.to_numpy(dtype=float))).round(9)
        return f"{steps.mode().iloc[0]:.9g}" if len(steps) else "1"
    if len(stamps) < 2:
        raise UserError("one date is not enough to tell the frequency; give data.frequency, such as D or h")
    step = pd.Series(stamps).diff().dropna().mode().iloc[0]
    if step >= pd.Timedelta(days=28):
        months = int(pd.Series(stamps.year * 12 + stamps.month).diff().mode().iloc[0])
        if (stamps.day == 1).all():
            return f"{months if months > 1 else ''}MS"
        if stamps.is_month_end.all():
            return f"{months if months > 1 else ''}ME"
        if stamps.day.nunique() == 1:
            return f"{months} months"
    if step == pd.Timedelta(days=1) and len(stamps) >= 10 and (stamps.day_of_week < 5).all():
        return "B"
    if step % pd.Timedelta(days=1) == pd.Timedelta(0):
        return f"{step.days if step.days > 1 else ''}D"
    return str(pd.tseries.frequencies.to_offset(step).freqstr)  # type: ignore[union-attr]


def positions(stamps: pd.Index, clock: Clock) -> tuple[np.ndarray, pd.Index]:
    """Place of each stamp on the regular grid from the first to the last, and the grid itself.

    Raises:
        UserError: a stamp lies between two steps of the grid.
    """
    if isinstance(stamps, pd.DatetimeIndex):
        grid = pd.date_range(stamps[0], stamps[-1], freq=offset(clock.frequency))
        at = grid.get_indexer(stamps)
    else:
        numbers = stamps.to_numpy(dtype=float)
        exact = (numbers - numbers[0]) / float(clock.frequency)
        at = np.where(np.abs(exact - np.round(exact)) < 1e-3, np.round(exact), -1).astype(np.int64)
        grid = stamps[:1].append(clock.after(stamps[0], int(at.max()))) if at.max() > 0 else stamps
    off = np.flatnonzero(at < 0)
    if len(off):
        raise UserError(
            f"time column {clock.column!r}: steps are mostly {clock.frequency}, but {len(off)} of {len(stamps)} rows "
            f"lie between them (first: {written(stamps[off[0]])}); give data.frequency, or data.timestamps=as_is "
            f"to count rows only"
        )
    return at, grid


def written(stamp: Any) -> str:
    """A stamp as people write it: a date without its midnight, a number without its type."""
    if isinstance(stamp, pd.Timestamp):
        return f"{stamp:%Y-%m-%d}" if stamp == stamp.normalize() else str(stamp)
    return f"{stamp:g}" if isinstance(stamp, float) else str(stamp)


def listed(names: Sequence[str], most: int = 12) -> str:
    """The names with commas, the rest as a count."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
