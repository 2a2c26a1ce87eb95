"""Tables with a sequence column: with or without a header line, ARFF, k-mer text; and which column is what."""

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from apps.genomics.data_section import DataSection
from apps.genomics.intervals import Place, place_of
from core.attention.registry import nearest
from core.training.errors import UserError
from core.training.rows import check_columns, decoding, kind, open_text, read_rows

KNOWN = {
    "sequence": ("sequence", "seq", "text", "primary"),
    "label": ("label", "target", "class", "labels"),
    "id": ("id", "name", "identifier"),
    "contig": ("chrom", "region", "chr", "contig", "seqid"),
}
"""Columns that are found by their names, whatever the case."""


@dataclass
class Taken:
    """What a row says of a record."""

    number: int
    where: str
    id: str | None
    sequence: str
    label: Any
    group: str | None
    split: str | None


@dataclass
class Columns:
    """Which column holds what; None: no such column."""

    sequence: str | None
    labels: list[str]
    id: str | None
    group: str | None
    split: str | None
    val: str | None
    contig: str | None
    several: bool

    def take(self, values: Mapping[str, Any], where: str, number: int) -> Taken:
        """Read a row."""
        labels = [_text(values.get(name)) for name in self.labels]
        label = labels if self.several else (labels[0] if labels else None)
        split = _text(values.get(self.split)) if self.split else None
        # A row of the training part may be set aside by a second column, as FLIP has it.
        if self.val and _text(values.get(self.val)).lower() in ("true", "1", "yes") and split in (None, "", "train"):
            split = "val"
        return Taken(
            number,
            where,
            _text(values.get(self.id)).strip() or None if self.id else None,
            plain_letters(_text(values.get(self.sequence))) if self.sequence else "",
            label,
            _text(values.get(self.group)) if self.group else None,
            split,
        )

    def place(self, values: Mapping[str, Any], where: str) -> Place:
        """The interval that a row names."""
        lowered = {str(name).lower(): value for name, value in values.items()}
        contig = _text(values.get(self.contig)) if self.contig else ""
        return place_of(where, contig, lowered["start"], lowered["end"], _text(lowered.get("strand", "+")))


def table_rows(source: str, options: DataSection) -> tuple[Iterator[tuple[str, Mapping[str, Any]]], list[str]]:
    """(where, {column: value}) of a table, and its columns; without a header line they are `data.columns`."""
    if options.columns is not None:
        return _headerless(Path(source).expanduser(), options.columns), options.columns
    rows = iter(read_rows(source))
    first = next(rows, None)
    if first is None:
        raise UserError(f"{source}: the table has a header and no rows")

    def both() -> Iterator[tuple[str, Mapping[str, Any]]]:
        yield first.where, first.values
        yield from ((row.where, row.values) for row in rows)

    return both(), list(first.values)


def _headerless(path: Path, names: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with open_text(path) as file:
        first = next(decoding(path, file), "")
    delimiter = "\t" if kind(path) in (".tsv", ".tab") else max(",\t;", key=first.count)
    with open_text(path) as file:
        csv.field_size_limit(2**31 - 1)
        for number, cells in enumerate(csv.reader(decoding(path, file), delimiter=delimiter), 1):
            if not cells:
                continue
            if len(cells) != len(names):
                raise UserError(f"{path}, line {number}: {len(cells)} cells, data.columns names {len(names)}")
            yield f"{path}, line {number}", dict(zip(names, cells))


def find_columns(names: list[str], options: DataSection, source: str, labels: bool = True) -> Columns:
    """Which column is what, by the recipe or by its name.

    Raises:
        UserError: a column that the recipe names is not there, or there is no sequence.
    """
    given = [options.label] if isinstance(options.label, str) else options.label
    wanted = [options.sequence, options.id if labels else None]
    if labels:
        wanted += [*(given or []), options.group, options.split_column, options.val_column]
    check_columns(source, names, [name for name in wanted if name is not None])
    contig = _found(names, "contig")
    sequence = options.sequence or _found(names, "sequence")
    if sequence is None and not (contig and {"start", "end"} <= {name.lower() for name in names}):
        near = nearest("sequence", names)
        raise UserError(
            f"{source}: there is no column with sequences{near}; columns: {', '.join(names)}; "
            "say data.sequence=COLUMN, or data.columns=[...] if the table has no header line"
        )
    one = _found(names, "label")
    return Columns(
        sequence,
        (given or ([one] if one else [])) if labels else [],
        options.id if options.id in names else _found(names, "id"),
        options.group if labels else None,
        options.split_column if labels else None,
        options.val_column if labels else None,
        contig,
        isinstance(options.label, list),
    )


def _found(names: list[str], what: str) -> str | None:
    lowered = {name.lower(): name for name in reversed(names)}
    return next((lowered[known] for known in KNOWN[what] if known in lowered), None)


def plain_letters(text: str) -> str:
    """The bare sequence of a cell: words of overlapping k-mers are put together, other white space is dropped."""
    words = text.split()
    k = len(words[0]) if words else 0
    # That two words of two letters overlap by one is more likely chance.
    several = len(words) > 2 if k == 2 else len(words) > 1 and k > 2
    if several and all(len(b) == k and a[1:] == b[:-1] for a, b in pairwise(words)):
        return words[0] + "".join(word[-1] for word in words[1:])
    return "".join(words)


def arff_rows(path: Path, options: DataSection) -> Iterator[Taken]:
    """Rows of an ARFF file whose sequence is one column, or all columns of single letters (as in UCI's splice).

    Raises:
        UserError: no data, a row with too few cells, no sequence.
    """
    names: list[str] = []
    letters: list[str] = []
    with open_text(path) as file:
        lines = enumerate(decoding(path, file), 1)
        for _, line in lines:
            word = line.strip()
            if word.lower().startswith("@data"):
                break
            found = re.match(r"@attribute\s+('[^']*'|\"[^\"]*\"|\S+)\s*(.*)", word, re.IGNORECASE)
            if found:
                name = found[1].strip("'\"")
                names.append(name)
                values = [value.strip().strip("'\"") for value in found[2].strip("{} ").split(",")]
                if found[2].startswith("{") and all(len(value) == 1 for value in values):
                    letters.append(name)
        if not names:
            raise UserError(f"{path}: not an ARFF file, it has no @attribute")
        bases = [options.sequence] if options.sequence else letters
        if not bases:
            raise UserError(f"{path}: no column of single letters; say data.sequence=COLUMN")
        rest = [name for name in names if name not in bases]
        label = options.label or _found(rest, "label") or (rest[-1] if rest else None)
        labels = [label] if isinstance(label, str) else list(label or [])
        name = options.id or _found(rest, "id") or next((one for one in rest if one not in labels), None)
        check_columns(str(path), names, [*bases, *labels, *([name] if name else [])])
        number = 0
        for at, line in lines:
            if not line.strip() or line.startswith("%"):
                continue
            number += 1
            cells = [cell.strip().strip("'\"") for cell in next(csv.reader([line]))]
            if len(cells) != len(names):
                raise UserError(f"{path}, line {at}: {len(cells)} cells, the header names {len(names)}")
            row = dict(zip(names, cells))
            told = [row[one] for one in labels]
            yield Taken(
                number,
                f"{path}, line {at}",
                row[name] if name else None,
                "".join(row[base] for base in bases),
                told if isinstance(options.label, list) else (told[0] if told else None),
                row[options.group] if options.group else None,
                row[options.split_column] if options.split_column else None,
            )


def _text(value: Any) -> str:
    return "" if value is None else str(value)
