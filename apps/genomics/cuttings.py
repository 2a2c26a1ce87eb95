"""Records cut out of a reference: by the rows of BED and GFF, or of a table with coordinates."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from apps.genomics.data_section import DataSection
from apps.genomics.intervals import Place, read_bed, read_gff
from apps.genomics.records import Record
from apps.genomics.reference import Reference
from apps.genomics.table import Columns
from core.training.errors import UserError

WIDENED = "widened over the end of a contig, filled with N"


def cut_rows(
    source: str,
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    columns: Columns,
    options: DataSection,
    notes: dict[str, Any],
) -> Iterator[Record]:
    """Records of a table of places (id, region, start, end, strand; from 0, half open), as Genomic Benchmarks has them.

    Raises:
        UserError: no reference is named, or a place that is not in it.
    """
    reference = _reference(options, source)
    for number, (where, values) in enumerate(rows, 1):
        row = columns.take(values, where, number)
        record = _cut(reference, row.id or f"row{number}", columns.place(values, where), options, notes)
        record.label, record.group, record.split = row.label, row.group or record.group, row.split
        yield record


def cut_intervals(
    path: Path, form: str, options: DataSection, notes: dict[str, Any], *, labels: bool
) -> Iterator[Record]:
    """Records of the rows of a BED or GFF file; the name or feature type is the label.

    Raises:
        UserError: as `cut_rows`.
    """
    reference = _reference(options, str(path))
    for place in (read_bed if form == "bed" else read_gff)(path):
        if form == "gff" and options.features is not None and place.key not in options.features:
            continue
        name = f"{place.contig}:{place.start}-{place.end}({place.strand or '.'})"
        record = _cut(reference, name, place, options, notes)
        record.label = place.key if labels else None
        yield record


def _reference(options: DataSection, source: str) -> Reference:
    if options.reference is None:
        raise UserError(f"{source} holds places, not sequences: name the genome, as in data.reference=genome.fa")
    return Reference.open(options.reference)


def _cut(reference: Reference, name: str, place: Place, options: DataSection, notes: dict[str, Any]) -> Record:
    start, end = place.start, place.end
    if options.width is not None:
        start = (start + end) // 2 - options.width // 2
        end = start + options.width
        if start < 0 or end > reference.length(place.contig, place.where):
            notes[WIDENED] = notes.get(WIDENED, 0) + 1
    strand, pad = place.strand or "+", options.width is not None
    letters = reference.fetch(place.contig, start, end, strand, place.where, pad=pad)
    return Record(name, place.where, letters, group=place.contig, contig=place.contig, start=start, strand=strand)
