"""What a test pass leaves in the run folder: tables by class, image and size, and plots of them."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.vision.detection import BoxScores
from apps.vision.metrics import ClassScores, SegmentScores
from apps.vision.pictures import Kept, draw_sheet
from apps.vision.recipe import VisionRecipe, pair
from core.training.figures import canvas, draw_calibration, draw_confusion, draw_curves
from core.training.plots import COLOURS


def write_results(
    folder: Path,
    spec: dict[str, Any],
    recipe: VisionRecipe,
    scores: dict[str, Any],
    kept: Sequence[Kept],
    costs: dict[tuple[int, int], dict[str, float]],
) -> list[Path]:
    """Files of a test pass.

    Args:
        folder: of the run.   spec: of the data.   recipe: of the run.   kept: test images whose masks are drawn.
        scores: sums; "" is the pass itself, other names are other sizes ("at_64x64") and models.
        costs: of one image, by (rows, columns).
    """
    own = scores.get("")
    files: list[Path] = []
    if isinstance(own, ClassScores):
        files += _of_classes(folder, spec, own)
    elif isinstance(own, SegmentScores):
        files.append(_table(folder / "classes.csv", own.by_class()))
        predicted, labels = _spread(own.counts)
        what = f"pixels, in {len(labels):,} of all" if len(labels) < int(own.counts.sum()) else "pixels"
        files.append(draw_confusion(folder / "confusion.png", labels, predicted, spec["classes"], what))
    elif isinstance(own, BoxScores):
        files += [_table(folder / "classes.csv", own.by_class()), _precision(folder / "curves.png", own)]
    if spec.get("image_sizes"):
        files.append(_table(folder / "image_sizes.csv", spec["image_sizes"]))
    if kept:
        files.append(draw_sheet(folder / f"test_{'boxes' if isinstance(own, BoxScores) else 'masks'}.png", kept, spec))
    if recipe.model.eval_sizes:
        files += _by_size(folder, recipe, scores, costs)
    return files


def _of_classes(folder: Path, spec: dict[str, Any], own: ClassScores) -> list[Path]:
    probabilities, labels = own.arrays()
    names = spec["classes"]
    rows, files = [], []
    single = labels.ndim == 1
    predicted = probabilities.argmax(1) if single else (probabilities > 0.5).astype(int)
    for k, name in enumerate(names):
        true = labels == k if single else labels[:, k] == 1
        said = predicted == k if single else predicted[:, k] == 1
        hit = int((true & said).sum())
        precision = hit / said.sum() if said.sum() else None
        recall = hit / true.sum() if true.sum() else None
        f1 = 2 * hit / (said.sum() + true.sum()) if said.sum() + true.sum() else None
        rows.append({"class": name, "images": int(true.sum()), "precision": precision, "recall": recall, "f1": f1})
    files.append(_table(folder / "classes.csv", rows))
    images = []
    for n, (name, p) in enumerate(zip(spec["test_names"], probabilities)):
        truth = names[labels[n]] if single else spec_labels(names, labels[n])
        answer = names[predicted[n]] if single else spec_labels(names, predicted[n])
        images.append(
            {"image": name, "label": truth, "predicted": answer}
            | {f"p_{c}": round(float(x), 5) for c, x in zip(names, p)}
        )
    files.append(_table(folder / "test_predictions.csv", images))
    if single:
        files.append(draw_confusion(folder / "confusion.png", labels, predicted, names, "images"))
        files.append(draw_calibration(folder / "calibration.png", probabilities, labels))
        if len(np.unique(labels)) > 1:
            files.append(draw_curves(folder / "curves.png", probabilities, labels, names))
    return files


def _precision(path: Path, own: BoxScores) -> Path:
    """Precision by recall of each class, at overlaps of .5 and .75."""
    with canvas(path, 5, 4) as figure:
        axes = figure.add_subplot()
        for k, name in enumerate(own.classes[: len(COLOURS)]):
            for threshold, line in ((0.5, "-"), (0.75, ":")):
                precision, recall, true = own.curve(k, threshold)
                label = f"{name} ({true})" if threshold == 0.5 else None
                axes.plot(recall, precision, line, color=COLOURS[k], label=label)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.03), title="Overlap .5 (dotted: .75)")
        axes.legend()
    return path


def spec_labels(names: Sequence[str], flags: Any) -> str:
    """The classes that are on, apart by semicolons."""
    return ";".join(name for name, flag in zip(names, flags) if flag)


def _spread(counts: Tensor, most: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Pixels as (predicted, true) pairs in the proportions of a confusion matrix, at most so many."""
    shares = (counts.double() * min(1.0, most / max(1, int(counts.sum())))).round().long()
    labels, predicted = (x.flatten() for x in torch.meshgrid(*[torch.arange(len(counts))] * 2, indexing="ij"))
    times = shares.flatten()
    return predicted.repeat_interleave(times).numpy(), labels.repeat_interleave(times).numpy()


def sizes_of_test(recipe: VisionRecipe) -> list[tuple[int, int]]:
    """Sizes of the resolution-transfer table from small to large, that of the training among them; none: no table."""
    sizes = {pair(size) for size in (*recipe.model.eval_sizes, recipe.data.size)} if recipe.model.eval_sizes else set()
    return sorted(sizes, key=lambda size: size[0] * size[1])


def _by_size(folder: Path, recipe: VisionRecipe, scores: dict[str, Any], costs: dict[Any, Any]) -> list[Path]:
    """The resolution-transfer table: the primary metric and the costs at every size, and their plots."""
    primary = (recipe.judged_by() or ("accuracy", "higher"))[0]
    trained, rows = pair(recipe.data.size), []
    for size in sizes_of_test(recipe):
        figure = scores["" if size == trained else f"at_{size[0]}x{size[1]}"].compute()[primary]
        row = {"rows": size[0], "columns": size[1], "trained": int(size == trained), primary: figure}
        rows.append(row | costs[size])
    panels = {primary: f"test {primary}", "images_per_s": "images/s, one at a time", "peak_mb": "peak MB of a pass"}
    with canvas(folder / "sizes.png", 10, 3.2) as figure:
        for axes, (key, label) in zip(figure.subplots(1, 3), panels.items()):
            axes.plot([row["tokens"] for row in rows], [row[key] for row in rows], marker="o")
            axes.axvline(costs[trained]["tokens"], linestyle=":", linewidth=1)
            axes.set(xlabel="size of the test images (as tokens)", title=label, xscale="log")
            axes.set_xticks([row["tokens"] for row in rows], [f"{row['rows']}x{row['columns']}" for row in rows])
            axes.minorticks_off()
            axes.tick_params(axis="x", rotation=30)
        figure.suptitle("The same test images at several sizes (dotted: the size of the training)", fontsize=9)
    return [_table(folder / "sizes.csv", rows), folder / "sizes.png"]


def _table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["empty"])
        writer.writeheader()
        writer.writerows(
            {
                key: round(value, 5) if isinstance(value, float) else "" if value is None else value
                for key, value in row.items()
            }
            for row in rows
        )
    return path
