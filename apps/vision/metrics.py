"""Sums over the images of a part, and the figures that come out of them at its end."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.vision.boundaries import boundary_f, mean_over_classes
from core.training.scores import RESAMPLES, classification, multilabel
from core.training.statistics import bootstrap_each


class ClassScores:
    """Probabilities and labels of every image (float32 [N, K]), scored at the end as one set."""

    def __init__(self, single: bool):
        self.single = single
        self.probabilities: list[Tensor] = []
        self.labels: list[Tensor] = []

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """logits [B, K]; labels [B], or [B, K] of 0 and 1."""
        probabilities = logits.float().softmax(-1) if self.single else logits.float().sigmoid()
        self.probabilities.append(probabilities.cpu())
        self.labels.append(labels.cpu())

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(probabilities [N, K], labels [N] or [N, K])."""
        return torch.cat(self.probabilities).double().numpy(), torch.cat(self.labels).long().numpy()

    def compute(self, intervals: bool = False) -> dict[str, float]:
        """See `core.training.scores`; figures that do not exist for these labels are left out."""
        found = (classification if self.single else multilabel)(*self.arrays(), intervals=intervals)
        return {name: value for name, value in found.items() if np.isfinite(value)}


class SegmentScores:
    """One confusion matrix over all pixels of a part.

    miou: mean over the classes that are there, in truth or in the answers, of intersection over union. dice: likewise
    of 2 intersection / (truth + answer). accuracy: share of right pixels. Pixels without a class count nowhere.
    boundary_f: see `boundaries`; only where `outlines` asks for it, for it takes longer than all others.
    """

    def __init__(self, classes: list[str], ignore: int | None, *, outlines: bool = False):
        self.classes, self.ignore = classes, ignore
        self.outlines: list[np.ndarray] | None = [] if outlines else None
        self.counts = torch.zeros(len(classes), len(classes), dtype=torch.int64)

    def update(self, answer: Tensor, mask: Tensor) -> None:
        """Class numbers of answer and truth, of one image [H, W] where outlines are wanted, else [...]."""
        answer, mask = answer.cpu(), mask.cpu()
        valid = (mask >= 0) & (mask < len(self.classes))
        if self.ignore is not None:
            valid &= mask != self.ignore
        if self.outlines is not None:
            truth = mask.long().masked_fill(~valid, -1).numpy()
            self.outlines.append(boundary_f(answer.numpy(), truth, len(self.classes)))
        index = mask[valid] * len(self.classes) + answer[valid]
        self.counts += index.bincount(minlength=self.counts.numel()).view_as(self.counts)

    def by_class(self) -> list[dict[str, Any]]:
        """Pixels, IoU, Dice, precision, recall and boundary F of each class; None where it is nowhere."""
        counts = self.counts.double()
        hit, truth, answer = counts.diagonal(), counts.sum(1), counts.sum(0)

        def share(a: Tensor, b: Tensor) -> list[float | None]:
            return [float(x / y) if y else None for x, y in zip(a, b)]

        columns: dict[str, list[Any]] = {
            "pixels": [int(x) for x in truth],
            "iou": share(hit, truth + answer - hit),
            "dice": share(2 * hit, truth + answer),
            "precision": share(hit, answer),
            "recall": share(hit, truth),
        }
        if self.outlines:
            scores = np.stack(self.outlines)
            each = [scores[np.isfinite(scores[:, k]), k] for k in range(len(self.classes))]
            columns["boundary_f"] = [float(one.mean()) if len(one) else None for one in each]
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        return [{"class": name, **row} for name, row in zip(self.classes, rows)]

    def compute(self, intervals: bool = False) -> dict[str, float]:
        """The figures; pixels of an image are alike, so only the boundary F, a mean over images, has an interval."""
        rows = [row for row in self.by_class() if row["iou"] is not None]
        total = max(1, int(self.counts.sum()))
        return self._outlines(intervals) | {
            "miou": float(np.mean([row["iou"] for row in rows])) if rows else 0.0,
            "dice": float(np.mean([row["dice"] for row in rows])) if rows else 0.0,
            "accuracy": float(self.counts.diagonal().sum()) / total,
        }

    def _outlines(self, intervals: bool) -> dict[str, float]:
        if not self.outlines:
            return {}
        scores = np.stack(self.outlines)
        found = {"boundary_f": mean_over_classes(scores)}
        if intervals and len(scores) > 1:
            ends = bootstrap_each(lambda some: {"boundary_f": mean_over_classes(some)}, scores, resamples=RESAMPLES)
            found["boundary_f_low"], found["boundary_f_high"] = ends["boundary_f"]
        return found


class ValueScores:
    """Errors per pixel over a part."""

    def __init__(self) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64)  # count, squared, absolute, truth, truth squared

    def update(self, answer: Tensor, truth: Tensor) -> None:
        """Values [...] of answer and truth."""
        error, truth = (answer - truth).double().cpu(), truth.double().cpu()
        one = (float(truth.numel()), error.square().sum(), error.abs().sum(), truth.sum(), truth.square().sum())
        self.sums += torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in one])

    def compute(self, intervals: bool = False) -> dict[str, float]:
        """The figures; pixels of an image are alike, so none has an interval."""
        count, squared, absolute, total, square = self.sums.tolist()
        spread = square - total * total / max(count, 1)
        return {
            "mse": squared / max(count, 1),
            "mae": absolute / max(count, 1),
            "r2": 1 - squared / spread if spread > 0 else 0.0,
        }
