"""A second class for files of positives alone: copies with random segments, or places of a genome."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from apps.genomics.data_section import PLAIN, DataSection
from apps.genomics.records import Record
from apps.genomics.sequences import read_records
from core.training.errors import UserError
from core.training.files import find_file

SEGMENTS, REPLACED = 20, 12
"""DeePromoter (Oubounyt et al. 2019): of 20 segments 12 are replaced by random letters, 8 stay where they are."""


def add_negatives(records: Sequence[Record], options: DataSection) -> list[Record]:
    """The records as class "positive", and as many of class "negative".

    Segments that stay keep part of the signal, and random letters have no composition: what counts k-mers sees most of
    the difference. Every report of such a set should name the rule.

    Raises:
        UserError: a sequence is too short to be cut into segments, or the genome too short to draw from.
    """
    random = np.random.default_rng(options.split_seed)
    for record in records:
        record.label, record.origin = "positive", record.id
    if options.negatives == "segments":
        return [*records, *(_replaced(record, random) for record in records)]
    given, public = options.negatives_from, options.negatives_file
    path = find_file(given, app="genomics", public=public, origin=options.origin, key="data.negatives_from")
    return [*records, *_places(records, str(path), random)]


def _replaced(record: Record, random: np.random.Generator) -> Record:
    text = record.sequence
    if len(text) < SEGMENTS:
        raise UserError(
            f"{record.where}: negatives=segments cuts {SEGMENTS} segments, the sequence has {len(text)} letters"
        )
    borders = np.linspace(0, len(text), SEGMENTS + 1).round().astype(int)
    segments = [text[a:b] for a, b in pairwise(borders)]
    for chosen in random.permutation(SEGMENTS)[:REPLACED]:
        segments[chosen] = "".join(random.choice(list("ACGT"), len(segments[chosen])))
    where, made = f"{record.where} (segments replaced)", "".join(segments)
    return Record(f"{record.id}-replaced", where, made, "negative", record.group, origin=record.id)


def _places(records: Sequence[Record], path: str, random: np.random.Generator) -> list[Record]:
    genome = read_records(path, PLAIN, labels=False).records
    longest = max(len(record.sequence) for record in records)
    contigs = [one for one in genome if len(one.sequence) > longest]
    if not contigs:
        raise UserError(f"{path}: no sequence is longer than the positives, which have up to {longest} letters")
    weights = np.array([len(one.sequence) for one in contigs], dtype=float)
    found = []
    for record in records:
        contig = contigs[int(random.choice(len(contigs), p=weights / weights.sum()))]
        start = int(random.integers(len(contig.sequence) - len(record.sequence)))
        text = contig.sequence[start : start + len(record.sequence)]
        found.append(
            Record(
                f"{record.id}-elsewhere",
                f"{contig.where}, base {start + 1}",
                text,
                "negative",
                record.group,
                contig=contig.id,
                start=start,
            )
        )
    return found
