"""Reading a table of series: from a CSV or Parquet file to checked numbers on a regular grid, with a report.

Every mistake in the file is one line that names row, column and cell; nothing is repaired without being asked for,
and what was repaired is counted in the report.
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from apps.timeseries.clock import Clock, column_of, find_time, infer_frequency, listed, nearest, positions, written
from apps.timeseries.recipe import DataSection
from core.training.errors import UserError

SUSPECTS = (-9999.0, -999.0, -99.0, 9999.0, 99999.0, -99999.0, 999999.0, 1e20)


@dataclass(frozen=True)
class Table:
    """Series side by side.

    Attributes:
        values: [T, C] float64; NaN where the file has no value.
        columns: C names.
        stamps: [T] dates, numbers of the index, or row numbers.
        clock: how the stamps go on.
        report: what was found and done, plain types: rows, frequency, gaps, missing, constants, warnings.
    """

    values: np.ndarray
    columns: list[str]
    stamps: pd.Index
    clock: Clock
    report: dict[str, Any]


def read_table(path: Path, options: DataSection) -> Table:
    """Read and check a file.

    Args:
        path: `.csv`, `.tsv`, `.txt` (delimiter found among , ; tab |) or `.parquet`.
        options: `time`, `targets`, `frequency`, `timestamps`, `missing`, `sentinels` are used.

    Raises:
        UserError: no file, no such column, a text cell among numbers, disorder, duplicates, missing values that no
            policy covers.
    """
    frame = _read_frame(path)
    if not len(frame):
        raise UserError(f"{path} has no rows")
    try:
        return build_table(frame, options, first_line=1 if path.suffix == ".parquet" else 2)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def build_table(frame: pd.DataFrame, options: DataSection, *, first_line: int = 2) -> Table:
    """The checks of `read_table` on a frame; `first_line` is the line of the file that holds row 1."""
    warnings: list[str] = []
    time, stamps = find_time(frame, options.time)
    numbers = _numbers(frame, time, options.targets, first_line, warnings)
    values = numbers.to_numpy(dtype=np.float64)
    stamps, order = _ordered(stamps, time, options.timestamps, frame, warnings)
    values = values[order]
    frequency = options.frequency or (infer_frequency(stamps) if time is not None else "1")
    kind = "row" if time is None else "date" if isinstance(stamps, pd.DatetimeIndex) else "number"
    clock = Clock(kind, time, frequency)
    rows_read = len(values)
    if time is not None and options.timestamps != "as_is":
        at, grid = positions(stamps, clock)
        full = np.full((len(grid), values.shape[1]), np.nan)
        full[at] = values
        values, stamps = full, grid
    values[np.isin(values, options.sentinels)] = np.nan
    if np.isinf(values).any():
        row, column = np.argwhere(np.isinf(values))[0]
        raise UserError(f"row {written(stamps[row])}, column {numbers.columns[column]!r} is infinite")
    columns = [str(column) for column in numbers.columns]
    report = {
        "rows": rows_read,
        "time": f"column {time!r}, {written(stamps[0])} to {written(stamps[-1])}"
        if time is not None
        else "none, rows are numbered",
        "frequency": frequency if time is not None else "one row",
        "gaps": _gaps(len(values) - rows_read, np.asarray(np.isnan(values).all(axis=1)), stamps),
        "missing": {c: int(n) for c, n in zip(columns, np.isnan(values).sum(axis=0)) if n},
        "constant": [c for c, column in zip(columns, values.T) if np.nanmax(column) == np.nanmin(column)]
        if not np.isnan(values).all(axis=0).any()
        else [],
        "warnings": warnings + _suspects(values, columns),
    }
    _refuse_missing(values, columns, stamps, len(values) - rows_read, options.missing)
    return Table(values, columns, stamps, clock, report)


def _read_frame(path: Path) -> pd.DataFrame:
    if not path.exists():
        folder = path.parent if path.parent.is_dir() else None
        names = [p.name for p in folder.iterdir()] if folder else []
        raise UserError(f"there is no file {path}{nearest(path.name, names) if names else ''}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; data.path must be one CSV or Parquet file")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes)")
    if path.suffix.lower() in (".parquet", ".pq"):
        try:
            frame = pd.read_parquet(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
        # A frame that was saved with its dates as index comes back with them there.
        return frame if isinstance(frame.index, pd.RangeIndex) else frame.reset_index()
    try:
        text = path.read_text(encoding="utf-8-sig")
        encoding = "utf-8-sig"
    except UnicodeDecodeError:
        text, encoding = path.read_text(encoding="cp1252", errors="replace"), "cp1252"
    if "\0" in text[:4096]:
        raise UserError(f"{path} is not text; data.path must be a CSV or Parquet file")
    head = text.splitlines()[:20]
    delimiter = max(",;\t|", key=head[0].count) if head else ","
    names = next(csv.reader(head[:1], delimiter=delimiter), [])
    repeated = sorted({name for name in names if name and names.count(name) > 1})
    has_header = not _all_numbers(names)
    if has_header and repeated:
        raise UserError(f"{path}: column {repeated[0]!r} is there twice")
    decimal = "," if delimiter == ";" and any(re.search(r"(^|;)\s*-?\d+,\d+\s*(;|$)", line) for line in head) else "."
    try:
        frame = pd.read_csv(
            path,
            sep=delimiter,
            decimal=decimal,
            header=0 if has_header else None,
            index_col=False,
            encoding=encoding,
            encoding_errors="replace",
            low_memory=False,
            skip_blank_lines=True,
            skipinitialspace=True,
        )
    except pd.errors.EmptyDataError as error:
        raise UserError(f"{path} has no columns") from error
    except pd.errors.ParserError as error:
        raise UserError(f"{path} is not a table: {str(error).strip().splitlines()[-1]}") from error
    frame.columns = [str(c).strip() if has_header else f"series_{c}" for c in frame.columns]
    return frame


def _all_numbers(names: list[str]) -> bool:
    """Whether the first line is data: numbers only, and not the count 0 1 2 ... that some writers use as names."""
    try:
        numbers = [float(name) for name in names]
    except ValueError:
        return False
    return bool(numbers) and numbers not in (list(range(len(numbers))), list(range(1, len(numbers) + 1)))


def _numbers(
    frame: pd.DataFrame, time: str | None, targets: list[str] | None, first_line: int, warnings: list[str]
) -> pd.DataFrame:
    """The target columns as numbers; text among them is an error, columns of text are left out by name."""
    columns = [str(c) for c in frame.columns if c != time]
    for target in targets or []:
        if target not in columns:
            what = "is the time column" if target == time else f"does not exist{nearest(target, columns)}"
            raise UserError(f"target column {target!r} {what}; columns: {listed(columns)}")
    kept, text = {}, []
    for column in targets or columns:
        cells = column_of(frame, column)
        if pd.api.types.is_numeric_dtype(cells):
            kept[column] = cells.astype(np.float64)
            continue
        numbers = pd.Series(pd.to_numeric(cells, errors="coerce"), dtype=np.float64)
        bad = np.asarray(numbers.isna() & cells.notna())
        # Mostly numbers: measurements with a slip among them. Otherwise a column of words, which nobody asked for.
        if targets is None and bad.sum() * 2 > cells.notna().sum():
            text.append(column)
            continue
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise UserError(
                f"row {row + 1} (line {row + first_line}), column {column!r}: {str(cells.iloc[row])!r} is not a number"
                + (f" ({bad.sum()} such cells in this column)" if bad.sum() > 1 else "")
            )
        kept[column] = numbers
    if text:
        warnings.append(f"columns without numbers left out: {listed(text)}")
    empty = [column for column, numbers in kept.items() if numbers.isna().all()]
    if targets is None and empty:
        warnings.append(f"empty columns left out: {listed(empty)}")
        kept = {column: numbers for column, numbers in kept.items() if column not in empty}
    elif empty:
        raise UserError(f"target column {empty[0]!r} has no values")
    if not kept:
        raise UserError(f"no column of numbers; columns: {listed([str(c) for c in frame.columns])}")
    return pd.DataFrame(kept)


def _ordered(
    stamps: pd.Index, time: str | None, policy: str, frame: pd.DataFrame, warnings: list[str]
) -> tuple[pd.Index, np.ndarray]:
    """Stamps in rising order without duplicates, and the rows that they come from; `policy` says what is allowed."""
    rows = np.arange(len(stamps))
    if time is None or policy == "as_is":
        return stamps, rows
    if policy == "repair":
        order = np.argsort(stamps.to_numpy(), kind="stable")
        moved = int((order != rows).sum())
        last = ~stamps[order].duplicated(keep="last")
        if moved:
            warnings.append(f"rows sorted by {time!r}: {moved} of {len(rows)} moved")
        if not last.all():
            warnings.append(f"{int((~last).sum())} rows with a repeated {time!r} dropped, the last of each kept")
        return stamps[order][last], order[last]
    way = "data.timestamps=repair"
    if not stamps.is_unique:
        second = int(np.flatnonzero(stamps.duplicated())[0])
        first = int(np.flatnonzero(stamps == stamps[second])[0])
        ids = [str(c) for c in frame.columns if c != time and not pd.api.types.is_numeric_dtype(frame[c])]
        hint = f"; if {ids[0]!r} names the series, turn it into one column per series" if ids else ""
        raise UserError(
            f"time column {time!r}: {written(stamps[second])} is there twice (rows {first + 1} and {second + 1}); "
            f"{way} keeps the last{hint}"
        )
    if not stamps.is_monotonic_increasing:
        if stamps.is_monotonic_decreasing:
            raise UserError(f"time column {time!r} runs from new to old; {way} turns it round")
        row = int(np.flatnonzero(np.diff(stamps.to_numpy()) < np.diff(stamps.to_numpy())[:1] * 0)[0]) + 1
        raise UserError(
            f"time column {time!r} is not sorted: row {row + 1} ({written(stamps[row])}) is older than row {row} "
            f"({written(stamps[row - 1])}); {way} sorts it"
        )
    return stamps, rows


def _gaps(absent: int, empty: np.ndarray, stamps: pd.Index) -> str:
    if not absent:
        return "none"
    starts = np.flatnonzero(empty & ~np.r_[False, empty[:-1]])
    ends = np.flatnonzero(empty & ~np.r_[empty[1:], False])
    longest = int((ends - starts + 1).max())
    return f"{absent} rows absent in {len(starts)} gaps, first at {written(stamps[starts[0]])}, longest {longest} rows"


def _suspects(values: np.ndarray, columns: list[str]) -> list[str]:
    """Numbers that look like "missing": a known marker that is a column's extreme and far from the rest."""
    found = []
    for name, column in zip(columns, values.T):
        for mark in SUSPECTS:
            count = int((column == mark).sum())
            rest = column[(column != mark) & ~np.isnan(column)]
            if not count or not len(rest):
                continue
            low, high = rest.min(), rest.max()
            if not low - 3 * (high - low) <= mark <= high + 3 * (high - low):
                found.append(
                    f"column {name!r} holds {mark:g} {count} times, far from the rest: if that means missing, "
                    f"say data.sentinels=[{mark:g}]"
                )
    return found


def _refuse_missing(values: np.ndarray, columns: list[str], stamps: pd.Index, absent: int, policy: str) -> None:
    holes = np.isnan(values)
    if policy != "error" or not holes.any():
        return
    row, column = (int(i) for i in np.argwhere(holes)[0])
    gaps = f", {absent} whole rows are absent" if absent else ""
    count, first = int(holes[:, column].sum()), written(stamps[row])
    raise UserError(
        f"column {columns[column]!r} has {count} missing values (first at {first}{gaps}), and data.missing=error; "
        f"data.missing=mask neither trains on nor scores them, data.missing=fill repeats the last value"
    )
