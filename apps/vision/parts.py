"""How images are cut into train, validation and test: by class, with the same draw in every run, and without leaks."""

import hashlib
import logging
from collections import Counter
from typing import Any

import torch

from apps.vision.batches import Images
from apps.vision.recipe import DataSection
from apps.vision.sources import Item
from core.training.errors import UserError

log = logging.getLogger(__name__)


def split(items: list[Item], options: DataSection, task: str) -> None:
    """Give every item its part: its own, or drawn by class with the same draw in every run."""
    free = [item for item in items if not item.part]
    if free and len(free) < len(items):
        raise UserError(f"some images belong to a part and others to none, such as {free[0].name}")
    groups: dict[Any, list[Item]] = {}
    for item in free:
        groups.setdefault(item.label if task == "classes" else "", []).append(item)
    generator = torch.Generator().manual_seed(0)
    for _, group in sorted(groups.items(), key=lambda pair: str(pair[0])):
        order = torch.randperm(len(group), generator=generator).tolist()
        tests, vals = round(options.test_share * len(group)), round(options.val_share * len(group))
        for rank, at in enumerate(order):
            group[at].part = "test" if rank < tests else "val" if rank < tests + vals else "train"
    there = Counter(item.part for item in items)
    for part, share in (("val", options.val_share), ("test", options.test_share)):
        if free and share and not there[part]:
            log.warning("no image for %s: data.%s_share=%g of each class is less than half an image", part, part, share)
    if not free and "train" in there and "val" not in there and options.val_share:
        # Parts were given, but no validation: it is taken from the training images.
        train = [item for item in items if item.part == "train"]
        for item in train:
            item.part = ""
        split(train, options.model_copy(update={"test_share": 0.0}), task)
    if not there["train"]:
        raise UserError(
            f"no image belongs to the training part; there are: {', '.join(f'{part} {n}' for part, n in there.items())}"
        )


def draw(chosen: list[int], labels: list[Any], limit: int) -> list[int]:
    """`limit` of the items, each class with its share, the same draw in every run."""
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(1)).tolist()
    counts: Counter[str] = Counter()
    totals = Counter(map(str, labels))
    # An item's rank within its class, as a share of the class: the smallest shares come first.
    ranked = []
    for at in order:
        name = str(labels[at])
        ranked.append((counts[name] / totals[name], at))
        counts[name] += 1
    return sorted(chosen[at] for _, at in sorted(ranked)[:limit])


def find_copies(parts: dict[str, Images]) -> dict[str, Any]:
    """Images that are the same to the last pixel in two parts: a leak."""
    seen: dict[bytes, tuple[str, str]] = {}
    copies = []
    for part, images in parts.items():
        for item, (image, _) in zip(images.items, images.kept or []):
            key = hashlib.sha256(image.numpy().tobytes()).digest()
            first = seen.setdefault(key, (part, item.name))
            if first[0] != part:
                copies.append(f"{item.name} ({part}) = {first[1]} ({first[0]})")
    if copies:
        log.warning("%d images stand in two parts, the first is %s", len(copies), copies[0])
    return {"copies_between_parts": {"count": len(copies), "files": copies[:20]}}
