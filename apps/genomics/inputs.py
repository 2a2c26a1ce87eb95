"""A user's file as what a trained run reads: records, stretches, batches, and who they are in the files written."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apps.genomics.alphabet import ALPHABETS
from apps.genomics.coding import encode, make_items
from apps.genomics.data_section import DataSection
from apps.genomics.items import Items
from apps.genomics.recipe import PredictSection
from apps.genomics.records import Record
from apps.genomics.sequences import SUFFIXES, form_of, read_records
from apps.genomics.task import GenomicsTask
from apps.genomics.words import by_position
from core.training.errors import UserError
from core.training.rows import kind

log = logging.getLogger(__name__)


def read_input(spec: dict[str, Any], settings: PredictSection, path: Path) -> list[Record]:
    """Records of the user's file, read as the training file was; labels are neither needed nor looked at.

    Ids that come twice are numbered, with a warning: what is predicted needs no clean list of examples.
    """
    options = DataSection(**spec["reading"])
    known = any(kind(path) in suffixes for suffixes in SUFFIXES.values())
    if known and kind(path) not in SUFFIXES.get(options.format or "", ()):
        options.format = None
    if options.min_quality is not None and form_of(str(path), options) != "fastq":
        options.min_quality = None
    if settings.reference is not None:
        options.reference = settings.reference
    options.duplicate_ids = "number"
    reading = read_records(str(path), options, labels=False)
    for what, count in reading.notes.items():
        log.warning("%s: %s: %s", path, what, count)
    return reading.records


def input_items(task: GenomicsTask, records: Sequence[Record]) -> Items:
    """The records as stretches of tokens."""
    alphabet = ALPHABETS[task.spec["tokens"]["alphabet"]]
    items = make_items(task.recipe, task.model.tokens, records, encode(records, alphabet), "predict")
    for stretch, length in zip(items.stretches, items.lengths):
        check_length(task, records[stretch.sequence], length)
    return items


def check_length(task: GenomicsTask, record: Record, length: int) -> None:
    """Refuse a sequence of a length that the model cannot read.

    Raises:
        UserError: `length_problem` says what.
    """
    problem = length_problem(task, length)
    if problem:
        raise UserError(f"{record.where}: {problem}")


def length_problem(task: GenomicsTask, length: int) -> str:
    """Why the model cannot read so many tokens at once; "" if it can."""
    if counts_positions(task) and length != task.spec["fixed"]:
        return f"{length} tokens, this model was built for sequences of {task.spec['fixed']}"
    if task.model.encoder.positions == "learned" and length > task.spec["longest"]:
        return f"{length} tokens, this model learned positions up to {task.spec['longest']}"
    return ""


def counts_positions(task: GenomicsTask) -> bool:
    """Whether the model reads sequences of one length alone."""
    model = task.recipe.model
    return task.spec["fixed"] is not None and (model.pool == "flat" or by_position(model.shortcut))


def batches(items: Items, size: int) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """All items in batches of similar length: (their numbers, the batch)."""
    order = np.argsort(items.lengths, kind="stable").tolist()
    for at in range(0, len(order), size):
        yield order[at : at + size], items.__getitems__(order[at : at + size])


def identities(records: Sequence[Record]) -> list[dict[str, object]]:
    """Id of each record, and its coordinates as in BED (start from 0, end excluded) if any record has some."""
    if not any(record.contig for record in records):
        return [{"id": record.id} for record in records]
    return [
        {"id": one.id, "contig": one.contig, "start": one.start, "end": one.end, "strand": one.strand}
        for one in records
    ]
