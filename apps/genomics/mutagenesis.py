"""Saturation mutagenesis: what every substitution at every position does to the answer of a model.

A classifier or regression is asked about the whole sequence with one letter changed; the effect is its answer minus
that to the sequence as it is (`difference_CLASS`). A language model is asked as for variants (`llr`, see `scoring.py`).
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from apps.genomics.language import LanguageTask
from apps.genomics.recipe import PredictSection
from apps.genomics.records import Record
from apps.genomics.reference import Reference
from apps.genomics.scoring import Window, score_windows
from apps.genomics.task import BaseTask, GenomicsTask
from apps.genomics.variant_files import cut_window, window_size
from apps.genomics.variants import Variant
from core.training.errors import UserError
from core.training.figures import canvas

LETTERS = {"dna": "ACGT", "protein": "ACDEFGHIKLMNPQRSTVWY"}
"""What is put at every position."""
SHOWN = 90
"""Up to so many positions, the heat map says which letter stands there."""


def check_mutates(task: GenomicsTask) -> None:
    """Raise UserError unless a substitution has one effect under this task."""
    if isinstance(task, BaseTask):
        raise UserError(
            f"mutagenesis is for answers per sequence and language models; a run of task={task.recipe.task} answers "
            "per base, and a substitution changes the answer at many"
        )


def substitutions(
    task: GenomicsTask, settings: PredictSection, record: Record, first: int = 0, last: int | None = None
) -> Iterator[dict[str, object]]:
    """A row per substitution of letters [first, last): id, position (from 1, on the contig), ref, alt, effects.

    Letters are those of the strand that the record was read on. An ambiguous letter is left as it is.
    """
    alphabet = task.model.tokens.alphabet
    text = alphabet.decode(alphabet.encode(record.sequence, record.where))
    changes = [
        Variant(record.where, record.id, record.id, [(at, text[at], letter)], at)
        for at in range(first, min(len(text), last or len(text)))
        for letter in LETTERS[alphabet.name]
        if text[at] != letter and text[at] in alphabet.atoms
    ]
    whole = Reference(Path(), {record.id: text}, {record.id: len(text)})
    size = window_size(task, settings) if isinstance(task, LanguageTask) else len(text)
    waiting = iter(changes)
    while part := list(islice(waiting, 16 * settings.batch_size)):
        windows = [
            cut_window(change, whole, record.id, size) if size < len(text) else Window(change, text, 0)
            for change in part
        ]
        scores = score_windows(task, windows, flank=settings.flank, size=settings.batch_size, distance=False)
        for change, score in zip(part, scores):
            at, ref, alt = change.changes[0]
            row: dict[str, object] = {"id": record.id}
            if record.contig:
                row |= {"contig": record.contig, "strand": record.strand}
            yield row | {"position": record.position(at), "ref": ref, "alt": alt} | score


def draw_map(path: Path, record: Record, rows: Sequence[dict[str, object]], effect: str, letters: str) -> Path:
    """Heat map of one effect: letters from top to bottom, positions from left to right; above, their largest effect.

    Args:
        rows: of `substitutions`.   effect: the column that is drawn.   letters: the rows of the map.
    """
    positions = list(dict.fromkeys(int(str(row["position"])) for row in rows))
    column = {position: number for number, position in enumerate(positions)}
    values = np.full((len(letters), len(positions)), np.nan)
    reference: dict[int, str] = {}
    for row in rows:
        at = column[int(str(row["position"]))]
        values[letters.index(str(row["alt"])), at] = float(str(row[effect]))
        reference[at] = str(row["ref"])
    largest = float(np.nanmax(np.abs(values))) or 1.0
    width = min(14.0, max(6.0, 1.6 + 0.11 * len(positions)))
    with canvas(path, width, 1.9 + 0.17 * len(letters)) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1 + 0.18 * len(letters)))
        places = np.arange(len(positions))
        above.bar(places, np.nanmin(values, 0).clip(max=0), width=1.0, color="#b2182b")
        above.bar(places, np.nanmax(values, 0).clip(min=0), width=1.0, color="#2166ac")
        above.axhline(0, color="black", lw=0.5)
        above.set(ylabel="extremes", title=f"{record.id[:40]}: {effect} of every substitution")
        picture = below.imshow(values, aspect="auto", cmap="RdBu", vmin=-largest, vmax=largest, interpolation="nearest")
        below.set_facecolor("#e8e8e8")
        below.grid(visible=False)
        marks = list(reference.items())
        below.scatter([at for at, _ in marks], [letters.find(ref) for _, ref in marks], s=3, color="black", lw=0)
        below.set_yticks(range(len(letters)), letters)
        if len(positions) <= SHOWN:
            below.set_xticks(places, [reference[at] for at in range(len(positions))], fontsize=6)
            below.tick_params(axis="x", length=0)
            ends = f"{positions[0]} to {positions[-1]}"
        else:
            step = max(1, len(positions) // 8)
            below.set_xticks(places[::step], [str(positions[at]) for at in places[::step]])
            ends = "dots: the letter that is there"
        below.set(xlabel=f"position in {(record.contig or record.id)[:40]} ({ends})", ylabel="changed to")
        figure.colorbar(picture, ax=[above, below], shrink=0.8, pad=0.01)
    return path
