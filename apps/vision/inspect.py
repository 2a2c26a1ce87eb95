"""Look inside runs: what each layer's attention reads for some places of an image, and which pixels an answer feels.

The pictures are those of `drawings.py`; here are the user's files, one run or all variants of a comparison.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import torch

from apps.vision.drawings import draw_attention, draw_field, draw_strips
from apps.vision.images import BrokenImage, normalised, read_image, shrunk
from apps.vision.predict import check_stems, find_images, reader_of
from apps.vision.recipe import VisionRecipe
from apps.vision.task import VisionTask
from apps.vision.views import PLACES, Seen, look_at
from core.training.errors import UserError
from core.training.run import LoadedRun

MOST_IMAGES = 16


def inspect(run: LoadedRun, input: Path, output: Path) -> list[Path]:
    """Draw maps of an image, or of the first 16 of a folder, into the folder `output`.

    NAME_attention.png: a row per layer (12 at most, evenly chosen), a column for each of predict.places (and the class
    token or first register, where there is one): mean over the heads of that token's row of the attention matrix.
    NAME_field.png: effective receptive field of the first of these places after the last layer.

    Raises:
        UserError: no image, or one that cannot be read.
    """
    task, recipe = _parts(run)
    places = recipe.predict.places or PLACES
    files = []
    for stem, image in _images(run, input):
        files.append(draw_attention(output / f"{stem}_attention.png", task.model, image, places))
        files.append(draw_field(output / f"{stem}_field.png", task.model, image, places[0]))
    return files


def side_by_side(runs: Mapping[str, LoadedRun], input: Path, output: Path) -> list[Path]:
    """The contact sheet of several runs, NAME_sheet.png per image: a strip for each, by its label.

    Raises:
        UserError: as for `inspect`.
    """
    files = []
    models = {label: _parts(run)[0].model for label, run in runs.items()}
    places = _parts(next(iter(runs.values())))[1].predict.places or PLACES
    for one in zip(*(_images(run, input) for run in runs.values())):
        images = {label: image for label, (_, image) in zip(runs, one)}
        files.append(draw_strips(output / f"{one[0][0]}_sheet.png", models, images, places))
    return files


def _images(run: LoadedRun, input: Path) -> Iterator[tuple[str, Seen]]:
    """The user's images, by a name for files, as a run sees them."""
    task, recipe = _parts(run)
    names, root = find_images(input)
    check_stems(names[:MOST_IMAGES])
    reader = reader_of(task, recipe.predict)
    for name in names[:MOST_IMAGES]:
        try:
            image = shrunk(read_image(root / name, recipe.data.channels), recipe.data.shrink)
        except BrokenImage as error:
            raise UserError(f"cannot read {root / name}: {error}") from error
        shown, real = reader.fitted(image)
        limits = torch.tensor([real]) if recipe.data.resize == "pad" else None
        x = normalised(shown[None], task.mean, task.std)
        yield "_".join(PurePosixPath(name).with_suffix("").parts), look_at(task.model, shown, x, limits)


def _parts(run: LoadedRun) -> tuple[VisionTask, VisionRecipe]:
    assert isinstance(run.task, VisionTask)
    assert isinstance(run.recipe, VisionRecipe)
    return run.task, run.recipe
