"""Tables that are written: CSV, TSV, JSON lines or Parquet by the suffix."""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from core.training.errors import UserError

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


def write_table(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    """Write rows with the same keys; a number is written with as many digits as it has in float32.

    Raises:
        UserError: another suffix.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLES:
        raise UserError(f"{path}: a table is written as {' '.join(TABLES)}")
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
        return path
    with path.open("w", newline="") as file:
        writer = None
        for row in rows:
            if suffix == ".jsonl":
                file.write(json.dumps(row) + "\n")
                continue
            if writer is None:
                delimiter = "," if suffix == ".csv" else "\t"
                writer = csv.DictWriter(file, list(row), delimiter=delimiter, lineterminator="\n")
                writer.writeheader()
            writer.writerow({key: f"{value:.7g}" if isinstance(value, float) else value for key, value in row.items()})
    return path
