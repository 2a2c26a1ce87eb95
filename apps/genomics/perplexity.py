"""What a language model says of a user's sequences: perplexity per record, or the bits of every base as a track."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from apps.genomics.alphabet import ALPHABETS
from apps.genomics.coding import encode
from apps.genomics.inputs import batches, identities, input_items
from apps.genomics.items import Items
from apps.genomics.language import LanguageTask
from apps.genomics.metrics import language_figures
from apps.genomics.recipe import PredictSection
from apps.genomics.records import Record
from apps.genomics.scoring import likelihood
from apps.genomics.stream import check_streams, stream_nats
from apps.genomics.tables import TABLES, write_table
from apps.genomics.tracks import SUFFIXES, Track, write_tracks


def write_perplexity(task: LanguageTask, settings: PredictSection, records: Sequence[Record], output: Path) -> Path:
    """Write a row per record, or a track; the bits of a k-mer or piece are shared evenly among its letters."""
    tokens = task.model.tokens
    if settings.stream:
        check_streams(task)
        alphabet = ALPHABETS[task.spec["tokens"]["alphabet"]]
        sequences = [tokens.encode(codes) for codes in encode(records, alphabet)]
        nats = [stream_nats(task, torch.from_numpy(s.astype(np.int64)), settings.chunk).numpy() for s in sequences]
    else:
        items = input_items(task, records)
        sequences, nats = list(items.sequences), _stretch_nats(task, items, settings)
    suffix = output.suffix.lower()
    if suffix in SUFFIXES and suffix not in TABLES:
        tracks = []
        for record, ids, values in zip(records, sequences, nats):
            widths = tokens.widths(ids, len(record.sequence))
            tracks.append(Track(record, np.repeat(values / widths, widths)[:, None] / np.log(2)))
        return write_tracks(output, tracks, ["bits"], "values")
    return write_table(output, _rows(task, records, sequences, nats))


def _rows(
    task: LanguageTask, records: Sequence[Record], sequences: Sequence[np.ndarray], nats: Sequence[np.ndarray]
) -> Iterator[dict[str, object]]:
    tokens = task.model.tokens
    for record, who, ids, values in zip(records, identities(records), sequences, nats):
        asked = ids[ids < tokens.targets]
        bases = tokens.bases[asked].sum()
        counts = None if tokens.is_char else np.array([len(asked)])
        found = language_figures(np.array([values.sum()]), np.array([bases]), prefix=task.prefix, tokens=counts)
        yield who | {"bases": len(record.sequence), "asked": int(bases)} | found


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
        items.stitch(found, numbers, nats.numpy())
    return found
