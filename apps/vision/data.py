"""From a recipe to train, validation and test images, with everything that was found on the way."""

import logging
from collections import Counter
from typing import Any

import torch

from apps.vision.augment import Augment
from apps.vision.batches import READING, Images, Reader
from apps.vision.boxes import BoxAugment, to_shares
from apps.vision.generated import CLASSES, KINDS, generate
from apps.vision.images import BrokenImage, check_image, shrunk
from apps.vision.parts import draw, find_copies, split
from apps.vision.recipe import DataSection, VisionRecipe, pair
from apps.vision.shapes import size_table
from apps.vision.sources import PARTS, Found, Item, find_items
from core.attention.registry import nearest
from core.training.data import Data
from core.training.errors import UserError
from core.training.files import find_file
from core.training.hub import HUB

log = logging.getLogger(__name__)
MOST_CLASSES = 20
"""Classes whose sizes are told at the start; the table of a run has them all."""


def build_data(recipe: VisionRecipe) -> Data:
    """Read or make the images, check them, and cut them into parts.

    Raises:
        UserError: one line for any mistake in the files.
    """
    options, task, size = recipe.data, recipe.model.task, pair(recipe.data.size)
    reading = {name: getattr(options, name) for name in READING}
    if options.resize == "native":
        from apps.vision.timm_models import patch_of

        assert recipe.model.timm is not None
        reading["patch"] = patch_of(recipe.model.timm)
    reader = Reader(None, task, size, reading)
    notes: dict[str, Any] = {}
    sizes: list[dict[str, Any]] = []
    if options.generated is not None:
        parts, classes = _generated(options, task, reader)
    else:
        found = _found(options, task)
        reader.store, notes = found.store, dict(found.notes)
        items, kept = _readable(found, reader, options, notes)
        classes = _classes(items, kept, options, task)
        reader.classes = len(classes) if task == "segments" else None
        split(items, options, task)
        sizes = _by_class(size_table(items, kept, task), classes, task)
        parts = _parts(items, kept, classes, reader, task, options.limit, notes)
        notes |= find_copies(parts)
    mean, std = _scale(recipe, parts["train"])
    if task == "boxes":
        parts["train"].augment = BoxAugment(recipe.augment, size, options.resize, [])
    elif any(getattr(recipe.augment, name) for name in ("crop", "flip", "flip_rows", "colour", "rand_augment")):
        fill = [255 * value for value in mean]
        parts["train"].augment = Augment(recipe.augment, size, options.resize, fill, reading.get("patch", 1))
    elif task in ("segments", "values"):
        plain = recipe.augment.model_copy(update={"flip": False})
        parts["train"].augment = Augment(plain, size, options.resize, [255 * value for value in mean])
    parts["test"].sizes = [pair(one) for one in recipe.model.eval_sizes]
    counts = _counts(parts["train"], classes, task, options.ignore)
    never = [name for name, count in zip(classes, counts) if not count]
    if never and (task != "segments" or len(parts["train"]) <= 500):
        log.warning("no training image shows %s, so nothing can be learned of it", ", ".join(never))
    spec = {
        "task": task,
        "classes": classes,
        "counts": counts,
        "size": list(size),
        "mean": mean,
        "std": std,
        "reading": reader.reading,
        "test_names": [item.name for item in parts["test"].items],
        "image_sizes": sizes,
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
    boxed = reader.task == "boxes"  # their images are read to the end in any case: boxes are shares of the whole
    for item in found.items:
        try:
            if options.cache:
                kept.append(reader.read(item))
            elif boxed:
                reader.read(item)
            else:
                source = found.store.read(item.image)
                item.shape = check_image(source) if not hasattr(source, "mode") else source.size[::-1]
            items.append(item)
        except BrokenImage as error:
            broken.append(f"{item.told()}: {error}")
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
        if len(found) < 2 and options.classes is None and kept:
            only = f"but {next(iter(found))}" if found else "that is scored"
            raise UserError(
                f"the masks hold no number {only}, which leaves nothing to learn; are they the right files?"
            )
        highest = max(found, default=1)
        absent = [] if options.classes else [value for value in range(min(highest, 256)) if value not in found]
        if absent:
            there = ", ".join(map(str, sorted(found)[:8])) + (", ..." if len(found) > 8 else "")
            raise UserError(
                f"the masks hold {there} but no {absent[0]} (the first with {highest} is that of {where[highest]}); "
                "name the classes, data.classes=[road,sky,...], or leave a number out, data.ignore=255"
            )
        names = options.classes or [str(value) for value in range(highest + 1)]
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
    if task == "boxes":
        labels = [list(dict.fromkeys(box[0] for box in item.label)) for item in items]
    else:
        labels = [item.label if isinstance(item.label, list) else [item.label] for item in items]
    there = {one for some in labels for one in some}
    names = options.classes or sorted(there, key=lambda name: (int(name) if name.isdigit() else -1, name))
    for item, some in zip(items, labels):
        for one in some:
            if one not in names:
                raise UserError(f"{item.name}: unknown class {one!r}{nearest(one, names)}; known: {', '.join(names)}")
    if not names:
        raise UserError("data.boxes hold no box")
    if len(names) < 2 and task != "boxes":
        raise UserError(f"one class ({', '.join(names)}) leaves nothing to learn; put images into a folder per class")
    return names


def _parts(
    items, kept, classes, reader: Reader, task: str, limit: int | None, notes: dict[str, Any]
) -> dict[str, Images]:
    parts, counted = {}, Counter()
    for part in PARTS:
        chosen = [n for n, item in enumerate(items) if item.part == part]
        if part == "train" and limit is not None and limit < len(chosen):
            notes["train_images_not_used"] = len(chosen) - limit
            chosen = draw(chosen, [items[n].label for n in chosen], limit)
        mine = [items[n] for n in chosen]
        parts[part] = Images(part, reader, mine, [_target(item, classes, task, counted) for item in mine], None)
        parts[part].kept = [kept[n] for n in chosen] if kept else None
    if counted["boxes_left_out_as_empty"]:
        log.warning("left out %d boxes without a pixel inside their image", counted["boxes_left_out_as_empty"])
    notes |= dict(counted)
    return parts


def _by_class(sizes: list[dict[str, Any]], classes: list[str], task: str) -> list[dict[str, Any]]:
    """The table of sizes with the names of the classes, whose numbers masks hold, in their order."""
    if task != "segments":
        return sizes
    names = {str(k): name for k, name in enumerate(classes)}
    return [row | {"class": names.get(row["class"], f"(ignored {row['class']})")} for row in sizes]


def _target(item: Item, classes: list[str], task: str, counted: Counter) -> Any:
    if task == "boxes":
        assert item.shape is not None
        return to_shares(item, item.shape, classes, counted)
    if task == "classes":
        return classes.index(item.label)
    return [float(name in item.label) for name in classes] if task == "labels" else 0


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
    """Training images (boxes; pixels, of up to 500 masks) per class."""
    if task in ("classes", "labels"):
        rows = torch.tensor(train.targets)
        return rows.bincount(minlength=len(classes)).tolist() if task == "classes" else rows.sum(0).int().tolist()
    if task == "values":
        return []
    if task == "boxes":
        return torch.cat(train.targets)[:, 0].long().bincount(minlength=len(classes)).tolist()
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
        how = "in the order of their making"
    elif options.lists:
        how = "lists"
    else:
        drawn = f"drawn by class: {options.val_share} val, {options.test_share} test"
        given = "splits of the data set" if (options.path or "").startswith(HUB) else "folders"
        how = "folders or column" if options.part_column or "PART" in options.images else f"{given}, else {drawn}"
    return {
        "source": "generated" if options.generated else options.path or options.file,
        "images": {part: len(images) for part, images in parts.items()},
        "classes": dict(zip(classes, spec["counts"])) or task,
        "split": how,
        "rows_x_columns": sizes,
        "median_rows_x_columns_by_class": {
            row["class"]: f"{row['rows_median']}x{row['columns_median']}" for row in spec["image_sizes"][:MOST_CLASSES]
        },
        "mean": spec["mean"],
        "std": spec["std"],
        **notes,
    }
