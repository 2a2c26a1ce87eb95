"""From a recipe to train, validation and test images, with everything that was found on the way."""

import hashlib
import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from apps.vision.augment import Augment
from apps.vision.generated import CLASSES, KINDS, generate
from apps.vision.images import (
    BrokenImage,
    check_image,
    fitted,
    read_image,
    read_mask,
    read_values,
    resized_mask,
    shrunk,
)
from apps.vision.recipe import DataSection, VisionRecipe, pair
from apps.vision.sources import PARTS, Found, Item, Store, find_items
from core.training.data import Data
from core.training.errors import UserError
from core.training.files import find_file
from core.training.rows import HUB

log = logging.getLogger(__name__)

READING = ("channels", "resize", "crop_ratio", "shrink", "ignore")
"""Options of `data` that say how an image is read; `predict` reads the next one in the same way."""


class Images(Dataset):
    """One part: images, their classes or masks, as whole batches.

    Items are kept as read (uint8, as large as data.shrink leaves them) with `cache`, else read each time. A batch
    is {"image": uint8 [B, C, H, W], "real": [B, 2] rows and columns that are no border, "index": [B]} and "label" [B]
    or [B, K]; or "mask" [B, H, W] in training, and in evaluation a list of masks in their own size.
    """

    def __init__(self, part: str, reader: "Reader", items: list[Item], targets: list[Any], augment: Augment | None):
        self.part, self.reader, self.items, self.targets, self.augment = part, reader, items, targets, augment
        self.kept: list[tuple[Tensor, Tensor | None]] | None = None
        self.sizes: list[tuple[int, int]] = []  # others at which the part is scored, too

    def __len__(self) -> int:
        return len(self.items)

    def get(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Image and mask as they are read."""
        image, mask = self.kept[index] if self.kept is not None else self.reader.read(self.items[index])
        return image, mask.long() if mask is not None and not mask.is_floating_point() else mask

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        images, masks, reals = [], [], []
        others: dict[str, list[Tensor]] = {}
        for index in indices:
            image, mask = self.get(index)
            if self.augment is not None:
                smaller = mask if mask is None else resized_mask(mask, (image.shape[1], image.shape[2]))
                image, mask, real = self.augment(image, smaller)
            else:
                for size in self.sizes:
                    others.setdefault(f"at_{size[0]}x{size[1]}", []).append(self.reader.fitted(image, size)[0])
                image, real = self.reader.fitted(image)
            images.append(image)
            masks.append(mask)
            reals.append(real)
        batch: dict[str, Any] = {
            "image": torch.stack(images),
            "real": torch.tensor(reals),
            "index": torch.tensor(indices),
            "part": self.part,
        }
        if others:
            batch["sizes"] = {name: torch.stack(some) for name, some in others.items()}
        if masks[0] is None:
            batch["label"] = torch.stack([torch.as_tensor(self.targets[index]) for index in indices])
        else:
            batch["mask"] = torch.stack(masks) if self.augment is not None else masks
        return batch


class Reader:
    """How items are read and brought to size, the same for training and for `predict`."""

    def __init__(self, store: Store | None, task: str, size: tuple[int, int], reading: dict[str, Any]):
        self.store, self.task, self.size, self.reading = store, task, size, reading

    def read(self, item: Item) -> tuple[Tensor, Tensor | None]:
        """Image uint8 [C, H, W] and mask [H, W] of an item.

        Raises:
            BrokenImage: it cannot be read, or the mask has another size than the image.
        """
        assert self.store is not None
        image = read_image(self.store.read(item.image), self.reading["channels"])
        if item.mask is None:
            return shrunk(image, self.reading["shrink"]), None
        mask = (read_mask if self.task == "segments" else read_values)(self.store.read(item.mask))
        if self.task == "segments" and int(mask.max()) < 256:
            mask = mask.to(torch.uint8)  # an eighth of the memory
        if mask.shape != image.shape[1:]:
            raise BrokenImage(f"its mask has {list(mask.shape)} pixels, the image {list(image.shape[1:])}")
        return shrunk(image, self.reading["shrink"]), mask

    def fitted(self, image: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, tuple[int, int]]:
        """The image at the model's size, see `images.fitted`."""
        return fitted(image, size or self.size, self.reading["resize"], self.reading["crop_ratio"])


def build_data(recipe: VisionRecipe) -> Data:
    """Read or make the images, check them, and cut them into parts.

    Raises:
        UserError: one line for any mistake in the files.
    """
    options, task, size = recipe.data, recipe.model.task, pair(recipe.data.size)
    reader = Reader(None, task, size, {name: getattr(options, name) for name in READING})
    notes: dict[str, Any] = {}
    if options.generated is not None:
        parts, classes = _generated(options, task, reader)
    else:
        found = _found(options, task)
        reader.store, notes = found.store, dict(found.notes)
        items, kept = _readable(found, reader, options, notes)
        classes = _classes(items, kept, options, task)
        _split(items, options, task)
        parts = _parts(items, kept, classes, reader, task, options.limit, notes)
        notes |= _copies(parts)
    mean, std = _scale(recipe, parts["train"])
    if any(getattr(recipe.augment, name) for name in ("crop", "flip", "flip_rows", "colour", "rand_augment")):
        parts["train"].augment = Augment(recipe.augment, size, options.resize, [255 * value for value in mean])
    elif task in ("segments", "values"):
        plain = recipe.augment.model_copy(update={"flip": False})
        parts["train"].augment = Augment(plain, size, options.resize, [255 * value for value in mean])
    parts["test"].sizes = [pair(one) for one in recipe.model.eval_sizes]
    counts = _counts(parts["train"], classes, task, options.ignore)
    spec = {
        "task": task,
        "classes": classes,
        "counts": counts,
        "size": list(size),
        "mean": mean,
        "std": std,
        "reading": reader.reading,
        "test_names": [item.name for item in parts["test"].items],
    }
    summary = _summary(options, parts, classes, spec, notes, task)
    val, test = (parts[part] if len(parts[part]) else None for part in ("val", "test"))
    return Data(parts["train"], val, test, spec=spec, summary=summary)


def _generated(options: DataSection, task: str, reader: Reader) -> tuple[dict[str, Images], list[str]]:
    try:
        scenes = generate(options.generated)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(str(error)) from error
    number = len(scenes.images)
    tests, vals = (max(1, round(share * number)) for share in (options.test_share, options.val_share))
    ends = {
        "train": (0, number - vals - tests),
        "val": (number - vals - tests, number - tests),
        "test": (number - tests, number),
    }
    images = scenes.images if options.channels == "rgb" else scenes.images.float().mean(1, keepdim=True).to(torch.uint8)
    parts = {}
    for part, (a, b) in ends.items():
        items = [Item(f"scene {n}", None, part=part) for n in range(a, b)]
        parts[part] = Images(part, reader, items, scenes.labels[a:b].tolist(), None)
        parts[part].kept = [
            (shrunk(images[n], options.shrink), scenes.masks[n] if task == "segments" else None) for n in range(a, b)
        ]
        parts[part].truth = scenes.truth[a:b]  # type: ignore[attr-defined]
    return parts, list(KINDS if task == "segments" else CLASSES)


def _found(options: DataSection, task: str) -> Found:
    if options.path is not None and options.path.startswith(HUB):
        return find_items(options.path, options, task)
    path = find_file(options.path, app="vision", public=options.file, origin=options.origin)
    return find_items(path, options, task)


def _readable(
    found: Found, reader: Reader, options: DataSection, notes: dict[str, Any]
) -> tuple[list[Item], list[Any]]:
    """Items whose files are whole; all are decoded where they are kept, else their heads are looked at."""
    items, kept, broken = [], [], []
    for item in found.items:
        try:
            if options.cache:
                kept.append(reader.read(item))
            else:
                source = found.store.read(item.image)
                if not hasattr(source, "mode"):
                    check_image(source)
            items.append(item)
        except BrokenImage as error:
            broken.append(f"{item.name}: {error}")
    if broken and options.on_broken == "error":
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise UserError(f"cannot read {broken[0]}{more}; data.on_broken=skip leaves such images out and names them")
    if not items:
        raise UserError(f"none of {len(broken)} images can be read, the first is {broken[0]}")
    if broken:
        log.warning("left out %d images that cannot be read, the first is %s", len(broken), broken[0])
    notes["broken"] = {"count": len(broken), "files": broken[:50]}
    return items, kept


def _classes(items: list[Item], kept: list[Any], options: DataSection, task: str) -> list[str]:
    """Names of the classes; every label and every number in a mask is checked against them."""
    if task == "values":
        return []
    if task == "segments":
        found: Counter[int] = Counter()
        where: dict[int, str] = {}
        for item, (_, mask) in zip(items, kept):
            for value in mask.unique().tolist():
                found[value] += 1
                where.setdefault(value, item.name)
        if options.ignore is not None:
            found.pop(options.ignore, None)
        if not kept and options.classes is None:
            raise UserError("data.cache=false reads masks late, so name the classes: data.classes=[road,sky,...]")
        names = options.classes or [str(value) for value in range(max(found, default=1) + 1)]
        wrong = sorted(value for value in found if not 0 <= value < len(names))
        if wrong:
            raise UserError(
                f"the mask of {where[wrong[0]]} holds the number {wrong[0]}; known: 0 to {len(names) - 1}"
                + (
                    f" and {options.ignore} (ignored)"
                    if options.ignore is not None
                    else "; data.ignore=N leaves one out"
                )
            )
        return names
    labels = [item.label if isinstance(item.label, list) else [item.label] for item in items]
    there = {one for some in labels for one in some}
    names = options.classes or sorted(there, key=lambda name: (int(name) if name.isdigit() else -1, name))
    for item, some in zip(items, labels):
        for one in some:
            if one not in names:
                from core.attention.registry import nearest

                raise UserError(f"{item.name}: unknown class {one!r}{nearest(one, names)}; known: {', '.join(names)}")
    if len(names) < 2:
        raise UserError(f"one class ({', '.join(names)}) leaves nothing to learn; put images into a folder per class")
    return names


def _split(items: list[Item], options: DataSection, task: str) -> None:
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
    if not free and "train" in there and "val" not in there and options.val_share:
        # Parts were given, but no validation: it is taken from the training images.
        train = [item for item in items if item.part == "train"]
        for item in train:
            item.part = ""
        _split(train, options.model_copy(update={"test_share": 0.0}), task)
    if not there["train"]:
        raise UserError(f"no image belongs to the training part; found {dict(there)}")


def _parts(
    items, kept, classes, reader: Reader, task: str, limit: int | None, notes: dict[str, Any]
) -> dict[str, Images]:
    parts = {}
    for part in PARTS:
        chosen = [n for n, item in enumerate(items) if item.part == part]
        if part == "train" and limit is not None and limit < len(chosen):
            notes["train_images_not_used"] = len(chosen) - limit
            chosen = _drawn(chosen, [items[n].label for n in chosen], limit)
        mine = [items[n] for n in chosen]
        parts[part] = Images(part, reader, mine, [_target(item, classes, task) for item in mine], None)
        parts[part].kept = [kept[n] for n in chosen] if kept else None
    return parts


def _drawn(chosen: list[int], labels: list[Any], limit: int) -> list[int]:
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


def _target(item: Item, classes: list[str], task: str) -> Any:
    if task == "classes":
        return classes.index(item.label)
    return [float(name in item.label) for name in classes] if task == "labels" else 0


def _copies(parts: dict[str, Images]) -> dict[str, Any]:
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


def _scale(recipe: VisionRecipe, train: Images) -> tuple[list[float], list[float]]:
    """Mean and deviation per channel: the recipe's, the timm model's, or those of up to 500 training images."""
    options = recipe.data
    if options.mean is not None and options.std is not None:
        given = options.mean, options.std
    elif recipe.model.timm is not None and options.channels == "rgb":
        from apps.vision.timm_models import statistics

        given = statistics(recipe.model.timm)
    else:
        step = max(1, len(train) // 500)
        sums = torch.zeros(3, 3 if options.channels == "rgb" else 1, dtype=torch.float64)
        for index in range(0, len(train), step):
            values = train.get(index)[0].double().flatten(1) / 255
            sums += torch.stack((torch.full_like(values[:, 0], values.shape[1]), values.sum(1), values.square().sum(1)))
        mean = sums[1] / sums[0].clamp(min=1)
        std = (sums[2] / sums[0].clamp(min=1) - mean.square()).clamp(min=1e-4).sqrt()
        given = mean.tolist(), std.tolist()
    wanted = 3 if options.channels == "rgb" else 1
    if len(given[0]) != wanted or len(given[1]) != wanted:
        raise UserError(f"data.mean and data.std must have {wanted} numbers for data.channels={options.channels}")
    return [round(x, 5) for x in given[0]], [round(x, 5) for x in given[1]]


def _counts(train: Images, classes: list[str], task: str, ignore: int | None) -> list[int]:
    """Training images (pixels, of up to 500 masks) per class."""
    if task in ("classes", "labels"):
        rows = torch.tensor(train.targets)
        return rows.bincount(minlength=len(classes)).tolist() if task == "classes" else rows.sum(0).int().tolist()
    if task == "values":
        return []
    total = torch.zeros(len(classes), dtype=torch.int64)
    for index in range(0, len(train), max(1, len(train) // 500)):
        mask = train.get(index)[1]
        assert mask is not None
        valid = mask[(mask >= 0) & (mask != (-1 if ignore is None else ignore))]
        total += valid.bincount(minlength=len(classes))[: len(classes)]
    return total.tolist()


def _summary(options: DataSection, parts, classes, spec, notes, task) -> dict[str, Any]:
    sizes = {}
    for part, images in parts.items():
        shapes = Counter(f"{image.shape[1]}x{image.shape[2]}" for image, _ in images.kept or [])
        sizes[part] = dict(shapes.most_common(5)) if shapes else "read one by one"
    if options.generated is not None:
        split = "in the order of their making"
    elif options.lists:
        split = "lists"
    else:
        drawn = f"drawn by class: {options.val_share} val, {options.test_share} test"
        split = "folders or column" if options.part_column or "PART" in options.images else f"folders, else {drawn}"
    return {
        "source": "generated" if options.generated else options.path or options.file,
        "images": {part: len(images) for part, images in parts.items()},
        "classes": dict(zip(classes, spec["counts"])) or task,
        "split": split,
        "rows_x_columns": sizes,
        "mean": spec["mean"],
        "std": spec["std"],
        **notes,
    }
