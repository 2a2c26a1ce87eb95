"""Predictions for a user's file, from a checkpoint alone: what is written follows from task, input and suffix.

sequences (FASTA, table, BED + genome, ...)   a row per sequence; per-base tasks a track; language models perplexity
variants (.vcf, or a table with `mutant`)     scores, as a table or back into the VCF
predict.what=embeddings                       vectors with ids, .npz or .parquet
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apps.genomics.alphabet import ALPHABETS
from apps.genomics.data import encode, make_items
from apps.genomics.items import Items
from apps.genomics.language import LanguageTask
from apps.genomics.recipe import DataSection, GenomicsRecipe, PredictSection
from apps.genomics.scoring import embedded, likelihood
from apps.genomics.sequences import SUFFIXES as FORMS
from apps.genomics.sequences import Record, read_records
from apps.genomics.stream import check_streams, stream_nats
from apps.genomics.tables import write_table
from apps.genomics.task import BaseTask, GenomicsTask, SequenceTask
from apps.genomics.tracks import SUFFIXES as TRACKS
from apps.genomics.tracks import Track, write_tracks
from apps.genomics.variant_files import predict_variants
from apps.genomics.variants import is_variants
from core.training.errors import UserError
from core.training.rows import kind
from core.training.run import LoadedRun

log = logging.getLogger(__name__)
VECTORS = (".npz", ".parquet")


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
        if settings.what != "predictions":
            return [_embeddings(task, recipe, records, output)]
        if isinstance(task, LanguageTask):
            return [_language(task, recipe, records, output)]
        items = _items(task, recipe, records)
        if isinstance(task, SequenceTask):
            return [write_table(output, _sequence_rows(task, records, items, settings))]
        assert isinstance(task, BaseTask)
        classes = recipe.task == "tokens"
        tracks = list(_stitched(task, records, items, settings))
        names = task.names if classes else ["value"]
        return [write_tracks(output, tracks, names, "classes" if classes else "values")]


def read_input(spec: dict[str, Any], settings: PredictSection, path: Path) -> list[Record]:
    """Records of the user's file, read as the training file was; labels are neither needed nor looked at."""
    options = DataSection(**spec["reading"])
    known = any(kind(path) in suffixes for suffixes in FORMS.values())
    if known and kind(path) not in FORMS.get(options.format or "", ()):
        options.format = None
    if settings.reference is not None:
        options.reference = settings.reference
    return read_records(str(path), options, labels=False).records


def _items(task: GenomicsTask, recipe: GenomicsRecipe, records: Sequence[Record]) -> Items:
    alphabet = ALPHABETS[task.spec["tokens"]["alphabet"]]
    items = make_items(recipe, task.model.tokens, records, encode(records, alphabet), "predict")
    if isinstance(task, SequenceTask):
        for record, length in zip(records, items.lengths):
            check_length(task, record, length)
    return items


def check_length(task: GenomicsTask, record: Record, length: int) -> None:
    """Refuse a sequence of another length than the model was built for, where it was built for one.

    Raises:
        UserError: it has `length` tokens, and position counts.
    """
    fixed, model = task.spec["fixed"], task.recipe.model
    if fixed not in (None, length) and (model.pool == "flat" or model.shortcut == "position"):
        raise UserError(f"{record.where}: {length} tokens, this model was built for sequences of {fixed}")


def batches(items: Items, size: int) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """All items in batches of similar length: (their numbers, the batch)."""
    order = np.argsort(items.lengths, kind="stable").tolist()
    for at in range(0, len(order), size):
        yield order[at : at + size], items.__getitems__(order[at : at + size])


def _sequence_rows(
    task: SequenceTask, records: Sequence[Record], items: Items, settings: PredictSection
) -> list[dict[str, object]]:
    found = np.zeros((len(items), len(task.names)))
    for numbers, batch in batches(items, settings.batch_size):
        found[numbers] = task.predicted(batch).double().numpy()
    placed = any(record.contig for record in records)
    rows = []
    for record, values in zip(records, found):
        row: dict[str, object] = {"id": record.id}
        if placed:
            end = record.start + len(record.sequence)
            row |= {"contig": record.contig, "start": record.start, "end": end, "strand": record.strand}
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
        answers = task.predicted(batch).numpy().reshape(*batch["ids"].shape, width)
        for number, answer in zip(numbers, answers):
            s = items.stretches[number]
            found[s.sequence][s.first : s.last] = answer[s.first - s.start : s.last - s.start]
    yield from (Track(record, values) for record, values in zip(records, found))


def _language(task: LanguageTask, recipe: GenomicsRecipe, records: Sequence[Record], output: Path) -> Path:
    """Perplexity per record, or bits of every base as a track."""
    settings, tokens = recipe.predict, task.model.tokens
    as_track = output.suffix.lower() in TRACKS and output.suffix.lower() not in (".csv", ".tsv", ".jsonl", ".parquet")
    if as_track and not tokens.is_char:
        raise UserError(f"{output}: a value per base needs a model of letters; this one reads {tokens.word}")
    if settings.stream:
        check_streams(task)
        alphabet = ALPHABETS[task.spec["tokens"]["alphabet"]]
        sequences = [tokens.encode(codes) for codes in encode(records, alphabet)]
        nats = [stream_nats(task, torch.from_numpy(s.astype(np.int64)), settings.chunk).numpy() for s in sequences]
    else:
        items = _items(task, recipe, records)
        sequences = items.sequences
        nats = _stretch_nats(task, items, settings)
    if as_track:
        tracks = [Track(record, values[:, None] / np.log(2)) for record, values in zip(records, nats)]
        return write_tracks(output, tracks, ["bits"], "values")
    prefix = "" if task.causal else "masked_"
    rows = []
    for record, ids, values in zip(records, sequences, nats):
        asked = ids < tokens.targets
        bases = int(tokens.bases[ids[asked]].sum())
        each = float(values.sum()) / max(1, bases)
        rows.append(
            {"id": record.id, "bases": len(record.sequence), "asked": bases, f"{prefix}nats_per_base": each}
            | {f"{prefix}bits_per_base": each / float(np.log(2)), f"{prefix}perplexity": float(np.exp(each))}
        )
    return write_table(output, rows)


def _stretch_nats(task: LanguageTask, items: Items, settings: PredictSection) -> list[np.ndarray]:
    """Nats of every token; a masked model is asked each once, in rounds that mask a share of them."""
    found = [np.zeros(len(sequence)) for sequence in items.sequences]
    generator = torch.Generator().manual_seed(0)
    for numbers, batch in batches(items, settings.batch_size):
        ids, mask = batch["ids"], batch["mask"]
        if task.causal:
            nats = -likelihood(task, ids, mask)
        else:
            rounds = round(1 / task.recipe.model.mask_share)
            turn = torch.rand(ids.shape, generator=generator).argsort(1) % rounds
            nats = torch.zeros(ids.shape)
            for now in range(rounds):
                asked = mask & (turn == now) & (ids < task.model.tokens.targets)
                logits = task.model(torch.where(asked, task.model.tokens.mask, ids), mask).float().log_softmax(-1)
                chosen = ids.clamp(max=logits.shape[-1] - 1).unsqueeze(-1)
                nats = torch.where(asked, -logits.gather(-1, chosen).squeeze(-1), nats)
        for number, row in zip(numbers, nats.numpy()):
            s = items.stretches[number]
            found[s.sequence][s.first : s.last] = row[s.first - s.start : s.last - s.start]
    return found


def _embeddings(task: GenomicsTask, recipe: GenomicsRecipe, records: Sequence[Record], output: Path) -> Path:
    settings = recipe.predict
    suffix, per_token = output.suffix.lower(), settings.what == "token_embeddings"
    if suffix not in VECTORS or (per_token and suffix != ".npz"):
        raise UserError(f"{output}: embeddings are written as .npz{'' if per_token else ' or .parquet'}")
    items = _items(task, recipe, records)
    width = task.model.encoder.dim
    sums = np.zeros((len(records), width))
    each = [np.zeros((len(s), width), dtype=np.float32) for s in items.sequences] if per_token else []
    counts = np.zeros(len(records))
    for numbers, batch in batches(items, settings.batch_size):
        ids, mask = batch["ids"], batch["mask"]
        if settings.layer == "input":
            x = task.model.embedded(ids, mask).float()
        elif not per_token and len(items) == len(records):
            sums[numbers] += embedded(task, ids, mask).double().numpy()
            counts[numbers] += 1
            continue
        else:
            x = task.model.hidden(ids, mask).float()
        for number, vectors in zip(numbers, x.numpy()):
            s = items.stretches[number]
            scored = vectors[s.first - s.start : s.last - s.start]
            sums[s.sequence] += scored.sum(0)
            counts[s.sequence] += len(scored)
            if per_token:
                each[s.sequence][s.first : s.last] = scored
    ids = [record.id for record in records]
    if per_token:
        with output.open("wb") as file:
            np.savez_compressed(file, **dict(zip(ids, each)))  # type: ignore[arg-type]
        return output
    means = (sums / counts[:, None]).astype(np.float32)
    if suffix == ".npz":
        with output.open("wb") as file:
            np.savez_compressed(file, ids=np.array(ids), embeddings=means)
        return output
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": ids, "embedding": [row.tolist() for row in means]}), output)
    return output
