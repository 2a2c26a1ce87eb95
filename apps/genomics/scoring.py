"""How much a model minds a variant: log-likelihood ratios on both strands, masked marginals, embedding distances.

    llr          log p(alternative) - log p(reference), natural logarithm, summed over the letters it touches;
                 below 0: the model finds the alternative less likely. For DNA the mean of both strands.
    distance     Euclidean distance of the mean embeddings of both windows
    difference   for models with an answer per sequence: answer to the alternative minus answer to the reference

A causal model compares the likelihood of the two windows. A masked model fills in the changed positions, each masked
(masked marginals, Meier et al. 2021); insertions and deletions change the number of positions, so it gives them a
distance only.
"""

from dataclasses import dataclass

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


def score_windows(task: GenomicsTask, windows: list[Window]) -> list[dict[str, float]]:
    """Scores of each variant; without gradients, in evaluation mode."""
    alphabet, tokens = task.model.tokens.alphabet, task.model.tokens
    where = [window.variant.where for window in windows]
    before = [alphabet.encode(window.letters, place) for window, place in zip(windows, where)]
    after = [alphabet.encode(changed(w.letters, w.start, w.variant), place) for w, place in zip(windows, where)]
    both = [padded([tokens.encode(codes) for codes in part]) for part in (before, after)]
    found: list[dict[str, float]] = [{} for _ in windows]
    distance = (embedded(task, *both[0]) - embedded(task, *both[1])).norm(dim=1)
    if isinstance(task, LanguageTask):
        strands = {"llr_forward": False} | ({"llr_reverse": True} if alphabet.complement is not None else {})
        for name, reverse in strands.items():
            if reverse:
                turned = [[alphabet.reverse_complement(codes) for codes in part] for part in (before, after)]
                pairs = [padded([tokens.encode(codes) for codes in part]) for part in turned]
            else:
                pairs = both
            ratios = _causal(task, pairs) if task.causal else _masked(task, windows, pairs[0], reverse)
            for row, ratio in zip(found, ratios):
                if ratio is not None:
                    row[name] = ratio
        for row in found:
            ratios = [row[name] for name in strands if name in row]
            if ratios:
                row["llr"] = sum(ratios) / len(ratios)
    elif isinstance(task, SequenceTask):
        answers = [task.predicted({"ids": ids, "mask": mask}).double() for ids, mask in both]
        for row, change in zip(found, (answers[1] - answers[0]).tolist()):
            row |= {f"difference_{name}": value for name, value in zip(task.names, change)}
    for row, value in zip(found, distance.tolist()):
        row["distance"] = value
    return found


def embedded(task: GenomicsTask, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean embedding [B, D] in float32; a model of both strands gives the mean of both."""
    model = task.model
    found = _mean(model.hidden(ids, mask), mask)
    if model.strand in ("average", "tied") and model.tokens.is_char:
        turned = other_strand(ids, mask, model.complement)
        found = (found + _mean(model.hidden(turned, mask), mask)) / 2
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


def _causal(task: LanguageTask, pairs: list[tuple[Tensor, Tensor]]) -> list[float]:
    totals = [likelihood(task, ids, mask).double().sum(1) for ids, mask in pairs]
    return (totals[1] - totals[0]).tolist()


def _masked(
    task: LanguageTask, windows: list[Window], pair: tuple[Tensor, Tensor], reverse: bool
) -> list[float | None]:
    """Masked marginals of substitutions, each position masked on its own; several add up."""
    model, (ids, mask) = task.model, pair
    if not model.tokens.is_char:
        return [None] * len(windows)
    letters = model.tokens.alphabet.letters
    asked: list[tuple[int, int, int, int]] = []  # window, place, code of ref, code of alt
    for row, window in enumerate(windows):
        if any(len(ref) != len(alt) for _, ref, alt in window.variant.changes):
            continue
        for at, ref, alt in window.variant.changes:
            for step, (old, new) in enumerate(zip(ref, alt)):
                place = at + step - window.start
                place = len(window.letters) - 1 - place if reverse else place
                if old != new:
                    asked.append((row, place, letters.index(old), letters.index(new)))
    ratios: list[float | None] = [None] * len(windows)
    if not asked:
        return ratios
    rows, places, refs, alts = torch.tensor(asked).T
    inputs, number = ids[rows].clone(), torch.arange(len(rows))
    inputs[number, places] = model.tokens.mask
    logits = model(inputs, mask[rows]).float().log_softmax(-1)[number, places]
    pairs = model.complement if reverse else torch.arange(model.tokens.size)
    scores = logits[number, pairs[alts]] - logits[number, pairs[refs]]
    for row, score in zip(rows.tolist(), scores.double().tolist()):
        ratios[row] = (ratios[row] or 0.0) + score
    return ratios
