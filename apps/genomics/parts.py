"""Records and codes of the training, validation and test part, whatever says which is which."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from apps.genomics.alphabet import Alphabet
from apps.genomics.coding import encode
from apps.genomics.data_section import DataSection, Files
from apps.genomics.generated import generate
from apps.genomics.recipe import LANGUAGE, GenomicsRecipe
from apps.genomics.records import Record
from apps.genomics.sources import find_sources, read_source
from apps.genomics.splits import PARTS, Span, set_aside, split_records

Part = tuple[list[Record], list[np.ndarray]]


def read_parts(recipe: GenomicsRecipe, alphabet: Alphabet, notes: dict[str, Any]) -> tuple[dict[str, Part], str]:
    """Records and codes of each part, and the name of their source; what is worth telling is added to the notes."""
    options = recipe.data
    if options.generated is not None:
        records = generate(options.generated)
        given = options.model_copy(update={"split": "given"})
        return _spans(records, encode(records, alphabet), given, alphabet), "generated"
    labels = recipe.task not in LANGUAGE
    train, val, test = find_sources(options)
    reading = read_source(train, options, notes, labels=labels)
    if test is None and val is None and options.train is None:
        codes = encode(reading.records, alphabet)
        return _spans(reading.records, codes, options, alphabet), _said(train)
    parts = {"train": reading, "val": None, "test": None}
    for part, source in (("val", val), ("test", test)):
        if source is not None:
            parts[part] = read_source(source, options, notes, labels=labels)
    found = {part: (one.records, encode(one.records, alphabet)) for part, one in parts.items() if one is not None}
    if "val" not in found:
        records, codes = found["train"]
        stay, aside = set_aside(records, codes, options, alphabet)
        found["train"] = ([records[n] for n in stay], [codes[n] for n in stay])
        found["val"] = ([records[n] for n in aside], [codes[n] for n in aside])
    return {part: found[part] for part in PARTS if part in found}, _said(train)


def _spans(
    records: Sequence[Record], codes: Sequence[np.ndarray], options: DataSection, alphabet: Alphabet
) -> dict[str, Part]:
    found: dict[str, Part] = {}
    for part, spans in split_records(records, codes, options, alphabet).items():
        if spans:
            pairs = [_stretch(records[span.record], codes[span.record], span) for span in spans]
            found[part] = ([record for record, _ in pairs], [one for _, one in pairs])
    return found


def _stretch(record: Record, codes: np.ndarray, span: Span) -> tuple[Record, np.ndarray]:
    if span.stop - span.start == len(codes):
        return record, codes
    piece, label = slice(span.start, span.stop), record.label
    if isinstance(label, str) and len(label) != len(codes) == len(label.split()):
        label = label.split()  # numbers per base
    start = record.end - span.stop if record.strand == "-" else record.start + span.start
    record = dataclasses.replace(
        record,
        sequence=record.sequence[piece],
        label=label[piece] if label is not None and len(label) == len(codes) else label,
        contig=record.contig or record.id,
        start=start,
        scored=None if record.scored is None else record.scored[piece],
    )
    return record, codes[piece]


def _said(source: Files) -> str:
    return ", ".join(f"{label}: {path}" for label, path in source.items()) if isinstance(source, dict) else str(source)
