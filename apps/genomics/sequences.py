"""Sequence files of every common form as one list of records, each of which knows where it stands.

FASTA and FASTQ are read in `fasta.py`, GenBank and EMBL in `annotated.py`, tables in `table.py`, BED, GFF and
coordinates in `cuttings.py`; here is what they have in common.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apps.genomics.annotated import read_annotated
from apps.genomics.cuttings import cut_intervals, cut_rows
from apps.genomics.data_section import DataSection, Files
from apps.genomics.fasta import read_fasta
from apps.genomics.records import Reading, Record
from apps.genomics.table import arff_rows, find_columns, plain_letters, table_rows
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
    if suffix in (".txt", "") and not path.is_dir():
        with open_text(path) as file:
            first = next(decoding(path, file), "")
        if first.startswith(">"):
            return "fasta"
        if options.columns is not None or "\t" in first or "," in first:
            return "table"
        return "lines"
    if path.is_dir():
        raise UserError(f"{path} is a folder; one file is wanted, or {{label: file, ...}}")
    known = " ".join(name for suffixes in SUFFIXES.values() for name in suffixes)
    raise UserError(f"{path}: unknown suffix {suffix!r}; say data.format=..., or use one of {known}")


def _read(source: str, options: DataSection, notes: dict[str, Any], *, labels: bool) -> Iterator[Record]:
    form = form_of(source, options)
    if options.min_quality is not None and form != "fastq":
        raise UserError(f"{source}: data.min_quality is for FASTQ, this file is read as {form}")
    if form == "table":
        yield from _table(source, options, notes, labels)
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes)")
    if form in ("fasta", "fastq"):
        yield from read_fasta(path, form, options, notes, labels=labels)
    elif form == "lines":
        with open_text(path) as file:
            for number, line in enumerate(decoding(path, file), 1):
                if line.strip():
                    yield Record(f"line{number}", f"{path}, line {number}", plain_letters(line))
    elif form in ("genbank", "embl"):
        yield from read_annotated(path, form, options, notes)
    elif form == "arff":
        for row in arff_rows(path, options):
            yield Record(row.id or f"row{row.number}", row.where, row.sequence, row.label, row.group, row.split)
    else:
        yield from cut_intervals(path, form, options, notes, labels=labels)


def _table(source: str, options: DataSection, notes: dict[str, Any], labels: bool) -> Iterator[Record]:
    rows, names = table_rows(source, options)
    columns = find_columns(names, options, source, labels)
    if columns.sequence is None:
        yield from cut_rows(source, rows, columns, options, notes)
        return
    for number, (where, values) in enumerate(rows, 1):
        row = columns.take(values, where, number)
        yield Record(row.id or f"row{number}", where, row.sequence, row.label, row.group, row.split)


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
