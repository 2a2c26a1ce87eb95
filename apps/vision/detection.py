"""Detection without anchors and without suppression: each token answers for one box, and one token learns each box.

The set loss is DETR's: the cheapest pairing of answers and true boxes (Hungarian method) decides which token learns
which box, and all others learn to say nothing. The queries are the image's own tokens, each starting from its place.

Source:
    Carion et al. 2020 (DETR), arXiv:2005.12872; tokens as queries and boxes that start at their place: Minderer et al.
    2022 (OWL-ViT), arXiv:2205.06230; focal loss: Lin et al. 2017, arXiv:1708.02002
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from apps.vision.heads import Features

COST = {"class": 2.0, "sides": 5.0, "overlap": 2.0}
"""Weights of the three terms, in the pairing and in the loss (those of DETR's descendants)."""
ALPHA, GAMMA = 0.25, 2.0
RARE = -4.6
"""Logit of a class at the start: one in a hundred."""
MOST = 100
"""Answers of an image that are scored, the best ones (COCO)."""
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)


class BoxHead(nn.Module):
    """Tokens -> [B, N, K + 4]: logits of the classes, then left, top, right, bottom as shares of what is seen."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.classes = nn.Linear(dim, classes)
        self.sides = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 4))
        nn.init.constant_(self.classes.bias, RARE)

    def forward(self, features: Features) -> Tensor:
        """-> [B, N, K + 4]."""
        logits, raw = self.classes(features.tokens), self.sides(features.tokens)
        rows, columns = features.grid
        middles = ((torch.arange(n, device=raw.device) + 0.5) / n for n in (rows, columns))
        y, x = torch.meshgrid(*middles, indexing="ij")
        start = torch.stack((x, y, torch.full_like(x, 2 / columns), torch.full_like(y, 2 / rows)), -1).flatten(0, 1)
        middle, length = (raw + start.clamp(1e-3, 1 - 1e-3).logit()).sigmoid().chunk(2, -1)
        if features.mask is not None:
            logits = logits.masked_fill(~features.mask[..., None], -20.0)
        return torch.cat((logits, middle - length / 2, middle + length / 2), -1)


def overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of boxes [..., 4], broadcast, and the share of their common frame that stays empty."""
    cut = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    frame = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (a, b)]
    union = areas[0] + areas[1] - cut
    return cut / union.clamp(min=1e-9), 1 - union / frame.clamp(min=1e-9)


def set_loss(answer: Tensor, targets: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """DETR's loss of answers [B, N, K + 4] against boxes [M, 5] per image, and its three terms, per true box."""
    answer = answer.float()
    logits, sides = answer[..., :-4], answer[..., -4:]
    wanted = torch.zeros_like(logits)
    total = {"sides": logits.sum() * 0, "overlap": logits.sum() * 0}
    for n, boxes in enumerate(targets):
        if not len(boxes):
            continue
        tokens, things = pair_up(logits[n].detach(), sides[n].detach(), boxes)
        wanted[n, tokens, boxes[things, 0].long()] = 1
        mine, true = sides[n][tokens], boxes[things, 1:]
        iou, empty = overlap(mine, true)
        total["sides"] = total["sides"] + (mine - true).abs().sum()
        total["overlap"] = total["overlap"] + (1 - iou + empty).sum()
    chance = logits.sigmoid()
    missed = (chance - wanted).abs() ** GAMMA * (ALPHA * wanted + (1 - ALPHA) * (1 - wanted))
    total["class"] = (missed * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")).sum()
    terms = {name: COST[name] * value / max(1, sum(map(len, targets))) for name, value in total.items()}
    return torch.stack(list(terms.values())).sum(), terms


def pair_up(logits: Tensor, sides: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [P] and boxes [P] of the cheapest pairing of logits [N, K] and sides [N, 4] with true boxes [M, 5]."""
    chance = logits.sigmoid()[:, boxes[:, 0].long()]
    hit = ALPHA * (1 - chance) ** GAMMA * -(chance + 1e-8).log()
    miss = (1 - ALPHA) * chance**GAMMA * -(1 - chance + 1e-8).log()
    iou, empty = overlap(sides[:, None], boxes[None, :, 1:])
    apart = (sides[:, None] - boxes[None, :, 1:]).abs().sum(-1)
    cost = COST["class"] * (hit - miss) + COST["sides"] * apart + COST["overlap"] * (empty - iou)
    tokens, things = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(tokens, device=sides.device), torch.as_tensor(things, device=sides.device)


def best(answer: Tensor, most: int = MOST) -> tuple[Tensor, Tensor, Tensor]:
    """Classes [P], scores [P] and sides [P, 4] of the surest answers among [N, K + 4], surest first."""
    scores = answer[:, :-4].sigmoid()
    top, where = scores.flatten().topk(min(most, scores.numel()))
    return where % scores.shape[1], top, answer[where // scores.shape[1], -4:]


class BoxScores:
    """Average precision over a part, as COCO counts it: 101 recalls, at most 100 answers per image.

    map50: at an overlap of .5, the mean over the classes that are there. map: also the mean over overlaps .5 to .95.
    count_error: mean over images of the difference between the number of answers above `threshold` and of true boxes.
    """

    def __init__(self, classes: list[str], threshold: float):
        self.classes, self.threshold = classes, threshold
        self.images: list[tuple[np.ndarray, ...]] = []

    def update(self, kinds: Tensor, scores: Tensor, sides: Tensor, boxes: Tensor) -> None:
        """Answers of one image, surest first (see `best`), and its true boxes [M, 5], in shares of the same image."""
        iou = overlap(sides[:, None], boxes[None, :, 1:])[0]
        self.images.append(tuple(x.cpu().numpy() for x in (kinds, scores, iou, boxes[:, 0].long())))

    def curve(self, k: int, threshold: float) -> tuple[Any, Any, int]:
        """Precision and recall of class k after each of its answers, surest first, and how many true boxes it has."""
        scores, hits, true = [], [], 0
        for kinds, chance, iou, truth in self.images:
            own, there = np.flatnonzero(kinds == k), np.flatnonzero(truth == k)
            free = np.ones(len(there), dtype=bool)
            true += len(there)
            for n in own:
                reach = np.where(free, iou[n, there], -1.0)
                at = int(reach.argmax()) if len(reach) else -1
                hit = at >= 0 and reach[at] >= threshold
                if hit:
                    free[at] = False
                scores.append(chance[n])
                hits.append(hit)
        order = np.argsort(-np.array(scores), kind="stable")
        found = np.cumsum(np.array(hits, dtype=float)[order]) if len(order) else np.zeros(0)
        return found / np.arange(1, len(found) + 1), found / max(1, true), true

    def by_class(self) -> list[dict[str, Any]]:
        """True boxes, AP at .5 and AP over .5 to .95 of each class; None where it is nowhere."""
        rows = []
        for k, name in enumerate(self.classes):
            curves = [self.curve(k, threshold) for threshold in THRESHOLDS]
            ap = [average_precision(precision, recall) for precision, recall, _ in curves]
            true = curves[0][2]
            figures = {"ap50": ap[0], "ap": float(np.mean(ap))} if true else {"ap50": None, "ap": None}
            rows.append({"class": name, "boxes": true, **figures})
        return rows

    def compute(self, intervals: bool = False) -> dict[str, float]:
        """The figures; an image has no precision of its own, so none has an interval."""
        rows = [row for row in self.by_class() if row["ap"] is not None]
        errors = [abs(int((scores >= self.threshold).sum()) - len(truth)) for _, scores, _, truth in self.images]
        return {
            "map50": float(np.mean([row["ap50"] for row in rows])) if rows else 0.0,
            "map": float(np.mean([row["ap"] for row in rows])) if rows else 0.0,
            "count_error": float(np.mean(errors)) if errors else 0.0,
        }


def average_precision(precision: Any, recall: Any) -> float:
    """Mean over 101 recalls of the best precision at that recall or a higher one."""
    ceiling: Any = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(recall, RECALLS, side="left")
    return float(np.mean([ceiling[n] if n < len(ceiling) else 0.0 for n in at]))
