"""What a test pass leaves in the run folder: tables by class, image and size, and plots of them."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apps.vision.metrics import ClassScores, SegmentScores
from apps.vision.recipe import VisionRecipe, pair
from core.training.figures import canvas, draw_calibration, draw_confusion, draw_curves


@dataclass
class Kept:
    """A test image uint8 [C, h, w] at the model's size, its mask and the answer [H, W] at its own."""

    image: Tensor
    mask: Tensor
    answer: Tensor


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
        files.append(draw_confusion(folder / "confusion.png", labels, predicted, spec["classes"]))
    if kept:
        files.append(_sheet(folder / "test_masks.png", kept, spec))
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
        files.append(draw_confusion(folder / "confusion.png", labels, predicted, names))
        files.append(draw_calibration(folder / "calibration.png", probabilities, labels))
        if len(np.unique(labels)) > 1:
            files.append(draw_curves(folder / "curves.png", probabilities, labels, names))
    return files


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
        figure.suptitle("At other sizes than trained at (dotted)", fontsize=9)
    return [_table(folder / "sizes.csv", rows), folder / "sizes.png"]


def palette(classes: int) -> np.ndarray:
    """A colour per class, uint8 [K, 3], as different as many of them can be."""
    import matplotlib as mpl

    table = mpl.colormaps["tab20" if classes > 10 else "tab10"]
    return np.array([[round(255 * x) for x in table(k % table.N)[:3]] for k in range(classes)], dtype=np.uint8)


def overlay(image: Tensor, answer: Tensor, classes: int) -> np.ndarray:
    """An image uint8 [C, H, W] under half-transparent colours of its classes [H, W]: uint8 [H, W, 3]."""
    base = image.expand(3, -1, -1).permute(1, 2, 0).numpy().astype(np.float32)
    known = (answer >= 0) & (answer < classes)
    paint = palette(classes)[answer.clamp(0, classes - 1).numpy()].astype(np.float32)
    mixed = 0.45 * base + 0.55 * paint
    return np.where(known.numpy()[..., None], mixed, base).astype(np.uint8)


def _sheet(path: Path, kept: Sequence[Kept], spec: dict[str, Any]) -> Path:
    """Image, truth and answer of some test images, side by side."""
    classes = len(spec["classes"])
    with canvas(path, 9, 2.2 * len(kept) + 0.4) as figure:
        axes = figure.subplots(len(kept), 3, squeeze=False)
        for row, one in zip(axes, kept):
            shown = torch.nn.functional.interpolate(one.image[None].float(), size=one.mask.shape, mode="bilinear")[
                0
            ].byte()
            pictures: list[Any] = [shown.expand(3, -1, -1).permute(1, 2, 0).numpy()]
            if classes:
                truth = one.mask.masked_fill(one.mask >= classes, -1)
                ignore = spec["reading"]["ignore"]
                truth = truth if ignore is None else truth.masked_fill(one.mask == ignore, -1)
                pictures += [overlay(shown, truth, classes), overlay(shown, one.answer, classes)]
            else:
                pictures += [one.mask.numpy(), one.answer.numpy()]
            limits = {} if classes else {"vmin": float(one.mask.min()), "vmax": float(one.mask.max())}
            for ax, picture, title in zip(row, pictures, ("image", "truth", "answer")):
                ax.imshow(picture, **(limits if picture.ndim == 2 else {}))
                ax.set_title(title, fontsize=8)
                ax.axis("off")
        if classes:
            from matplotlib.patches import Patch

            colours = palette(classes) / 255
            handles = [Patch(color=colours[k], label=name) for k, name in enumerate(spec["classes"])]
            figure.legend(handles=handles, loc="outside lower center", ncols=min(6, classes), fontsize=8)
    return path


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


def save_mask(path: Path, answer: Tensor) -> Path:
    """Class numbers [H, W] as a grey PNG, 8 bits where they fit, else 16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wide = answer.numel() and int(answer.max()) > 255
    Image.fromarray(answer.numpy().astype(np.uint16 if wide else np.uint8)).save(path)
    return path
