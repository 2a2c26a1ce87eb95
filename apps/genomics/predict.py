"""Predictions for a user's file, from a checkpoint alone: what is written follows from task, input and suffix.

sequences (FASTA, table, BED + genome, ...)   a row per sequence; per-base tasks a track; language models perplexity
variants (.vcf, or a table with `mutant`)     scores, as a table or back into the VCF
predict.what=embeddings                       vectors with ids, .npz or .parquet
predict.what=mutagenesis                      a row per substitution
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from apps.genomics.inputs import batches, identities, input_items, read_input
from apps.genomics.items import Items
from apps.genomics.language import LanguageTask
from apps.genomics.mutagenesis import check_mutates, substitutions
from apps.genomics.perplexity import write_perplexity
from apps.genomics.recipe import GenomicsRecipe, PredictSection
from apps.genomics.records import Record
from apps.genomics.tables import write_table
from apps.genomics.task import BaseTask, GenomicsTask, SequenceTask
from apps.genomics.tracks import Track, write_tracks
from apps.genomics.variant_files import predict_variants
from apps.genomics.variants import is_variants
from apps.genomics.vectors import write_vectors
from core.training.run import LoadedRun


def predict(run: LoadedRun, input: Path, output: Path) -> list[Path]:
    """Read a file of sequences or variants and write what the run says of it.

    Args:
        run: the trained run; alphabet, tokens, lengths and classes come from its checkpoint.
        input: sequences in any form that training reads, or variants.
        output: table (.csv .tsv .jsonl .parquet), track (see `tracks.py`), vectors (.npz .parquet) or .vcf.

    Returns:
        The file.

    Raises:
        UserError: the input is not what the run can read, or the suffix of the output cannot hold the answer.
    """
    task, recipe = run.task, run.recipe
    assert isinstance(task, GenomicsTask)
    assert isinstance(recipe, GenomicsRecipe)
    settings = recipe.predict
    output.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        if is_variants(input):
            return [predict_variants(task, settings, run.spec, input, output)]
        records = read_input(run.spec, settings, input)
        return [_write(task, settings, records, output)]


def _write(task: GenomicsTask, settings: PredictSection, records: Sequence[Record], output: Path) -> Path:
    if settings.what == "mutagenesis":
        check_mutates(task)
        rows = (row for record in records for row in substitutions(task, settings, record))
        return write_table(output, rows)
    if settings.what != "predictions":
        return write_vectors(task, settings, records, output)
    if isinstance(task, LanguageTask):
        return write_perplexity(task, settings, records, output)
    items = input_items(task, records)
    if isinstance(task, SequenceTask):
        return write_table(output, _sequence_rows(task, records, items, settings))
    assert isinstance(task, BaseTask)
    classes = task.recipe.task == "tokens"
    tracks = list(_stitched(task, records, items, settings))
    return write_tracks(output, tracks, task.names if classes else ["value"], "classes" if classes else "values")


def _sequence_rows(
    task: SequenceTask, records: Sequence[Record], items: Items, settings: PredictSection
) -> list[dict[str, object]]:
    found = np.zeros((len(items), len(task.names)))
    for numbers, batch in batches(items, settings.batch_size):
        found[numbers] = task.predicted(batch).double().numpy()
    rows = []
    for row, values in zip(identities(records), found):
        if task.recipe.task == "classification":
            row["predicted"] = task.names[int(values.argmax())]
        elif task.recipe.task == "multilabel":
            row["predicted"] = ";".join(n for n, value in zip(task.names, values) if value >= 0.5) or "-"
        prefix = "" if task.recipe.task == "regression" else "p_"
        rows.append(row | {f"{prefix}{name}": float(value) for name, value in zip(task.names, values)})
    return rows


def _stitched(task: BaseTask, records: Sequence[Record], items: Items, settings: PredictSection) -> Iterator[Track]:
    """Answers of overlapping stretches put together: each base is answered where it stands farthest from an edge."""
    width = len(task.names) if task.recipe.task == "tokens" else 1
    found = [np.zeros((len(sequence), width), dtype=np.float32) for sequence in items.sequences]
    for numbers, batch in batches(items, settings.batch_size):
        items.stitch(found, numbers, task.predicted(batch).numpy().reshape(*batch["ids"].shape, width))
    yield from (Track(record, values) for record, values in zip(records, found))
