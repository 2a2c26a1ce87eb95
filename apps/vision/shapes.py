"""Sizes and kinds of image files by class: one that has a size or kind of its own can be told without looking."""

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from statistics import median
from typing import Any

from torch import Tensor

from apps.vision.images import SUFFIXES
from apps.vision.sources import Item


def size_table(items: Sequence[Item], kept: Sequence[tuple[Tensor, Tensor | None]], task: str) -> list[dict[str, Any]]:
    """A row per class: images, rows and columns (least, median, most), and how many files of each suffix.

    An image with several classes counts for each. Segments: classes are those that the masks hold, if these are kept.

    Args:
        items: all images that are used, their `shape` known.   kept: image and mask of each, or nothing.
        task: of the recipe.
    """
    groups: dict[str, list[Item]] = {}
    for n, item in enumerate(items):
        for name in _classes(item, kept[n][1] if kept else None, task):
            groups.setdefault(name, []).append(item)
    return [
        _row(name, groups[name]) for name in sorted(groups, key=lambda name: (len(name) if name.isdigit() else 0, name))
    ]


def _classes(item: Item, mask: Tensor | None, task: str) -> list[str]:
    if task == "segments" and mask is not None:
        return [str(value) for value in mask.unique().tolist()]
    if task == "boxes":
        return list(dict.fromkeys(box[0] for box in item.label)) or ["(no box)"]
    if task in ("classes", "labels"):
        return (item.label if isinstance(item.label, list) else [item.label]) or ["(no class)"]
    return ["(all)"]


def _row(name: str, items: Sequence[Item]) -> dict[str, Any]:
    row: dict[str, Any] = {"class": name, "images": len(items)}
    for at, side in enumerate(("rows", "columns")):
        sides = [item.shape[at] for item in items if item.shape is not None]
        row |= {f"{side}_least": min(sides), f"{side}_median": int(median(sides)), f"{side}_most": max(sides)}
    suffixes = (PurePosixPath(item.name).suffix.lower() for item in items)
    kinds = Counter(suffix if suffix in SUFFIXES else "unnamed" for suffix in suffixes)
    return row | {"files": " ".join(f"{suffix}:{number}" for suffix, number in kinds.most_common())}
