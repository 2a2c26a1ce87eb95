"""Records of FASTA and FASTQ files, read by Biopython's parsers."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from apps.genomics.data_section import DataSection
from apps.genomics.records import Record
from core.training.errors import UserError
from core.training.rows import decoding, open_text

PHRED = 33
"""The character that stands for quality 0."""


def read_fasta(path: Path, form: str, options: DataSection, notes: dict[str, Any], *, labels: bool) -> Iterator[Record]:
    """Records of a file; label, group and part come from the header if `data.header` says how.

    Args:
        form: "fasta" or "fastq".   notes: counts what was read as N.   labels: False: headers need not match.

    Raises:
        UserError: no header line, no id, a header that does not match, a record that is cut off.
    """
    from Bio.SeqIO.FastaIO import SimpleFastaParser
    from Bio.SeqIO.QualityIO import FastqGeneralIterator

    pattern = re.compile(options.header) if options.header else None
    number, sign = 0, ">" if form == "fasta" else "@"
    with open_text(path) as file:
        lines = _Lines(decoding(path, file))
        parser = SimpleFastaParser(lines) if form == "fasta" else FastqGeneralIterator(lines)  # type: ignore[arg-type]
        try:
            for number, (title, sequence, *quality) in enumerate(parser, 1):
                where = f"{path}, record {number}"
                found = _header(pattern, title, where, labels) if pattern else {}
                name = found.get("id") or (title.split() or [""])[0]
                if not name:
                    raise UserError(f"{where}: the header has no id; write a name after {sign}")
                if quality and options.min_quality is not None:
                    sequence = _sure(sequence, quality[0], options.min_quality, notes)
                where = f"{where} {name!r}"
                yield Record(name, where, sequence, found.get("label"), found.get("group"), found.get("split"))
        except ValueError as error:
            raise UserError(f"{path}, record {number + 1}: {error}") from error
    if not number:
        raise UserError(f"{path}: not a {form.upper()} file, it has no header line that starts with {sign!r}")


def _sure(sequence: str, quality: str, least: int, notes: dict[str, Any]) -> str:
    """The sequence with N where the quality is too low."""
    low = np.frombuffer(quality.encode("latin-1"), dtype=np.uint8) < PHRED + least
    if low.any():
        told = f"bases of a quality below {least}, read as N"
        notes[told] = notes.get(told, 0) + int(low.sum())
    letters = np.frombuffer(sequence.encode("latin-1", "replace"), dtype=np.uint8)
    return np.where(low, ord("N"), letters).astype(np.uint8).tobytes().decode("latin-1")


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
