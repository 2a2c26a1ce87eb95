"""Masks and boxes as pictures: colours of classes, overlays, and the sheet of test images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from core.training.figures import canvas


@dataclass
class Kept:
    """A test image uint8 [C, h, w] at the model's size, with its truth and the answer.

    Both are a mask [H, W] of the image's own size; or boxes in shares of what is seen: [M, 5], and (classes, scores,
    sides) as `detection.best` gives them.
    """

    image: Tensor
    truth: Tensor
    answer: Any


def palette(classes: int) -> np.ndarray:
    """A colour per class, uint8 [K, 3], as different as many of them can be."""
    import matplotlib as mpl

    table = mpl.colormaps["tab20"]
    order = [*range(0, 20, 2), *range(1, 20, 2)]  # strong colours first, then the pale one of each
    return np.array([[round(255 * x) for x in table(order[k % 20])[:3]] for k in range(classes)], dtype=np.uint8)


def overlay(image: Tensor, answer: Tensor, classes: int) -> np.ndarray:
    """An image uint8 [C, H, W] under half-transparent colours of its classes [H, W]: uint8 [H, W, 3]."""
    base = _picture(image).astype(np.float32)
    known = (answer >= 0) & (answer < classes)
    paint = palette(classes)[answer.clamp(0, classes - 1).numpy()].astype(np.float32)
    mixed = 0.45 * base + 0.55 * paint
    return np.where(known.numpy()[..., None], mixed, base).astype(np.uint8)


def draw_sheet(path: Path, kept: Sequence[Kept], spec: dict[str, Any]) -> Path:
    """Image (under its name), truth and answer of some test images, side by side."""
    classes = len(spec["classes"])
    with canvas(path, 9, 2.2 * len(kept) + 0.4) as figure:
        axes = figure.subplots(len(kept), 3, squeeze=False)
        for name, row, one in zip(spec["test_names"], axes, kept):
            pictures = _of_boxes(one, classes) if isinstance(one.answer, tuple) else _of_maps(one, spec)
            limits = {} if classes else {"vmin": float(one.truth.min()), "vmax": float(one.truth.max())}
            for ax, picture, title in zip(row, pictures, (name, "truth", "answer")):
                ax.imshow(picture, **(limits if picture.ndim == 2 else {}))
                ax.set_title(title, fontsize=8)
                ax.axis("off")
        if classes:
            from matplotlib.patches import Patch

            colours = palette(classes) / 255
            handles = [Patch(color=colours[k], label=name) for k, name in enumerate(spec["classes"])]
            if spec["reading"]["ignore"] is not None:
                handles.append(Patch(facecolor="none", edgecolor="grey", label="no colour: not scored"))
            figure.legend(handles=handles, loc="outside lower center", ncols=min(6, classes), fontsize=8)
    return path


def _of_maps(one: Kept, spec: dict[str, Any]) -> list[np.ndarray]:
    classes, ignore = len(spec["classes"]), spec["reading"]["ignore"]
    shown = torch.nn.functional.interpolate(one.image[None].float(), size=one.truth.shape, mode="bilinear")[0].byte()
    if not classes:
        return [_picture(shown), one.truth.numpy(), one.answer.numpy()]
    truth = one.truth.masked_fill(one.truth >= classes, -1)
    truth = truth if ignore is None else truth.masked_fill(one.truth == ignore, -1)
    return [_picture(shown), overlay(shown, truth, classes), overlay(shown, one.answer, classes)]


def _of_boxes(one: Kept, classes: int) -> list[np.ndarray]:
    kinds, scores, sides = one.answer
    truth = with_boxes(one.image, one.truth[:, 0].long(), one.truth[:, 1:], [""] * len(one.truth), classes)
    answer = with_boxes(one.image, kinds, sides, [f"{score:.2f}" for score in scores.tolist()], classes)
    return [_picture(one.image), truth, answer]


def _picture(image: Tensor) -> np.ndarray:
    return image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()


def with_boxes(image: Tensor, kinds: Tensor, sides: Tensor, texts: Sequence[str], classes: int) -> np.ndarray:
    """An image uint8 [C, H, W] with boxes [P, 4] in shares of it, in the colours of their classes, a text at each."""
    picture = Image.fromarray(_picture(image))
    pen, colours = ImageDraw.Draw(picture), palette(classes)
    width = max(1, round(min(picture.size) / 160))
    for kind, box, text in zip(kinds.tolist(), sides.tolist(), texts):
        left, top, right, bottom = (x * end for x, end in zip(box, picture.size * 2))
        colour = tuple(int(x) for x in colours[kind])
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=width)
        if text:
            frame = pen.textbbox((left + width, top + width), text)
            pen.rectangle(frame, fill=colour)
            pen.text((left + width, top + width), text, fill="white")
    return np.array(picture)


def save_mask(path: Path, answer: Tensor) -> Path:
    """Class numbers [H, W] as a grey PNG, 8 bits where they fit, else 16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wide = answer.numel() and int(answer.max()) > 255
    Image.fromarray(answer.numpy().astype(np.uint16 if wide else np.uint8)).save(path)
    return path
