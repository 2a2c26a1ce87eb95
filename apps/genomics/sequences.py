"""Sequence files of every common form as one list of records, each of which knows where it stands.

FASTA, FASTQ, GenBank and EMBL are read by Biopython, tables by `core.training.rows`, intervals by `intervals.py`.
"""

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from apps.genomics.features import label_record
from apps.genomics.intervals import read_bed, read_gff
from apps.genomics.recipe import DataSection, Files
from apps.genomics.reference import Reference
from apps.genomics.table import arff_rows, find_columns, table_rows
from core.training.errors import UserError
from core.training.rows import decoding, kind, open_text

SUFFIXES = {
    "fasta": (".fa", ".fasta", ".fna", ".faa", ".ffn", ".frn", ".fas"),
    "fastq": (".fq", ".fastq"),
    "table": (".csv", ".tsv", ".tab", ".jsonl", ".ndjson", ".json", ".parquet", ".pq", ".data"),
    "genbank": (".gb", ".gbk", ".gbff", ".genbank"),
    "embl": (".embl",),
    "bed": (".bed",),
    "gff": (".gff", ".gff3"),
    "arff": (".arff",),
}


@dataclass
class Record:
    """One sequence.

    Attributes:
        id: unique within a file.   where: "genes.fa, record 3 'abc'", for messages.
        sequence: letters as they stand in the file.
        label: what the file says: text, a list of texts (several columns), or classes per base [L]; None: nothing.
        group, split: as columns or header say.
        contig, start, strand: where it comes from; start counts from 0, strand is + or -.
        scored: bool [L], the bases that count; None: all.
        origin: records made from one sequence share it, and are never split apart; None: it was not made.
        sites: positions of its letters in the parent, if the recipe reads a few alone.
    """

    id: str
    where: str
    sequence: str
    label: Any = None
    group: str | None = None
    split: str | None = None
    contig: str | None = None
    start: int = 0
    strand: str = "+"
    scored: np.ndarray | None = None
    origin: str | None = None
    sites: list[int] | None = None

    @property
    def end(self) -> int:
        """Where it ends on its contig, excluded."""
        return self.start + len(self.sequence)

    def position(self, at: int) -> int:
        """Position of letter `at` on the contig, or in the sequence if there is none, counted from 1."""
        if self.sites is not None:
            return self.sites[at]
        return self.end - at if self.strand == "-" else self.start + at + 1


@dataclass
class Reading:
    """Records of one source, with what is worth telling about the reading."""

    records: list[Record]
    notes: dict[str, Any] = field(default_factory=dict)


def read_records(source: Files, options: DataSection, *, labels: bool = True) -> Reading:
    """All records of a file, of a hub data set ("hub:..."), or of a mapping {label: file}.

    Args:
        labels: False for the files of `predict`, which need none.

    Raises:
        UserError: one line about anything that is wrong, with file, record and what would be right.
    """
    notes: dict[str, Any] = {}
    if isinstance(source, dict):
        records = []
        for label, path in source.items():
            for record in _read(path, options, notes, labels=False):
                record.label = label
                records.append(record)
    else:
        records = list(_read(source, options, notes, labels=labels))
    if not records:
        raise UserError(f"{source}: there is no sequence in it")
    _check_ids(records, options.duplicate_ids, notes)
    if options.sites is not None:
        for record in records:
            record.sequence, record.sites = _at_sites(record, options.sites), options.sites
    return Reading(records, notes)


def form_of(source: str, options: DataSection) -> str:
    """How a file is written: the recipe's word, else by its suffix, else by its first character.

    Raises:
        UserError: neither tells.
    """
    if options.format is not None:
        return options.format
    if source.startswith("hub:"):
        return "table"
    path = Path(source)
    suffix = kind(path)
    for form, suffixes in SUFFIXES.items():
        if suffix in suffixes:
            return form
    if suffix in (".bb", ".bigbed", ".bw", ".bigwig", ".bam", ".cram", ".2bit"):
        raise UserError(f"{path} is binary ({suffix}); convert it to BED or FASTA first")
    if suffix in (".txt", ""):
        with open_text(path) as file:
            first = next(decoding(path, file), "")
        if first.startswith(">"):
            return "fasta"
        if options.columns is not None or "\t" in first or "," in first:
            return "table"
        return "lines"
    known = " ".join(name for suffixes in SUFFIXES.values() for name in suffixes)
    raise UserError(f"{path}: unknown suffix {suffix!r}; say data.format=..., or use one of {known}")


def _read(source: str, options: DataSection, notes: dict[str, Any], *, labels: bool) -> Iterator[Record]:
    form = form_of(source, options)
    if form == "table":
        yield from _table(source, options, notes, labels)
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes)")
    if form in ("fasta", "fastq"):
        yield from _fast(path, form, options, labels)
    elif form == "lines":
        with open_text(path) as file:
            for number, line in enumerate(decoding(path, file), 1):
                if line.strip():
                    yield Record(f"line{number}", f"{path}, line {number}", line.strip())
    elif form in ("genbank", "embl"):
        yield from _annotated(path, form, options, notes)
    elif form == "arff":
        for row in arff_rows(path, options):
            yield Record(row.id or f"row{row.number}", row.where, row.sequence, row.label, row.group, row.split)
    else:
        yield from _intervals(path, form, options, notes, labels)


def _fast(path: Path, form: str, options: DataSection, labels: bool) -> Iterator[Record]:
    from Bio.SeqIO.FastaIO import SimpleFastaParser
    from Bio.SeqIO.QualityIO import FastqGeneralIterator

    pattern = re.compile(options.header) if options.header else None
    number = 0
    with open_text(path) as file:
        lines = iter(decoding(path, file))
        parser = SimpleFastaParser(_Lines(lines)) if form == "fasta" else FastqGeneralIterator(_Lines(lines))  # type: ignore[arg-type]
        try:
            for number, (title, sequence, *_) in enumerate(parser, 1):
                where = f"{path}, record {number}"
                found = _header(pattern, title, where, labels) if pattern else {}
                name = found.get("id") or (title.split() or [""])[0]
                if not name:
                    raise UserError(
                        f"{where}: the header has no id; write a name after {'>' if form == 'fasta' else '@'}"
                    )
                yield Record(
                    name, f"{where} {name!r}", sequence, found.get("label"), found.get("group"), found.get("split")
                )
        except ValueError as error:
            raise UserError(f"{path}, after record {number}: {error}") from error
    if not number:
        raise UserError(f"{path}: not a {form.upper()} file, it has no header line that starts with '>'")


class _Lines:
    """An iterator of lines that Biopython's parsers take for a text file."""

    def __init__(self, lines: Iterator[str]):
        self.lines = lines

    def __iter__(self) -> Iterator[str]:
        # Windows' line ends would become white space inside sequences.
        return (line.replace("\r\n", "\n") for line in self.lines)

    def readline(self) -> str:
        return next(self.lines, "").replace("\r\n", "\n")

    def read(self, size: int = -1) -> str:
        return "" if size == 0 else self.readline()


def _header(pattern: re.Pattern, title: str, where: str, labels: bool) -> dict[str, str | None]:
    match = pattern.search(title)
    if match is None:
        if not labels:  # a file to predict may have plain headers
            return {}
        raise UserError(f"{where}: data.header does not match {title[:60]!r}")
    return match.groupdict()


def _table(source: str, options: DataSection, notes: dict[str, Any], labels: bool) -> Iterator[Record]:
    rows, names = table_rows(source, options)
    columns = find_columns(names, options, source, labels)
    if columns.sequence is None:
        yield from _coordinates(source, rows, columns, options, notes)
        return
    for number, (where, values) in enumerate(rows, 1):
        row = columns.take(values, where, number)
        yield Record(row.id or f"row{number}", where, row.sequence, row.label, row.group, row.split)


def _coordinates(source: str, rows, columns, options: DataSection, notes: dict[str, Any]) -> Iterator[Record]:
    """A table of places (id, region, start, end, strand), as Genomic Benchmarks has them: 0-based, half open."""
    reference = _reference(options, source)
    for number, (where, values) in enumerate(rows, 1):
        row = columns.take(values, where, number)
        place = columns.place(values, where)
        yield _cut(reference, row.id or f"row{number}", place, options, notes, row.label, row.group, row.split)


def _intervals(path: Path, form: str, options: DataSection, notes: dict[str, Any], labels: bool) -> Iterator[Record]:
    reference = _reference(options, str(path))
    read = read_bed if form == "bed" else read_gff
    for place in read(path):
        if form == "gff" and options.features is not None and place.key not in options.features:
            continue
        name = f"{place.contig}:{place.start}-{place.end}({place.strand or '.'})"
        yield _cut(reference, name, place, options, notes, place.key if labels else None)


def _reference(options: DataSection, source: str) -> Reference:
    if options.reference is None:
        raise UserError(f"{source} holds places, not sequences: name the genome, as in data.reference=genome.fa")
    return Reference.open(options.reference)


def _cut(reference, name, place, options, notes, label=None, group=None, split=None) -> Record:
    start, end = place.start, place.end
    if options.width is not None:
        start = (start + end) // 2 - options.width // 2
        end = start + options.width
        if start < 0 or end > reference.length(place.contig, place.where):
            notes["widened over the end of a contig, filled with N"] = (
                notes.get("widened over the end of a contig, filled with N", 0) + 1
            )
    sequence = reference.fetch(
        place.contig, start, end, place.strand or "+", place.where, pad=options.width is not None
    )
    return Record(
        name, place.where, sequence, label, group or place.contig, split, place.contig, start, place.strand or "+"
    )


def _annotated(path: Path, form: str, options: DataSection, notes: dict[str, Any]) -> Iterator[Record]:
    for number, record in enumerate(parse_annotated(path, form, notes), 1):
        name = record.id if record.id and not record.id.startswith("<unknown") else record.name
        where = f"{path}, record {number} {name!r}"
        try:
            sequence = str(record.seq)
        except Exception as error:  # Biopython: UndefinedSequenceError, a private kind of ValueError
            raise UserError(f"{where}: the file names the sequence but does not hold it") from error
        label = None
        if options.features is not None:
            label = label_record(record, options.features, options.feature_labels, where, notes)
        yield Record(name, where, sequence, label, contig=name)


def parse_annotated(path: Path, form: str, notes: dict[str, Any]) -> Iterator[Any]:
    """Biopython's records of a GenBank or EMBL file; its warnings go to the notes, its errors become the user's."""
    from Bio import SeqIO

    with open_text(path) as file, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        records = iter(SeqIO.parse(file, form))
        while True:
            try:
                record = next(records, None)
            except Exception as error:  # its parsers raise ValueError, AssertionError, IndexError and others
                said = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(f"{path}: cannot be read as {form}: {said}") from error
            for warning in told:
                notes.setdefault("warnings of Biopython", []).append(str(warning.message).splitlines()[0])
            told.clear()
            if record is None:
                return
            yield record


def _at_sites(record: Record, sites: list[int]) -> str:
    if sites[-1] > len(record.sequence):
        raise UserError(
            f"{record.where}: data.sites names position {sites[-1]}, there are {len(record.sequence)} letters"
        )
    return "".join(record.sequence[site - 1] for site in sites)


def _check_ids(records: list[Record], duplicates: str, notes: dict[str, Any]) -> None:
    seen: dict[str, Record] = {}
    renamed = 0
    for record in records:
        if not record.sequence:
            raise UserError(f"{record.where}: the sequence is empty")
        if record.id in seen:
            if duplicates == "error":
                raise UserError(
                    f"{record.where}: the id {record.id!r} is there already, at {seen[record.id].where}; "
                    "rename it or say data.duplicate_ids=number"
                )
            number = 2
            while f"{record.id}#{number}" in seen:
                number += 1
            record.id, renamed = f"{record.id}#{number}", renamed + 1
        seen[record.id] = record
    if renamed:
        notes["duplicate ids numbered"] = renamed
