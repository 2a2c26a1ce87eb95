"""Stretches of tokens as batches: what the model reads of one part of the data."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from apps.genomics.labels import UNSCORED


class Stretch(NamedTuple):
    """Tokens [start, stop) of a sequence, of which [first, last) are scored; the others are context."""

    sequence: int
    start: int
    stop: int
    first: int
    last: int


def cut(
    length: int, size: int | None, stride: int | None = None, overlap: int = 0, causal: bool = False
) -> list[tuple]:
    """(start, stop, first, last) of the stretches of a sequence.

    Args:
        length: of the sequence.   size: of a stretch; None: the whole.
        stride: tokens between stretches that are scored wholly: for training. A last one ends with the sequence.
        overlap: tokens that neighbours share, each token being scored once, where it stands farthest from an edge
            (causal: where it has most before it).
    """
    if size is None or length <= size:
        return [(0, length, 0, length)]
    step = stride or size - overlap
    starts = list(range(0, length - size + 1, step))
    if starts[-1] + size < length:
        starts.append(length - size)
    if stride is not None:
        return [(at, at + size, at, at + size) for at in starts]
    borders = [0]
    for before, after in pairwise(starts):
        shared = before + size - after
        borders.append(before + size if causal else after + (shared + 1) // 2)
    borders.append(length)
    return [(at, at + size, borders[n], borders[n + 1]) for n, at in enumerate(starts)]


class Items(Dataset):
    """One part: sequences of tokens with their targets, read as whole padded batches.

    Args:
        part: "train", "val" or "test".
        sequences: tokens of each sequence, uint8 or int32.
        stretches: what is an item.
        targets: per sequence: class, vector, or one value per token; None: language models, prediction.
        others: the same sequences read on the other strand, where that cannot be worked out from the tokens.
        scored: bool per token and sequence, False where a language model is not asked; None: everywhere.
        copied: bool per sequence, it has a copy in the training part.
        places: per sequence, (id, contig, start) for the files that are written.
        per_token: targets have one value per token.
        letters: codes of the letters, where tokens are something else; floors count them.
    """

    def __init__(
        self,
        part: str,
        sequences: Sequence[np.ndarray],
        stretches: Sequence[Stretch],
        *,
        targets: Sequence[Any] | None = None,
        others: Sequence[np.ndarray] | None = None,
        scored: Sequence[np.ndarray | None] | None = None,
        copied: np.ndarray | None = None,
        places: Sequence[tuple[str, str | None, int]] | None = None,
        per_token: bool = False,
        letters: Sequence[np.ndarray] | None = None,
    ):
        self.part, self.sequences, self.stretches = part, sequences, list(stretches)
        self.targets, self.others, self.scored, self.copied = targets, others, scored, copied
        self.per_token, self.letters = per_token, letters
        self.places = places or [(str(n), None, 0) for n in range(len(sequences))]
        self.lengths = [stretch.stop - stretch.start for stretch in self.stretches]

    def __len__(self) -> int:
        return len(self.stretches)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """Batch: ids [B, N], mask [B, N], index [B] (stretch), and by the task target, scored, other ids and mask."""
        chosen = [self.stretches[i] for i in indices]
        ids, mask = padded([self.sequences[s.sequence][s.start : s.stop] for s in chosen])
        batch: dict[str, Any] = {"ids": ids, "mask": mask, "index": torch.tensor(list(indices)), "part": self.part}
        where = torch.zeros_like(mask)
        for row, s in enumerate(chosen):
            where[row, s.first - s.start : s.last - s.start] = True
            seen = None if self.scored is None else self.scored[s.sequence]
            if seen is not None:
                where[row, : s.stop - s.start] &= torch.from_numpy(seen[s.start : s.stop].copy())
        batch["scored"] = where
        if self.others is not None:
            batch["other_ids"], batch["other_mask"] = padded([self.others[s.sequence] for s in chosen])
        if self.targets is not None:
            batch["target"] = self._targets(chosen, where)
        return batch

    def stitch(self, whole: Sequence[np.ndarray], numbers: Sequence[int], answers: np.ndarray) -> None:
        """Write answers [B, N, ...] about the stretches `numbers` where they are scored into arrays per sequence."""
        for number, answer in zip(numbers, answers):
            s = self.stretches[number]
            whole[s.sequence][s.first : s.last] = answer[s.first - s.start : s.last - s.start]

    def _targets(self, chosen: list[Stretch], where: Tensor) -> Tensor:
        assert self.targets is not None
        first = self.targets[chosen[0].sequence]
        if isinstance(first, int):
            return torch.tensor([self.targets[s.sequence] for s in chosen])
        if not self.per_token:
            return torch.from_numpy(np.stack([self.targets[s.sequence] for s in chosen]))
        whole = first.dtype == np.int16
        target = torch.full(where.shape, UNSCORED, dtype=torch.int64) if whole else torch.full(where.shape, torch.nan)
        for row, s in enumerate(chosen):
            values = torch.from_numpy(self.targets[s.sequence][s.first : s.last].copy())
            target[row, s.first - s.start : s.last - s.start] = values.to(target.dtype)
        return target


def padded(sequences: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """ids int64 [B, N] and mask bool [B, N], short sequences filled with 0 at the end."""
    longest = max(map(len, sequences))
    ids = np.zeros((len(sequences), longest), dtype=np.int64)
    mask = np.zeros((len(sequences), longest), dtype=bool)
    for row, one in enumerate(sequences):
        ids[row, : len(one)] = one
        mask[row, : len(one)] = True
    return torch.from_numpy(ids), torch.from_numpy(mask)
