"""Predict for a user's images, from a run folder alone: a table of classes, or masks and overlays in their own size."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apps.vision.batches import Reader, as_batch
from apps.vision.boxes import SIDES
from apps.vision.images import SUFFIXES, BrokenImage, normalised, read_image, resized, restored, shrunk
from apps.vision.pictures import overlay, save_mask, with_boxes
from apps.vision.recipe import PredictSection, VisionRecipe, pair
from apps.vision.results import spec_labels
from apps.vision.sources import Store
from apps.vision.task import BORDERED, VisionTask
from apps.vision.tiling import slide
from core.training.errors import UserError
from core.training.run import LoadedRun


def predict(run: LoadedRun, input: Path, output: Path) -> list[Path]:
    """Predict for one image or a folder of them, at any depth.

    Classes and labels: `output` is a CSV with a row per image: image, predicted, p_<class> for every class.
    Segments: `output` is a folder; each image gets a mask NAME.png of class numbers in its own size, and an overlay
    NAME_overlay.png. Values: NAME.tif of 32-bit floats. Boxes: a CSV with a row per box (image, class, score, and left,
    top, right, bottom in pixels of the image), or a folder with boxes.csv and a picture NAME_boxes.png each. Images
    keep their relative names. An image that cannot be read is an error; with data.on_broken=skip in the recipe of the
    run it gets a row or a line in broken.txt.

    Args:
        run: the trained run; classes, size and reading options come from its checkpoint.
        input: image or folder.   output: CSV file or folder to write.

    Raises:
        UserError: no image is found, the output has the wrong form for the task, or an answer would take the place of
            an image or of another answer.
    """
    task, recipe = run.task, run.recipe
    assert isinstance(task, VisionTask)
    assert isinstance(recipe, VisionRecipe)
    names, root = find_images(input)
    if output.suffix.lower() != ".csv":
        check_stems(names)
    dense = task.kind in ("segments", "values")
    if task.kind == "boxes":
        if output.suffix and output.suffix.lower() != ".csv":
            raise UserError(f"--output {output}: boxes are written to a .csv file, or with pictures to a folder")
        if output.suffix.lower() != ".csv":
            _check_places(root, names, output, ["_boxes.png"])
        with torch.no_grad():
            return _boxes(task, recipe, root, names, output)
    if not dense and output.suffix.lower() != ".csv":
        raise UserError(f"--output {output}: {task.kind} are written to a .csv file")
    if dense and (output.suffix or output.is_file()):
        raise UserError(f"--output {output}: masks are written to a folder")
    if dense:
        _check_places(root, names, output, [".tif"] if task.kind == "values" else [".png", "_overlay.png"])
    with torch.no_grad():
        return _masks(task, recipe, root, names, output) if dense else _classes(task, recipe, root, names, output)


def _check_places(root: Path, names: list[str], output: Path, endings: list[str]) -> None:
    """Refuse an answer that would be written over an image that is read, or over the answer for another one."""
    taken: dict[str, str] = {}
    beside = output.is_dir() and output.samefile(root)
    for name in names:
        for ending in endings:
            place = f"{PurePosixPath(name).with_suffix('')}{ending}"
            if place in taken:
                raise UserError(f"{taken[place]} and {name} would both be answered in {output / place}; rename one")
            if beside and place in names:
                raise UserError(f"--output {output}: {place} would be written over; choose another folder")
            taken[place] = name


def find_images(input: Path) -> tuple[list[str], Path]:
    """Relative names of the images that the user means, and the folder that they are relative to.

    Raises:
        UserError: there is none.
    """
    if input.is_file():
        return [input.name], input.parent
    names = Store(input).names()
    if not names:
        raise UserError(f"{input}: no images; known suffixes: {' '.join(SUFFIXES)}")
    return names, input


@contextmanager
def whole(path: Path) -> Iterator[TextIO]:
    """A table that is there when the block ends, and what was there before where it does not."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", newline="", encoding="utf-8") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def check_stems(names: list[str]) -> None:
    """Raise UserError where two images would be written under one name, as a.jpg and a.png."""
    taken: dict[PurePosixPath, str] = {}
    for name in names:
        before = taken.setdefault(PurePosixPath(name).with_suffix(""), name)
        if before != name:
            raise UserError(f"{before} and {name} would be written under one name; rename one of them")


def _read(root: Path, names: list[str], recipe: VisionRecipe, broken: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        try:
            yield name, read_image(root / name, recipe.data.channels)
        except BrokenImage as error:
            if recipe.data.on_broken == "error":
                raise UserError(f"cannot read {root / name}: {error}") from error
            broken.append(f"{name}: {error}")


def reader_of(task: VisionTask, settings: PredictSection) -> Reader:
    """How this run reads an image, at the size that `predict.size` or the run's training says."""
    size = pair(settings.size) if settings.size is not None else (task.spec["size"][0], task.spec["size"][1])
    patch = task.model.backbone.patch
    if size[0] % patch or size[1] % patch:
        near = [max(patch, round(side / patch) * patch) for side in size]
        raise UserError(
            f"predict.size={list(size)} does not divide into patches of {patch}; the nearest size is {near}"
        )
    return Reader(None, task.kind, size, task.spec["reading"])


def _classes(task: VisionTask, recipe: VisionRecipe, root: Path, names: list[str], output: Path) -> list[Path]:
    settings, classes = recipe.predict, task.spec["classes"]
    reader, broken = reader_of(task, settings), []
    with whole(output) as file:
        writer = csv.writer(file)
        writer.writerow(["image", "predicted", *(f"p_{name}" for name in classes)])
        for some in _batched(_read(root, names, recipe, broken), settings.batch_size):
            images, real = as_batch([reader.fitted(shrunk(image, recipe.data.shrink)) for _, image in some])
            shown = real if recipe.data.resize in BORDERED else None
            logits = task.answer(normalised(images, task.mean, task.std), shown, flips=settings.flips)
            chances = logits.softmax(-1) if task.kind == "classes" else logits.sigmoid()
            for (name, _), row in zip(some, chances):
                said = classes[int(row.argmax())] if task.kind == "classes" else spec_labels(classes, row > 0.5)
                writer.writerow([name, said, *(f"{value:.5f}" for value in row.tolist())])
        for line in broken:
            writer.writerow([line.split(": ")[0], f"not read: {line.split(': ', 1)[1]}", *[""] * len(classes)])
    return [output]


def _masks(task: VisionTask, recipe: VisionRecipe, root: Path, names: list[str], output: Path) -> list[Path]:
    output.mkdir(parents=True, exist_ok=True)
    files, broken = [], []
    for name, image in _read(root, names, recipe, broken):
        maps = segment(task, recipe, image)
        place = output / PurePosixPath(name)
        if task.kind == "values":
            target = place.with_suffix(".tif")
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(maps[0].numpy().astype(np.float32)).save(target)
            files.append(target)
            continue
        answer = maps.argmax(0)
        files.append(save_mask(place.with_suffix(".png"), answer))
        painted = place.with_name(f"{place.stem}_overlay.png")
        Image.fromarray(overlay(image, answer, len(task.spec["classes"]))).save(painted)
        files.append(painted)
    if broken:
        (output / "broken.txt").write_text("\n".join(broken) + "\n", encoding="utf-8")
        files.append(output / "broken.txt")
    return files


def _boxes(task: VisionTask, recipe: VisionRecipe, root: Path, names: list[str], output: Path) -> list[Path]:
    settings, classes = recipe.predict, task.spec["classes"]
    reader, broken = reader_of(task, settings), []
    drawn = output.suffix.lower() != ".csv"
    table = output / "boxes.csv" if drawn else output
    table.parent.mkdir(parents=True, exist_ok=True)
    files = [table]
    with whole(table) as file:
        writer = csv.writer(file)
        writer.writerow(["image", "class", "score", *SIDES])
        for name, image in _read(root, names, recipe, broken):
            shape = (image.shape[1], image.shape[2])
            x, real = reader.fitted(shrunk(image, recipe.data.shrink))
            shown = torch.tensor([real]) if recipe.data.resize == "pad" else None
            answer = task.answer(normalised(x[None], task.mean, task.std), shown)[0]
            kinds, scores, sides = task.boxes(answer, shape, x.shape[1:])
            sure = scores >= settings.threshold
            kinds, scores, sides = kinds[sure], scores[sure], sides[sure]
            pixels = sides * torch.tensor([shape[1], shape[0]]).repeat(2)
            for kind, score, box in zip(kinds.tolist(), scores.tolist(), pixels.tolist()):
                writer.writerow([name, classes[kind], f"{score:.5f}", *(f"{side:.1f}" for side in box)])
            if drawn:
                place = output / PurePosixPath(name)
                painted = place.with_name(f"{place.stem}_boxes.png")
                painted.parent.mkdir(parents=True, exist_ok=True)
                texts = [f"{classes[kind]} {score:.2f}" for kind, score in zip(kinds.tolist(), scores.tolist())]
                Image.fromarray(with_boxes(image, kinds, sides, texts, len(classes))).save(painted)
                files.append(painted)
    if broken:
        beside = table.with_name("broken.txt")
        beside.write_text("\n".join(broken) + "\n", encoding="utf-8")
        files.append(beside)
    return files


def segment(task: VisionTask, recipe: VisionRecipe, image: Tensor) -> Tensor:
    """Logits (values: the values) [K, H, W] of an image uint8 [C, H, W] in its own size.

    With predict.window the image keeps its size (or takes predict.size) and is seen window by window; without, it is
    brought to the model's size as in the evaluation.
    """
    settings = recipe.predict
    if settings.window is None:
        reader = reader_of(task, settings)
        fitted, real = reader.fitted(shrunk(image, recipe.data.shrink))
        x = normalised(fitted[None], task.mean, task.std)
        shown = torch.tensor([real]) if recipe.data.resize == "pad" else None
        answer = task.answer(x, shown, flips=settings.flips)[0]
        return restored(answer, image.shape[1:], recipe.data.resize, recipe.data.crop_ratio)
    window, patch = pair(settings.window), task.model.backbone.patch
    if window[0] % patch or window[1] % patch:
        near = [max(patch, round(side / patch) * patch) for side in window]
        raise UserError(f"predict.window={list(window)} does not divide into patches of {patch}; the nearest is {near}")
    whole = image if settings.size is None else resized(image, pair(settings.size))
    x = normalised(whole[None], task.mean, task.std)[0]
    options: dict[str, Any] = {"overlap": settings.overlap, "batch": settings.batch_size}
    answer = slide(lambda windows: task.answer(windows, flips=settings.flips), x, window, **options)
    if answer.shape[1:] == image.shape[1:]:
        return answer
    return torch.nn.functional.interpolate(answer[None], size=image.shape[1:], mode="bilinear", align_corners=False)[0]


def _batched(items: Iterator[tuple[str, Tensor]], size: int) -> Iterator[list[tuple[str, Tensor]]]:
    some: list[tuple[str, Tensor]] = []
    for item in items:
        some.append(item)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some
