"""What there is to see inside a run: which letters an answer hangs on, and who attends to whom.

saliency.csv, ID.png          gradient of the answer times the letter, per position
attention-ID.png, .npz        mean attention of all layers and heads; for proteins also corrected for what every
                              position attracts (average product correction), as for contact maps
mutagenesis.csv, mutagenesis-ID.png   what every substitution does; not for answers per base
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.genomics.alphabet import ALPHABETS
from apps.genomics.coding import encode
from apps.genomics.inputs import check_length, counts_positions, read_input
from apps.genomics.items import padded
from apps.genomics.language import LanguageTask
from apps.genomics.mutagenesis import LETTERS, draw_map, substitutions
from apps.genomics.recipe import GenomicsRecipe
from apps.genomics.records import Record
from apps.genomics.tables import write_table
from apps.genomics.task import BaseTask, GenomicsTask, SequenceTask
from core.attention.maps import attention_rows
from core.training.figures import canvas
from core.training.run import LoadedRun

RECORDS = 3
"""Records that are drawn, the first of the file."""
LONGEST = 256
"""Tokens of a record that are drawn: the rows of an attention map are found one by one."""


def inspect(run: LoadedRun, input: Path, output: Path) -> list[Path]:
    """Draw saliency and attention of the first records of a file, read as `predict` reads it.

    Raises:
        UserError: as in `predict`.
    """
    task, recipe = run.task, run.recipe
    assert isinstance(task, GenomicsTask)
    assert isinstance(recipe, GenomicsRecipe)
    records = read_input(run.spec, recipe.predict, input)[:RECORDS]
    alphabet, tokens = ALPHABETS[run.spec["tokens"]["alphabet"]], task.model.tokens
    files, rows, effects = [], [], []
    for record, codes in zip(records, encode(records, alphabet)):
        # A model that was built for one length is shown all of it.
        size = None if counts_positions(task) else LONGEST
        ids, mask = padded([tokens.encode(codes)[:size]])
        check_length(task, record, ids.shape[1])
        stem = output / _file_name(record.id)
        if tokens.is_char:
            track = saliency(task, ids, mask)
            letters = alphabet.decode(codes[: len(track)])
            rows += [
                {"id": record.id, "position": record.position(at), "letter": letter, "saliency": f"{value:.6g}"}
                for at, (letter, value) in enumerate(zip(letters, track))
            ]
            files.append(_draw_track(stem.with_suffix(".png"), record, track))
        files += _attention(task, ids, mask, record, stem, alphabet.name == "protein")
        if not isinstance(task, BaseTask):
            with torch.no_grad():
                found = list(substitutions(task, recipe.predict, record, 0, LONGEST))
            effects += found
            if found:
                picture = stem.with_name(f"mutagenesis-{stem.name}.png")
                files.append(draw_map(picture, record, found, _effect(task, ids, mask), LETTERS[alphabet.name]))
    for name, table in (("saliency.csv", rows), ("mutagenesis.csv", effects)):
        if table:
            files.insert(0, write_table(output / name, table))
    return files


def _effect(task: GenomicsTask, ids: Tensor, mask: Tensor) -> str:
    """The effect that is drawn: on the second of two classes, on the likeliest of several, on the first target."""
    if not isinstance(task, SequenceTask):
        return "llr"
    if task.recipe.task != "classification":
        return f"difference_{task.names[0]}"
    with torch.no_grad():
        said = task.predicted({"ids": ids, "mask": mask})[0]
    return f"difference_{task.names[1 if len(said) == 2 else int(said.argmax())]}"


def saliency(task: GenomicsTask, ids: Tensor, mask: Tensor) -> np.ndarray:
    """How much each letter speaks for the answer [N]: gradient of the likeliest answer times what the letter puts in.

    The gradient goes through the embedding, so a shortcut, which reads letters and no vectors, is left out.
    """
    caught: list[Tensor] = []

    def catch(_: Any, __: Any, out: Tensor) -> Tensor:
        leaf = out.detach().requires_grad_()
        caught.append(leaf)
        return leaf

    handle = task.model.embed.register_forward_hook(catch)
    try:
        with torch.enable_grad():
            if isinstance(task, LanguageTask) and task.causal:
                logits = task.next_logits(ids, mask)
            else:
                logits = task.model(ids, mask).float()
            likeliest: Tensor = logits.amax(-1).sum() if logits.dim() == 3 else logits[0, logits[0].abs().argmax()]
            (gradient,) = torch.autograd.grad(likeliest, caught[0])
    finally:
        handle.remove()
    return (gradient * caught[0]).sum(-1)[0].detach().numpy()


def _attention(task: GenomicsTask, ids: Tensor, mask: Tensor, record: Record, stem: Path, protein: bool) -> list[Path]:
    rows = attention_rows(task.model, _once(task, ids, mask), range(ids.shape[1]))
    whole = torch.stack([layer[0].mean(0) for layer in rows.values()]).mean(0).numpy()
    path = stem.with_name(f"attention-{stem.name}.npz")
    with path.open("wb") as file:
        np.savez_compressed(file, attention=whole)
    maps = {"attention": whole}
    if protein:
        maps["corrected"] = corrected(whole)
    picture = path.with_suffix(".png")
    with canvas(picture, 4.6 * len(maps), 4.4) as figure:
        for panel, (name, values) in enumerate(maps.items(), 1):
            axes = figure.add_subplot(1, len(maps), panel)
            top = float(np.quantile(values, 0.995)) or 1.0
            axes.imshow(values, cmap="Blues", vmin=0, vmax=top, interpolation="nearest")
            axes.grid(visible=False)
            axes.set(xlabel="position that is read", ylabel="position that reads", title=f"{record.id[:30]}: {name}")
    return [path, picture]


def _once(task: GenomicsTask, ids: Tensor, mask: Tensor) -> Callable[[], Tensor]:
    return lambda: task.model.hidden(ids, mask)


def corrected(attention: np.ndarray) -> np.ndarray:
    """Symmetric, with the average product taken off: what two positions share beyond what each attracts anyway."""
    both = attention + attention.T
    return both - both.sum(0, keepdims=True) * both.sum(1, keepdims=True) / both.sum()


def _draw_track(path: Path, record: Record, track: np.ndarray) -> Path:
    with canvas(path, 9, 2.6) as figure:
        axes = figure.add_subplot()
        axes.bar([record.position(at) for at in range(len(track))], track, width=1.0)
        shown = f"{record.contig or record.id}"[:40]
        axes.set(xlabel=f"position in {shown}", ylabel="gradient x letter", title="Saliency of the likeliest answer")
    return path


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)[:80] or "record"
