"""Rows of a table or of a list of records, whatever the file is; each knows where it stands.

CSV, TSV and other delimited text (with a header line), JSON lines and Parquet; text may be gzipped. Or a data set of
the Hugging Face hub, written "hub:organisation/name@configuration:split" ("@..." and ":..." may be missing; the split
is then "train"), see `hub`. Parquet files that the hub's library wrote know the names of their classes, too.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.attention.registry import nearest
from core.training.errors import UserError
from core.training.hub import HUB, load, named, undecoded

JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet", ".pq")
DELIMITED = (".csv", ".tsv", ".tab", ".txt")


@dataclass(frozen=True)
class Row:
    """One record.

    Attributes:
        where: for messages: "file.csv, line 12".
        values: column -> value; text files give strings, "" where a cell is empty.
    """

    where: str
    values: dict[str, Any]


def read_rows(
    source: str | Path, *, columns: Sequence[str] = (), on_bad: Callable[[str], None] | None = None
) -> Iterator[Row]:
    """Rows from first to last, read as they are asked for; the file itself is checked at once.

    Args:
        source: a file, or "hub:...".
        columns: that must be there. JSON lines are checked line by line, the other forms once.
        on_bad: takes one line about each row that cannot be read, which is then left out; None: that is an error.

    Raises:
        UserError: no such file, an unknown form, a missing column (with the nearest spelling), a bad row.
    """
    if str(source).startswith(HUB):
        return _hub(str(source), columns)
    path = Path(source).expanduser()
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"there is no file {path}{nearest(path.name, beside)}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; one file is wanted")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes)")
    suffix = kind(path)
    if suffix in PARQUET:
        return _parquet(path, columns)
    if suffix in JSON_LINES:
        return _json_lines(path, columns, on_bad)
    if suffix in DELIMITED:
        return _delimited(path, columns, on_bad)
    raise UserError(f"{path}: unknown form {suffix or 'without a suffix'}; known: .csv .tsv .txt .jsonl .parquet")


def kind(path: Path) -> str:
    """Suffix in lower case, that of the file inside where it is gzipped: ".fasta" for x.fasta.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def open_text(path: Path) -> io.TextIOBase:
    """A text file for reading, gzipped or not; UTF-8 with or without byte order mark.

    Raises:
        UserError: it cannot be opened. What is not UTF-8 shows while reading, see `decoding`.
    """
    try:
        if path.suffix.lower() == ".gz":
            return gzip.open(path, "rt", encoding="utf-8-sig", newline="")  # type: ignore[return-value]
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def decoding(path: Path, lines: Iterable[str]) -> Iterator[str]:
    """The same lines; bytes that are not UTF-8 text or not gzip become the user's error.

    Raises:
        UserError: naming the last good line.
    """
    number = 0
    try:
        for number, line in enumerate(lines, 1):  # noqa: B007 - the count is for the message
            yield line
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: after line {number}: not UTF-8 text; save it as UTF-8") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: after line {number}: not a whole gzip file ({error})") from error


def check_columns(where: str, there: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise UserError unless every wanted column is there."""
    for column in wanted:
        if column not in there:
            have = ", ".join(map(str, there)) or "none"
            raise UserError(f"{where}: there is no column {column!r}{nearest(column, there)}; columns: {have}")


def _delimited(path: Path, columns: Sequence[str], on_bad: Callable[[str], None] | None) -> Iterator[Row]:
    with open_text(path) as file:
        first = next(decoding(path, file), "")
    if "\0" in first:
        raise UserError(f"{path} is not text")
    counts = {delimiter: first.count(delimiter) for delimiter in ",\t;|"}
    # The suffix decides where it says something; else the character that the header has most of.
    delimiter = "\t" if kind(path) in (".tsv", ".tab") else max(counts, key=lambda one: counts[one])
    names = next(csv.reader([first], delimiter=delimiter), [])
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError(f"{path}: column {repeated[0]!r} is there twice")
    check_columns(str(path), names, columns)

    def rows() -> Iterator[Row]:
        # Whole documents and sequences stand in one cell: the limit of the csv module is 128 KiB.
        csv.field_size_limit(2**31 - 1)
        with open_text(path) as file:
            reader = csv.reader(decoding(path, file), delimiter=delimiter)
            next(reader)
            while True:
                line = reader.line_num + 1
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    raise UserError(f"{path}, line {line}: {error}") from error
                if cells is None:
                    return
                if not cells:
                    continue
                if len(cells) != len(names):
                    _bad(f"{path}, line {line}: {len(cells)} cells, the header has {len(names)}", on_bad)
                    continue
                yield Row(f"{path}, line {line}", dict(zip(names, cells)))

    return rows()


def _json_lines(path: Path, columns: Sequence[str], on_bad: Callable[[str], None] | None) -> Iterator[Row]:
    with open_text(path) as file:
        head = next((line for line in decoding(path, file) if line.strip()), "")
    if head.lstrip().startswith("["):
        raise UserError(f"{path}: a list; JSON lines are wanted, one object per line")

    def rows() -> Iterator[Row]:
        with open_text(path) as file:
            for number, line in enumerate(decoding(path, file), 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    values = json.loads(line)
                except json.JSONDecodeError as error:
                    _bad(f"{where}: not JSON: {error.msg} at column {error.colno}", on_bad)
                    continue
                if not isinstance(values, dict):
                    _bad(f"{where}: must be an object, got {type(values).__name__}", on_bad)
                    continue
                try:
                    check_columns(where, list(values), columns)
                except UserError as error:
                    _bad(str(error), on_bad)
                    continue
                yield Row(where, values)

    return rows()


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
    check_columns(str(path), file.schema_arrow.names, columns)
    features = None
    if b"huggingface" in (file.schema_arrow.metadata or {}):
        import datasets

        features = datasets.Features.from_arrow_schema(file.schema_arrow)

    def rows() -> Iterator[Row]:
        number = 0
        for batch in file.iter_batches(batch_size=256):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", values if features is None else named(values, features))

    return rows()


def _hub(source: str, columns: Sequence[str]) -> Iterator[Row]:
    found = undecoded(load(source))
    check_columns(source, found.column_names, columns)
    features = found.features
    return (Row(f"{source}, row {number}", named(dict(values), features)) for number, values in enumerate(found, 1))


def _bad(text: str, on_bad: Callable[[str], None] | None) -> None:
    if on_bad is None:
        raise UserError(text)
    on_bad(text)
