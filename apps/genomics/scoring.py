"""How much a model minds a variant: log-likelihood ratios on both strands, embedding distances, changes of an answer.

    llr          log p(alternative) - log p(reference), natural logarithm; below 0: the model finds the alternative less
                 likely. For DNA the mean of both strands.
    distance     Euclidean distance of the mean embeddings of both windows
    difference   for models with an answer per sequence: answer to the alternative minus answer to the reference

Where p comes from:

    causal                    the likelihood of the whole window
    masked, letters change    masked marginals (Meier et al. 2021): each changed letter is masked in the reference, and
                              what the model says of both letters there is compared; several changes add up
    masked, all else          pseudo-log-likelihood: each token of the changed stretch and of `flank` tokens on either
                              side is masked in turn and the log-probabilities of the true ones add up, in the
                              alternative as in the reference. Serves insertions, deletions, and tokens of several
                              letters. (Brandes et al. 2023 take the ratio over whole proteins, without masking.)

An inserted letter adds a factor below 1 to its side, about 1/4 for DNA: compare insertions with insertions of the same
length, never with substitutions. The stretch is where the two windows differ once what they share from the left, then
from the right, is taken off, so a score does not depend on how the file anchors or aligns the variant.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.genomics.items import padded
from apps.genomics.language import LanguageTask
from apps.genomics.strand import other_strand
from apps.genomics.task import GenomicsTask, SequenceTask
from apps.genomics.variants import Variant, changed


@dataclass
class Window:
    """A variant in its stretch of the reference: `letters` starts at base `start`."""

    variant: Variant
    letters: str
    start: int


def score_windows(
    task: GenomicsTask, windows: Sequence[Window], *, flank: int, size: int = 32, distance: bool = True
) -> list[dict[str, float]]:
    """Scores of each variant; without gradients, in evaluation mode.

    Args:
        flank: tokens beside the changed stretch, for pseudo-log-likelihoods.   size: sequences per forward pass.
        distance: also the embedding distance.
    """
    alphabet = task.model.tokens.alphabet
    where = [window.variant.where for window in windows]
    before = [alphabet.encode(window.letters, place) for window, place in zip(windows, where)]
    after = [alphabet.encode(changed(w.letters, w.start, w.variant), place) for w, place in zip(windows, where)]
    found: list[dict[str, float]] = [{} for _ in windows]
    if isinstance(task, LanguageTask):
        strands = {"llr_forward": _ratios(task, before, after, flank, size)}
        if alphabet.complement is not None:
            old, new = ([alphabet.reverse_complement(codes) for codes in side] for side in (before, after))
            strands["llr_reverse"] = _ratios(task, old, new, flank, size)
        for row, *ratios in zip(found, *strands.values()):
            row |= dict(zip(strands, ratios)) | {"llr": sum(ratios) / len(ratios)}
    elif isinstance(task, SequenceTask):
        old, new = (_each(task, side, task.predicted, size).double() for side in (before, after))
        for row, change in zip(found, (new - old).tolist()):
            row |= {f"difference_{name}": value for name, value in zip(task.names, change)}
    if distance:
        old, new = (_each(task, side, lambda batch: embedded(task, batch), size) for side in (before, after))
        for row, value in zip(found, (new - old).norm(dim=1).tolist()):
            row["distance"] = value
    return found


def batch_of(task: GenomicsTask, sequences: Sequence[np.ndarray]) -> dict[str, Any]:
    """Codes of whole sequences as a batch: ids and mask, and those of the other strand where they are needed."""
    tokens = task.model.tokens
    ids, mask = padded([tokens.encode(codes) for codes in sequences])
    batch: dict[str, Any] = {"ids": ids, "mask": mask}
    if task.model.strand != "none" and not tokens.is_char:
        other = padded([tokens.encode(tokens.alphabet.reverse_complement(codes)) for codes in sequences])
        batch |= dict(zip(("other_ids", "other_mask"), other))
    return batch


def embedded(task: GenomicsTask, batch: dict[str, Any]) -> Tensor:
    """Mean embedding [B, D] in float32; a model of both strands gives the mean of both."""
    model, ids, mask = task.model, batch["ids"], batch["mask"]
    found = _mean(model.hidden(ids, mask), mask)
    if model.strand in ("average", "tied"):
        if model.tokens.is_char:
            ids = other_strand(ids, mask, model.complement)
        else:
            ids, mask = batch["other_ids"], batch["other_mask"]
        found = (found + _mean(model.hidden(ids, mask), mask)) / 2
    return found


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    real = mask.unsqueeze(-1)
    return (x.float() * real).sum(1) / real.sum(1)


def likelihood(task: LanguageTask, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-likelihood [B, N] of each token under a causal model; 0 where it is not asked."""
    logits = task.next_logits(ids, mask)
    asked = mask & (ids < logits.shape[-1])
    chosen = ids.clamp(max=logits.shape[-1] - 1).unsqueeze(-1)
    return logits.log_softmax(-1).gather(-1, chosen).squeeze(-1) * asked


def _each(
    task: GenomicsTask, sequences: Sequence[np.ndarray], say: Callable[[dict[str, Any]], Tensor], size: int
) -> Tensor:
    """What `say` makes of the batch of every sequence, [n, ...]; one that comes again is not asked again."""
    first: dict[bytes, int] = {}
    rows = [first.setdefault(codes.tobytes(), len(first)) for codes in sequences]
    alone = [np.frombuffer(text, dtype=np.uint8) for text in first]
    parts = [say(batch_of(task, alone[at : at + size])) for at in range(0, len(alone), size)]
    return torch.cat(parts)[rows]


def _ratios(
    task: LanguageTask, before: Sequence[np.ndarray], after: Sequence[np.ndarray], flank: int, size: int
) -> list[float]:
    """log p(after) - log p(before) of each pair, read in the direction that they are given in."""
    if task.causal:

        def total(batch: dict[str, Any]) -> Tensor:
            return likelihood(task, batch["ids"], batch["mask"]).double().sum(1)

        old, new = (_each(task, side, total, size) for side in (before, after))
        return (new - old).tolist()
    tokens = task.model.tokens
    asked, signs, owners = [], [], []
    for owner, (old, new) in enumerate(zip(before, after)):
        for row, place, token, sign in _questions(tokens.encode(old), tokens.encode(new), tokens.is_char, flank):
            if token < tokens.targets:  # an ambiguous letter is nothing that a model predicts
                asked.append((row, place, token))
                signs.append(sign)
                owners.append(owner)
    values = fill_in(task, asked, size)
    return np.bincount(owners, np.array(signs) * values, minlength=len(before)).tolist()


def _questions(old: np.ndarray, new: np.ndarray, is_char: bool, flank: int) -> list[tuple[np.ndarray, int, int, float]]:
    """What a masked model is asked about a pair: (tokens, place that is masked, token that is wanted there, sign)."""
    if is_char and len(old) == len(new):
        places = np.flatnonzero(old != new).tolist()
        return [(old, at, int(side[at]), sign) for at in places for side, sign in ((new, 1.0), (old, -1.0))]
    found = []
    for tokens, stretch, sign in zip((new, old), differing(new, old, flank), (1.0, -1.0)):
        found += [(tokens, at, int(tokens[at]), sign) for at in stretch]
    return found


def differing(a: np.ndarray, b: np.ndarray, flank: int) -> tuple[range, range]:
    """Where each differs from the other, widened by `flank`: what both share from the left, then the right, goes."""
    short = min(len(a), len(b))
    unlike = np.flatnonzero(a[:short] != b[:short])
    left = int(unlike[0]) if len(unlike) else short
    rest = short - left
    unlike = np.flatnonzero(a[::-1][:rest] != b[::-1][:rest])
    right = int(unlike[0]) if len(unlike) else rest
    return tuple(range(max(0, left - flank), min(len(x), len(x) - right + flank)) for x in (a, b))  # type: ignore[return-value]


def fill_in(task: LanguageTask, asked: Sequence[tuple[np.ndarray, int, int]], size: int) -> np.ndarray:
    """log p(token) [n] under a masked model at each (tokens, place, token), the place alone being masked."""
    rows: dict[tuple[bytes, int], list[int]] = {}
    for number, (tokens, place, _) in enumerate(asked):
        rows.setdefault((tokens.tobytes(), place), []).append(number)
    questions, found = list(rows.values()), np.zeros(len(asked))
    for at in range(0, len(questions), size):
        part = questions[at : at + size]
        ids, mask = padded([asked[numbers[0]][0] for numbers in part])
        row, places = torch.arange(len(part)), torch.tensor([asked[numbers[0]][1] for numbers in part])
        ids[row, places] = task.model.tokens.mask
        said = task.model(ids, mask)[row, places].float().log_softmax(-1)
        for numbers, log_p in zip(part, said):
            found[numbers] = log_p[[asked[number][2] for number in numbers]].numpy()
    return found
