"""Labels per base from the features of GenBank, EMBL, GFF and BED: joins, strands, codon positions, origin wraps."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from apps.genomics.intervals import Place
from core.training.errors import UserError

NOTHING = "none"


def class_names(keys: Sequence[str], mode: str) -> list[str]:
    """Classes per base, "none" first: CDS; CDS+ CDS-; or CDS+1 CDS+2 CDS+3 CDS-1 CDS-2 CDS-3."""
    if mode == "key":
        return [NOTHING, *keys]
    if mode == "strand":
        return [NOTHING, *(f"{key}{strand}" for key in keys for strand in "+-")]
    return [NOTHING, *(f"{key}{strand}{at}" for key in keys for strand in "+-" for at in (1, 2, 3))]


def mirrored(names: Sequence[str]) -> list[int]:
    """Class of the other strand per class: + and - change places; a class without a counterpart keeps its own."""
    turned = [name.translate(str.maketrans("+-", "-+")) for name in names]
    return [names.index(other) if other in names else at for at, other in enumerate(turned)]


class Painter:
    """Paints features over a sequence; where two overlap, the one that came first stays, and the bases are counted."""

    def __init__(self, length: int, keys: Sequence[str], mode: str):
        self.keys, self.mode = list(keys), mode
        self.names = class_names(keys, mode)
        self.labels = np.zeros(length, dtype=np.int16)
        self.overlapped = self.painted = 0

    def paint(self, key: str, strand: str, positions: np.ndarray, skip: int = 0) -> None:
        """Positions [n] of one feature in the order in which it is read; `skip` bases precede its first codon."""
        if self.mode == "key":
            codes = np.full(len(positions), self.names.index(key))
        elif self.mode == "strand":
            codes = np.full(len(positions), self.names.index(f"{key}{strand or '+'}"))
        else:
            first = self.names.index(f"{key}{strand or '+'}1")
            codes = first + (np.arange(len(positions)) - skip) % 3
        free = self.labels[positions] == 0
        self.overlapped += int((~free).sum())
        self.painted += 1
        self.labels[positions[free]] = codes[free]


def label_record(record: Any, keys: Sequence[str], mode: str, where: str, notes: dict[str, Any]) -> np.ndarray:
    """Classes [L] of a Biopython record by its features.

    Raises:
        UserError: none of the keys occurs in the record, with those that do.
    """
    painter = Painter(len(record.seq), keys, mode)
    skipped = 0
    for feature in record.features:
        if feature.type not in keys or feature.location is None:
            continue
        try:
            # Biopython has the parts of a join in the order in which they are read, also on the reverse strand, and
            # a feature over the origin as two parts.
            positions = np.concatenate([_positions(int(p.start), int(p.end), p.strand) for p in feature.location.parts])
        except (TypeError, ValueError):  # a position that is unknown, or in another record
            skipped += 1
            continue
        if len(positions) == 0 or positions.min() < 0 or positions.max() >= len(record.seq):
            skipped += 1
            continue
        strand = "-" if feature.location.parts[0].strand == -1 else "+"
        start = feature.qualifiers.get("codon_start", ["1"])[0]
        painter.paint(feature.type, strand, positions, int(start) - 1 if start in ("1", "2", "3") else 0)
    if not painter.painted:
        have = ", ".join(sorted({feature.type for feature in record.features})) or "none"
        raise UserError(f"{where}: no feature {' or '.join(keys)} that can be placed; features there: {have}")
    _note(painter, skipped, notes)
    return painter.labels


def label_places(
    lengths: dict[str, int], places: Iterable[Place], keys: Sequence[str], mode: str, notes: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Classes [L] per contig by the intervals of a GFF or BED file; lines with one ID are one feature.

    Raises:
        UserError: an interval on an unknown contig or beyond its end, or none of the keys occurs.
    """
    painters = {name: Painter(length, keys, mode) for name, length in lengths.items()}
    features: dict[Any, list[Place]] = {}
    others = set()
    for at, place in enumerate(places):
        if place.key not in keys:
            others.add(str(place.key))
            continue
        if place.contig not in lengths:
            raise UserError(
                f"{place.where}: there is no sequence {place.contig!r}; there are {', '.join(list(lengths)[:5])}"
            )
        if place.end > lengths[place.contig]:
            raise UserError(
                f"{place.where}: {place.end} lies beyond {place.contig!r}, which has {lengths[place.contig]}"
            )
        features.setdefault((place.contig, place.key, place.parent) if place.parent else at, []).append(place)
    if not features:
        raise UserError(
            f"no feature {' or '.join(keys)} in the label file; there are {', '.join(sorted(others)) or 'none'}"
        )
    for parts in features.values():
        strand = -1 if parts[0].strand == "-" else 1
        parts.sort(key=lambda part: part.start * strand)
        painter = painters[parts[0].contig]
        positions = np.concatenate([_positions(part.start, part.end, strand) for part in parts])
        painter.paint(str(parts[0].key), parts[0].strand, positions, parts[0].phase)
    for painter in painters.values():
        _note(painter, 0, notes)
    return {name: painter.labels for name, painter in painters.items()}


def _positions(start: int, end: int, strand: int | None) -> np.ndarray:
    return np.arange(end - 1, start - 1, -1) if strand == -1 else np.arange(start, end)


def _note(painter: Painter, skipped: int, notes: dict[str, Any]) -> None:
    for name, count in (
        ("features used", painter.painted),
        ("bases in two features, given to the first", painter.overlapped),
        ("features that cannot be placed", skipped),
    ):
        if count:
            notes[name] = notes.get(name, 0) + count
