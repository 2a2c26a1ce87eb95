"""Where the parts of a recipe come from, and what stands beside sequences: labels per base, masks, negatives."""

from pathlib import Path
from typing import Any

import numpy as np

from apps.genomics.data_section import PLAIN, DataSection, Files
from apps.genomics.features import label_places
from apps.genomics.intervals import read_bed, read_gff
from apps.genomics.negatives import add_negatives
from apps.genomics.records import Reading, Record
from apps.genomics.sequences import form_of, read_records
from core.training.errors import UserError
from core.training.files import find_file
from core.training.rows import HUB


def find_sources(options: DataSection) -> tuple[Files, Files | None, Files | None]:
    """Where train, val and test come from, as paths that are there."""

    def find(given: Files | None, public: Files | None, key: str) -> Files:
        if isinstance(given, dict):
            return {label: find(path, None, f"{key}.{label}") for label, path in given.items()}  # type: ignore[misc]
        if isinstance(given, str) and given.startswith(HUB):
            return given
        if given is None and isinstance(public, dict):
            return {label: find(None, path, key) for label, path in public.items()}  # type: ignore[misc]
        assert not isinstance(public, dict)
        return str(find_file(given, app="genomics", public=public, origin=options.origin, key=key))

    def perhaps(given: Files | None, key: str) -> Files | None:
        return None if given is None else find(given, None, key)

    if options.train is not None:
        return (
            find(options.train, None, "data.train"),
            perhaps(options.val, "data.val"),
            perhaps(options.test, "data.test"),
        )
    test = None if options.path is not None or options.test_file is None else find(None, options.test_file, "data.test")
    return find(options.path, options.file, "data.path"), None, test


def read_source(source: Files, options: DataSection, notes: dict[str, Any], *, labels: bool) -> Reading:
    """Records of one source with all that stands beside it: labels and masks per base, a second class.

    Args:
        notes: what is worth telling is added here.   labels: False where the task needs none.
    """
    reading = read_records(source, options, labels=labels)
    for name, value in reading.notes.items():
        notes[name] = notes[name] + value if name in notes else value
    if options.labels_path or options.labels_file:
        _add_labels(reading.records, options, notes)
    if options.mask_path or options.mask_file:
        _add_mask(reading.records, options)
    if options.negatives != "none":
        reading.records = add_negatives(reading.records, options)
    return reading


def _beside(options: DataSection, name: str) -> str:
    given, public = getattr(options, f"{name}_path"), getattr(options, f"{name}_file")
    return str(find_file(given, app="genomics", public=public, origin=options.origin, key=f"data.{name}_path"))


def _add_labels(records: list[Record], options: DataSection, notes: dict[str, Any]) -> None:
    """Labels per base from a second file: FASTA of label letters, or BED or GFF intervals."""
    path = _beside(options, "labels")
    form = form_of(path, PLAIN)
    if form in ("bed", "gff"):
        if options.features is None:
            raise UserError(f"{path}: say which rows are labels, by data.features=[...] (names in BED, types in GFF)")
        places = (read_bed if form == "bed" else read_gff)(Path(path))
        lengths = {record.id: len(record.sequence) for record in records}
        found = label_places(lengths, places, options.features, options.feature_labels, notes)
        for record in records:
            record.label = found[record.id]
        return
    reading = PLAIN.model_copy(update={"format": "fasta"})
    if options.labels_header is not None:
        marked = options.labels_header.replace("(?P<val>", "(?P<group>")
        reading.header = rf"(?=^(?P<id>\S+)).*{marked}"
    known = {record.id: record for record in read_records(path, reading).records}
    for record in records:
        labels = known.get(record.id)
        if labels is None:
            raise UserError(f"{record.where}: {path} has no labels for this id")
        record.label = labels.sequence
        if labels.split is not None:
            is_val = (labels.group or "").lower() in ("true", "1", "yes")
            record.split = "val" if is_val and labels.split == "train" else labels.split


def _add_mask(records: list[Record], options: DataSection) -> None:
    path = _beside(options, "mask")
    known = {
        record.id: record.sequence
        for record in read_records(path, PLAIN.model_copy(update={"format": "fasta"})).records
    }
    for record in records:
        mask = known.get(record.id)
        if mask is None or len(mask) != len(record.sequence) or set(mask) - {"0", "1"}:
            raise UserError(
                f"{record.where}: {path} needs one 0 or 1 per letter for this id, {len(record.sequence)} in all"
            )
        record.scored = np.frombuffer(mask.encode(), dtype=np.uint8) == ord("1")
