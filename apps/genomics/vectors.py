"""Embeddings of a user's sequences: a vector per sequence, or one per token, with ids and coordinates."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from apps.genomics.inputs import batches, identities, input_items
from apps.genomics.recipe import PredictSection
from apps.genomics.records import Record
from apps.genomics.scoring import embedded
from apps.genomics.task import GenomicsTask
from core.training.errors import UserError

SUFFIXES = (".npz", ".parquet")


def write_vectors(task: GenomicsTask, settings: PredictSection, records: Sequence[Record], output: Path) -> Path:
    """Write the vectors of every record as the suffix says.

    .npz holds `embeddings` [records, D] beside `ids` (and contig, start, end, strand, if there are any), or for
    token_embeddings an array [tokens, D] per id. .parquet holds the same columns.

    Raises:
        UserError: another suffix.
    """
    suffix, per_token = output.suffix.lower(), settings.what == "token_embeddings"
    if suffix not in SUFFIXES or (per_token and suffix != ".npz"):
        raise UserError(f"{output}: embeddings are written as .npz{'' if per_token else ' or .parquet'}")
    means, each = _vectors(task, settings, records, per_token)
    if per_token:
        with output.open("wb") as file:
            np.savez_compressed(file, **{record.id: one for record, one in zip(records, each)})  # type: ignore[arg-type]
        return output
    rows = identities(records)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    if suffix == ".npz":
        columns["ids"] = columns.pop("id")
        with output.open("wb") as file:
            np.savez_compressed(file, **{n: np.array(v) for n, v in columns.items()}, embeddings=means)  # type: ignore[arg-type]
        return output
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({**columns, "embedding": [row.tolist() for row in means]}), output)
    return output


def _vectors(
    task: GenomicsTask, settings: PredictSection, records: Sequence[Record], per_token: bool
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Mean vectors [records, D]; and, if wanted, those of each token of each record."""
    items, width = input_items(task, records), task.model.encoder.dim
    each = [np.zeros((len(s), width), dtype=np.float32) for s in items.sequences] if per_token else []
    sums, counts = np.zeros((len(records), width)), np.zeros(len(records))
    for numbers, batch in batches(items, settings.batch_size):
        ids, mask = batch["ids"], batch["mask"]
        if settings.layer == "last" and not per_token and len(items) == len(records):
            sums[numbers], counts[numbers] = embedded(task, batch).double().numpy(), 1
            continue
        x = task.model.embedded(ids, mask) if settings.layer == "input" else task.model.hidden(ids, mask)
        vectors = x.float().numpy()
        for number, one in zip(numbers, vectors):
            s = items.stretches[number]
            scored = one[s.first - s.start : s.last - s.start]
            sums[s.sequence] += scored.sum(0)
            counts[s.sequence] += len(scored)
        if per_token:
            items.stitch(each, numbers, vectors)
    return (sums / counts[:, None]).astype(np.float32), each
