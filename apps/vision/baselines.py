"""Floors: what images cost without a deep model. Every report prints them beside the model.

- majority: the class that is most frequent in training, for every image or pixel;
- histogram: logistic regression on a colour histogram (8 bins per channel, and 4 x 4 x 4 of the colours together);
- thumbnail: logistic regression on the image shrunk to 16 x 16;
- shape: logistic regression on the rows and columns of the file, where they differ: what a size gives away;
- position: segments only, the most frequent class of each place (on a grid of 32 x 32);
- prior: boxes only, the same for every image: the middles of clusters of the training boxes of each class;
- optimum: generated scenes only, the best possible accuracy.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.vision.detection import MOST as MOST_BOXES
from apps.vision.detection import BoxScores, overlap
from apps.vision.metrics import ClassScores, SegmentScores, ValueScores
from core.training.data import Data
from core.training.recipe import Recipe
from core.training.summary import OPTIMUM

MOST = 4000
"""Training images that the regressions see, thinned evenly: more no longer move the second digit."""
BINS, THUMB, PLACES = 8, 16, 32


def floors(recipe: Recipe, data: Data) -> dict[str, dict[str, float]]:
    """Metrics of every floor on all images of the test part, by the same sums as the model's."""
    train, test, spec = data.train, data.test, data.spec
    task, classes = spec["task"], spec["classes"]
    if task == "segments":
        return _of_segments(train, test, classes, spec["reading"]["ignore"])
    if task == "values":
        return _of_values(train, test)
    if task == "boxes":
        return _of_boxes(train, test, classes)
    rows = range(0, len(train), max(1, len(train) // MOST))  # type: ignore[arg-type]
    labels = np.array([train.targets[n] for n in rows])  # type: ignore[attr-defined]
    truth = torch.tensor(test.targets)  # type: ignore[union-attr]
    share = torch.tensor(spec["counts"], dtype=torch.float32) / max(1, len(train))  # type: ignore[arg-type]
    share = share.clamp(1e-6, 1 - 1e-6)
    logits = share.log() if task == "classes" else share.logit()
    found = {"majority": _score(logits.expand(len(truth), -1), truth, task)}
    for name, features in (("histogram", histogram), ("thumbnail", thumbnail)):
        seen = np.stack([features(train.get(n)[0]) for n in rows])  # type: ignore[attr-defined]
        asked = np.stack([features(test.get(n)[0]) for n in range(len(truth))])  # type: ignore[union-attr]
        found[name] = _score(_regression(seen, labels, asked, task, len(classes)), truth, task)
    shapes = [[part.items[n].shape for n in some] for part, some in ((train, rows), (test, range(len(truth))))]  # type: ignore[union-attr]
    if len(set(shapes[0])) > 1 and None not in shapes[0] + shapes[1]:
        seen, asked = (np.log(np.array(some, dtype=float)) for some in shapes)
        found["shape"] = _score(_regression(seen, labels, asked, task, len(classes)), truth, task)
    if hasattr(test, "truth"):
        right = F.one_hot(test.truth, len(classes)).float() * 20  # type: ignore[union-attr]
        found[OPTIMUM] = _score(right, truth, task)
    return found


def histogram(image: Tensor) -> np.ndarray:
    """Shares of pixels per bin: of each channel, and of the colours together."""
    flat = image.flatten(1).long()
    parts = [(channel * BINS // 256).bincount(minlength=BINS) for channel in flat]
    if len(flat) == 3:
        coarse = flat // 64
        parts.append((coarse[0] * 16 + coarse[1] * 4 + coarse[2]).bincount(minlength=64))
    return (torch.cat(parts).double() / flat.shape[1]).numpy()


def thumbnail(image: Tensor) -> np.ndarray:
    """The image at 16 x 16, values from 0 to 1."""
    small = F.interpolate(image[None].float() / 255, size=(THUMB, THUMB), mode="area")
    return small.flatten().double().numpy()


def _regression(seen: np.ndarray, labels: np.ndarray, asked: np.ndarray, task: str, classes: int) -> Tensor:
    """Logits [N, K] of logistic regression on standardised features, strength 1 (nothing is tuned)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fitted(y: np.ndarray) -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(seen, y)

    if task == "labels":
        columns = []
        for k in range(classes):
            y = labels[:, k] > 0.5
            constant = np.full(len(asked), 10.0 if y.all() else -10.0)
            columns.append(constant if y.all() or not y.any() else fitted(y).decision_function(asked))
        return torch.tensor(np.stack(columns, 1))
    model = fitted(labels)
    logits = np.full((len(asked), classes), -20.0)
    logits[:, model.classes_] = model.predict_log_proba(asked)
    return torch.tensor(logits)


def _score(logits: Tensor, truth: Tensor, task: str) -> dict[str, float]:
    scores = ClassScores(task == "classes")
    scores.update(logits, truth)
    return scores.compute()


def _of_segments(train: Any, test: Any, classes: list[str], ignore: int | None) -> dict[str, dict[str, float]]:
    total = torch.zeros(len(classes), PLACES, PLACES, dtype=torch.float64)
    for n in range(len(train)):
        mask = train.get(n)[1]
        valid = (mask >= 0) & (mask < len(classes)) & (mask != (-1 if ignore is None else ignore))
        hot = F.one_hot(mask.masked_fill(~valid, 0), len(classes)).permute(2, 0, 1).double() * valid
        total += F.adaptive_avg_pool2d(hot, (PLACES, PLACES))
    majority, position = (SegmentScores(classes, ignore, outlines=True) for _ in range(2))
    most, places = int(total.sum((1, 2)).argmax()), total.argmax(0)
    for n in range(len(test)):
        mask = test.get(n)[1]
        majority.update(torch.full_like(mask, most), mask)
        position.update(F.interpolate(places[None, None].double(), size=mask.shape, mode="nearest")[0, 0].long(), mask)
    return {"majority": majority.compute(), "position": position.compute()}


def _of_values(train: Any, test: Any) -> dict[str, dict[str, float]]:
    mean, position = ValueScores(), ValueScores()
    places = torch.stack(
        [F.adaptive_avg_pool2d(train.get(n)[1][None].double(), (PLACES, PLACES))[0] for n in range(len(train))]
    ).mean(0)
    for n in range(len(test)):
        truth = test.get(n)[1]
        mean.update(torch.full_like(truth, float(places.mean())), truth)
        position.update(F.interpolate(places[None, None], size=truth.shape, mode="bilinear")[0, 0].float(), truth)
    return {"mean": mean.compute(), "position": position.compute()}


def _of_boxes(train: Any, test: Any, classes: list[str]) -> dict[str, dict[str, float]]:
    scores = BoxScores(classes, threshold=0.5)
    answer = prior(train.targets, len(classes))
    for boxes in test.targets:
        scores.update(*answer, boxes)
    return {"prior": scores.compute()}


def prior(train: list[Tensor], classes: int, most: int = MOST_BOXES) -> tuple[Tensor, Tensor, Tensor]:
    """Classes [P], scores [P] and sides [P, 4] of boxes that fit training images [M, 5] best, the surest first.

    They are the middles of clusters (k-means) of each class. The score is the share of the training images that have a
    box of the class which overlaps by half.
    """
    from sklearn.cluster import KMeans

    kinds, scores, sides = [], [], []
    for k in range(classes):
        own = torch.cat([boxes[boxes[:, 0] == k, 1:] for boxes in train]).double().numpy()
        number = min(len(np.unique(own, axis=0)), max(1, most // classes))
        if not number:
            continue
        middles = KMeans(number, n_init="auto", random_state=0).fit(own).cluster_centers_
        middles = torch.as_tensor(middles, dtype=torch.float32)
        met = [(overlap(middles[:, None], boxes[None, boxes[:, 0] == k, 1:])[0] >= 0.5).any(1) for boxes in train]
        kinds.append(torch.full((number,), k))
        scores.append(torch.stack(met).float().mean(0))
        sides.append(middles)
    if not kinds:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, 4)
    order = torch.cat(scores).argsort(descending=True, stable=True)
    return torch.cat(kinds)[order], torch.cat(scores)[order], torch.cat(sides)[order]
