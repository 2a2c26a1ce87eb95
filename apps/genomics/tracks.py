"""Answers per base as files that genome browsers read, in the coordinates of the source.

.bedgraph .bg    a track per class (or of the number); neighbours with equal values are one line
.wig             the same, a value a line
.gff .gff3 .bed  stretches of one predicted class, with their mean probability
.fasta .fa       the predicted class as a letter per base, where classes are single letters
.npz             all values by id
.csv .tsv .parquet .jsonl   a row per base
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apps.genomics.features import NOTHING
from apps.genomics.records import Record
from apps.genomics.tables import TABLES, write_table
from core.training.errors import UserError

SUFFIXES = (".bedgraph", ".bg", ".wig", ".gff", ".gff3", ".bed", ".fasta", ".fa", ".npz", *TABLES)


@dataclass
class Track:
    """Values [L, K] of one record, in the direction of the sequence that was read."""

    record: Record
    values: np.ndarray

    def placed(self) -> tuple[str, int, np.ndarray]:
        """Contig, first base (from 0), and the values in the direction of the contig."""
        record = self.record
        values = self.values[::-1] if record.strand == "-" else self.values
        return record.contig or record.id, record.start, values


def write_tracks(path: Path, tracks: Sequence[Track], names: Sequence[str], kind: str) -> Path:
    """Write answers per base in the form that the suffix says.

    Args:
        names: of the K values.   kind: "classes" (values are probabilities) or "values".

    Raises:
        UserError: an unknown suffix, or a form that cannot hold this answer.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: answers per base are written as {' '.join(SUFFIXES)}")
    if suffix in TABLES:
        return write_table(path, _rows(tracks, names, kind))
    if suffix == ".npz":
        with path.open("wb") as file:
            np.savez_compressed(file, names=np.array(names), **{track.record.id: track.values for track in tracks})  # type: ignore[arg-type]
        return path
    if suffix in (".bedgraph", ".bg", ".wig"):
        lines = _wiggle(tracks, names) if suffix == ".wig" else _bedgraph(tracks, names)
    elif kind != "classes":
        raise UserError(f"{path}: numbers per base are written as .bedgraph .wig .npz or a table")
    elif suffix in (".gff", ".gff3"):
        lines = _gff(tracks, names)
    elif suffix == ".bed":
        lines = _bed(tracks, names)
    else:
        lines = _letters(path, tracks, names)
    with path.open("w") as file:
        file.writelines(f"{line}\n" for line in lines)
    return path


def stretches(classes: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(start, end, class) of runs of equal classes."""
    borders = np.flatnonzero(np.diff(classes)) + 1
    for start, end in zip([0, *borders.tolist()], [*borders.tolist(), len(classes)]):
        if end > start:
            yield start, end, int(classes[start])


def strand_of(name: str) -> str:
    """The strand that a class names, as CDS+ or CDS-2 do; else "."."""
    return next((sign for sign in "+-" if sign in name), ".")


def _shown(names: Sequence[str]) -> list[int]:
    return [at for at, name in enumerate(names) if name != NOTHING]


def _bedgraph(tracks: Sequence[Track], names: Sequence[str]) -> Iterator[str]:
    for column in _shown(names):
        yield f'track type=bedGraph name="{names[column]}"'
        for track in tracks:
            contig, first, values = track.placed()
            rounded = np.round(values[:, column].astype(np.float64), 4)
            borders = np.flatnonzero(np.diff(rounded)) + 1
            for start, end in zip([0, *borders.tolist()], [*borders.tolist(), len(rounded)]):
                yield f"{contig}\t{first + start}\t{first + end}\t{rounded[start]:g}"


def _wiggle(tracks: Sequence[Track], names: Sequence[str]) -> Iterator[str]:
    for column in _shown(names):
        yield f'track type=wiggle_0 name="{names[column]}"'
        for track in tracks:
            contig, first, values = track.placed()
            yield f"fixedStep chrom={contig} start={first + 1} step=1"  # WIG counts from 1
            yield from (f"{value:.4g}" for value in values[:, column])


def _calls(tracks: Sequence[Track], names: Sequence[str]) -> Iterator[tuple[str, int, int, str, float]]:
    for track in tracks:
        contig, first, values = track.placed()
        for start, end, chosen in stretches(values.argmax(1)):
            if names[chosen] != NOTHING:
                yield contig, first + start, first + end, names[chosen], float(values[start:end, chosen].mean())


def _turned(name: str, track_strand: str) -> str:
    sign = strand_of(name)
    return {"+": "-", "-": "+"}.get(sign, sign) if track_strand == "-" else sign


def _gff(tracks: Sequence[Track], names: Sequence[str]) -> Iterator[str]:
    yield "##gff-version 3"
    strands = {track.record.contig or track.record.id: track.record.strand for track in tracks}
    for contig, start, end, name, mean in _calls(tracks, names):
        kind = name.split("+")[0].split("-")[0] or name
        strand = _turned(name, strands[contig])
        yield f"{contig}\tlongspan\t{kind}\t{start + 1}\t{end}\t{mean:.4f}\t{strand}\t.\tclass={name}"


def _bed(tracks: Sequence[Track], names: Sequence[str]) -> Iterator[str]:
    strands = {track.record.contig or track.record.id: track.record.strand for track in tracks}
    for contig, start, end, name, mean in _calls(tracks, names):
        yield f"{contig}\t{start}\t{end}\t{name}\t{round(mean * 1000)}\t{_turned(name, strands[contig])}"


def _letters(path: Path, tracks: Sequence[Track], names: Sequence[str]) -> Iterator[str]:
    long = [name for name in names if len(name) != 1]
    if long:
        raise UserError(f"{path}: the class {long[0]!r} is not a single letter; write .gff, .bed, .bedgraph or a table")
    for track in tracks:
        yield f">{track.record.id}"
        yield "".join(str(names[at]) for at in track.values.argmax(1).tolist())


def _rows(tracks: Sequence[Track], names: Sequence[str], kind: str) -> Iterator[dict[str, object]]:
    for track in tracks:
        contig, first, values = track.placed()
        for at, row in enumerate(values):
            told: dict[str, object] = {"id": track.record.id, "contig": contig, "position": first + at + 1}
            if kind == "classes":
                told["predicted"] = names[int(row.argmax())]
            yield told | {f"p_{n}" if kind == "classes" else n: float(value) for n, value in zip(names, row)}
