"""Boxes around things: where they are read from, and how they move with their image.

A box is [class, left, top, right, bottom]; inside the app the four sides are shares of the image's width and height, so
that scaling an image leaves its boxes alone. A frame is the part of an image that a model sees, in the same shares.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor

from apps.vision.augment import Augment
from apps.vision.images import fitted, placement, resized
from apps.vision.recipe import DataSection
from apps.vision.sources import Item
from core.attention.registry import nearest
from core.training.errors import UserError
from core.training.rows import read_rows

SIDES = ("left", "top", "right", "bottom")
LEAST = 1.0
"""A box that is narrower or lower than so many pixels inside its image is left out, and counted."""
Frame = tuple[float, float, float, float]


def items_with_boxes(names: Sequence[str], options: DataSection, path: Path) -> list[Item]:
    """Images below `data.images` and the boxes that `data.boxes` has for them, in pixels; none is an empty list.

    Raises:
        UserError: no such folder or table, a file or row that cannot be read, or boxes of an image that is not there.
    """
    place = path / str(options.boxes)
    if not place.exists():
        beside = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        raise UserError(f"data.boxes: there is no {place}{nearest(place.name, beside)}")
    start = PurePosixPath(options.images.strip("/")).parts
    items = [Item(name, name, label=[]) for name in names if PurePosixPath(name).parts[: len(start)] == start]
    if not items:
        raise UserError(f"{path}: no images in {options.images}")
    by_name: dict[str, list[Item]] = {}
    for item in items:
        full = PurePosixPath(item.name)
        for key in {str(full), full.name, full.stem}:
            by_name.setdefault(key, []).append(item)
    found = _from_folder(place) if place.is_dir() else _from_table(place)
    for where, image, box in found:
        matches = by_name.get(image) or by_name.get(PurePosixPath(image).name, [])
        if len(matches) != 1:
            said = "is not there" if not matches else f"is there {len(matches)} times; name its folder, too"
            raise UserError(f"{where}: image {image!r} {said}{nearest(image, by_name) if not matches else ''}")
        matches[0].label.append(box)
    return items


def _from_folder(folder: Path) -> Any:
    """(where, image, (class, left, top, right, bottom)) of every object in Pascal VOC's XML files."""
    files = sorted(folder.glob("*.xml"))
    if not files:
        raise UserError(f"{folder}: no .xml files; boxes are read from Pascal VOC files, or from a table")
    for file in files:
        try:
            root = ElementTree.parse(file).getroot()
            image = root.findtext("filename") or file.stem
            for thing in root.iter("object"):
                sides = _sides(thing.findtext(f"bndbox/{key}") or "" for key in ("xmin", "ymin", "xmax", "ymax"))
                yield str(file), image, (str(thing.findtext("name")).strip(), *sides)
        except (ElementTree.ParseError, ValueError) as error:
            raise UserError(f"{file}: not a Pascal VOC file of boxes ({error})") from error


def _from_table(path: Path) -> Any:
    for row in read_rows(path, columns=("image", "class", *SIDES)):
        try:
            sides = _sides(row.values[key] for key in SIDES)
        except (TypeError, ValueError) as error:
            raise UserError(f"{row.where}: left, top, right and bottom must be pixels of a box ({error})") from error
        yield row.where, str(row.values["image"]), (str(row.values["class"]).strip(), *sides)


def _sides(values: Iterable[Any]) -> list[float]:
    """left, top, right, bottom as numbers; ValueError where they are none, or run backwards."""
    left, top, right, bottom = sides = [float(value) for value in values]
    if not all(math.isfinite(side) for side in sides):
        raise ValueError(f"not finite: {sides}")
    if right < left or bottom < top:
        raise ValueError(f"right and bottom come after left and top, got {left:g}, {top:g}, {right:g}, {bottom:g}")
    return sides


def to_shares(item: Item, shape: Sequence[int], classes: Sequence[str], notes: Counter) -> Tensor:
    """Boxes of an item [M, 5] for an image of `shape` (rows, columns); what leaves the image is cut off and counted."""
    kept = []
    for name, left, top, right, bottom in item.label:
        sides = [min(max(0.0, x), end) for x, end in zip((left, top, right, bottom), (shape[1], shape[0]) * 2)]
        notes["boxes_cut_at_the_border"] += sides != [left, top, right, bottom]
        if sides[2] - sides[0] < LEAST or sides[3] - sides[1] < LEAST:
            notes["boxes_left_out_as_empty"] += 1
            continue
        kept.append([classes.index(name), *(x / end for x, end in zip(sides, (shape[1], shape[0]) * 2))])
    return torch.tensor(kept, dtype=torch.float32).reshape(-1, 5)


def frame_of(shape: Sequence[int], size: tuple[int, int], resize: str, ratio: float) -> Frame:
    """What of an image of `shape` a model of `size` sees; beyond 1 where `pad` adds a border."""
    place = placement(shape, size, resize, ratio)
    (top, left), (high, wide) = place.corner, place.scaled
    return left / wide, top / high, (left + size[1]) / wide, (top + size[0]) / high


def seen(boxes: Tensor, frame: Frame) -> Tensor:
    """Boxes [..., 5] of an image as shares of a frame of it; not cut."""
    start, length = _ends(frame)
    return torch.cat((boxes[..., :1], (boxes[..., 1:] - start) / length), -1)


def unseen(sides: Tensor, frame: Frame) -> Tensor:
    """Sides [..., 4] in shares of a frame as shares of its image, cut at the image's border; the way back."""
    start, length = _ends(frame)
    return (sides * length.to(sides) + start.to(sides)).clamp(0, 1)


def _ends(frame: Frame) -> tuple[Tensor, Tensor]:
    start = torch.tensor(frame[:2]).repeat(2)
    return start, torch.tensor(frame[2:]).repeat(2) - start


class BoxAugment(Augment):
    """The same crops, mirrors and colours, for an image and its boxes."""

    def boxed(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """uint8 [C, H, W] and boxes [M, 5] -> image at `size`, boxes whose middle is still seen, real rows, columns."""
        options, real, shape = self.options, self.size, image.shape[1:]
        if options.crop is not None:
            top, left, rows, columns = self._box(*shape)
            frame = (left / shape[1], top / shape[0], (left + columns) / shape[1], (top + rows) / shape[0])
            image = resized(image[:, top : top + rows, left : left + columns], self.size)
        else:
            frame = frame_of(shape, self.size, self.resize, 1.0)
            image, real = fitted(image, self.size, self.resize)
        boxes = seen(boxes, frame)
        middle = (boxes[:, 1:3] + boxes[:, 3:5]) / 2
        boxes = boxes[((middle > 0) & (middle < 1)).all(1)].clone()
        boxes[:, 1:] = boxes[:, 1:].clamp(0, 1)
        for wanted, dim, (a, b) in ((options.flip, -1, (1, 3)), (options.flip_rows, -2, (2, 4))):
            if wanted and real == self.size and torch.rand(()) < 0.5:
                image = image.flip(dim)
                boxes[:, [a, b]] = 1 - boxes[:, [b, a]]
        return self._coloured(image) if options.colour else image, boxes, real
