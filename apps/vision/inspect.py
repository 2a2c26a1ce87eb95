"""Look inside a run: what each layer's attention reads for some places of an image, and which pixels an answer feels.

Attention maps are rows of the attention matrix, also of mechanisms that never form one (`core.attention.maps`). The
effective receptive field is the size of the gradient of the tokens in the middle of the image by its pixels.
"""

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.vision.images import BrokenImage, normalised, read_image, shrunk
from apps.vision.predict import find_images, reader_of
from apps.vision.recipe import VisionRecipe
from apps.vision.task import VisionTask
from core.attention.maps import attention_rows
from core.training.errors import UserError
from core.training.figures import canvas
from core.training.run import LoadedRun

MOST_IMAGES = 16
MOST_LAYERS = 12


def inspect(run: LoadedRun, input: Path, output: Path) -> list[Path]:
    """Draw maps of an image, or of the first 16 of a folder, into the folder `output`.

    NAME_attention.png: a row per layer (12 at most, evenly chosen), a column for each of five places (and the class
    token, where there is one): mean over the heads of that token's row of the attention matrix, over the image.
    NAME_field.png: effective receptive field of the middle of the image after the last layer, and its size.

    Raises:
        UserError: no image, or one that cannot be read.
    """
    task, recipe = run.task, run.recipe
    assert isinstance(task, VisionTask)
    assert isinstance(recipe, VisionRecipe)
    names, root = find_images(input)
    reader = reader_of(task, recipe.predict)
    files = []
    for name in names[:MOST_IMAGES]:
        try:
            image = shrunk(read_image(root / name, recipe.data.channels), recipe.data.shrink)
        except BrokenImage as error:
            raise UserError(f"cannot read {root / name}: {error}") from error
        shown, _ = reader.fitted(image)
        x = normalised(shown[None], task.mean, task.std)
        stem = "_".join(PurePosixPath(name).with_suffix("").parts)
        files.append(draw_attention(output / f"{stem}_attention.png", task, shown, x))
        files.append(draw_field(output / f"{stem}_field.png", task, shown, x))
    return files


def draw_attention(path: Path, task: VisionTask, shown: Tensor, x: Tensor) -> Path:
    """Attention maps of an image x [1, C, H, W], drawn over `shown` uint8 [C, H, W]."""
    grid, first = _grid_of(task, x)
    rows, columns = grid
    places = [
        (rows // 2, columns // 2),
        *((r, c) for r in (rows // 6, rows - 1 - rows // 6) for c in (columns // 6, columns - 1 - columns // 6)),
    ]
    places = list(dict.fromkeys(places))
    queries = [first + r * columns + c for r, c in places]
    titles = [f"row {r}, column {c}" for r, c in places]
    if first:
        queries, titles = [0, *queries], ["first token before the grid", *titles]
    found = attention_rows(task.model, lambda: task.model(x), queries)
    layers = list(found.items())
    if len(layers) > MOST_LAYERS:
        layers = [layers[round(n)] for n in np.linspace(0, len(layers) - 1, MOST_LAYERS)]
    with canvas(path, 2.0 * len(queries) + 0.6, 2.0 * len(layers) * rows / columns + 0.6) as figure:
        axes = figure.subplots(len(layers), len(queries), squeeze=False)
        for row, (name, attention) in zip(axes, layers):
            mean = attention[0].mean(0)  # [Q, M]
            for k, ax in enumerate(row):
                weights = mean[k, first:].clamp(min=0).unflatten(0, grid)
                _paint(ax, shown, weights)
                if k >= bool(first):
                    r, c = places[k - bool(first)]
                    high, wide = shown.shape[1] / rows, shown.shape[2] / columns
                    ax.plot((c + 0.5) * wide, (r + 0.5) * high, marker="+", color="white", markersize=8)
                if ax in axes[0]:
                    ax.set_title(titles[k], fontsize=7)
            row[0].set_ylabel(_short(name), fontsize=7)
    return path


def draw_field(path: Path, task: VisionTask, shown: Tensor, x: Tensor) -> Path:
    """Effective receptive field of the middle tokens of an image x [1, C, H, W]."""
    field = receptive_field(task, x)
    share = float((field > 0.01 * field.max()).float().mean())
    with canvas(path, 4.4, 4.4 * shown.shape[1] / shown.shape[2] + 0.5) as figure:
        axes = figure.add_subplot()
        _paint(axes, shown, field)
        axes.set_title(f"effective receptive field of the middle: {share:.0%} of the pixels", fontsize=8)
    return path


def receptive_field(task: VisionTask, x: Tensor) -> Tensor:
    """|d middle token / d pixel| summed over channels, [H, W], of an image x [1, C, H, W]; scaled to a maximum of 1."""
    with torch.enable_grad():
        pixels = x.detach().requires_grad_()
        features = task.model.backbone(pixels)
        r, c = features.grid[0] // 2, features.grid[1] // 2
        middle = features.map()[0, :, r, c]
        direction = torch.randn(middle.shape, generator=torch.Generator().manual_seed(0)).to(middle)
        (gradient,) = torch.autograd.grad((middle * direction).sum(), pixels)
    field = gradient[0].abs().sum(0)
    return field / field.max().clamp(min=1e-30)


def _grid_of(task: VisionTask, x: Tensor) -> tuple[tuple[int, int], int]:
    """Rows and columns of tokens, and how many stand before them."""
    with torch.no_grad():
        features = task.model.backbone(x)
    return features.grid, features.prefix.shape[1]


def _paint(axes: Any, shown: Tensor, weights: Tensor) -> None:
    """Weights [h, w] over an image, on a square-root scale so that small ones show."""
    grey = shown.float().mean(0).numpy()
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
    high, wide = grey.shape
    scaled = (weights / weights.max().clamp(min=1e-30)).sqrt().numpy()
    axes.imshow(scaled, cmap="inferno", alpha=0.6, vmin=0, vmax=1, extent=(-0.5, wide - 0.5, high - 0.5, -0.5))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)


def _short(name: str) -> str:
    digits = [part for part in name.split(".") if part.isdigit()]
    return f"layer {int(digits[-1]) + 1}" if digits else name
