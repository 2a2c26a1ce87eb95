"""Records of GenBank and EMBL files, read by Biopython, with their features as labels per base."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apps.genomics.data_section import DataSection
from apps.genomics.features import label_record
from apps.genomics.records import Record
from core.training.errors import UserError
from core.training.rows import open_text


def read_annotated(path: Path, form: str, options: DataSection, notes: dict[str, Any]) -> Iterator[Record]:
    """Records of a file; labels per base are those of `data.features`.

    Raises:
        UserError: it cannot be parsed, or holds no letters.
    """
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
        records, found = iter(SeqIO.parse(file, form)), False
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
                break
            found = True
            yield record
    if not found:
        raise UserError(f"{path}: there is no record in it that can be read as {form}")
