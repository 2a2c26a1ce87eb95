"""Pictures of what a model sees: attention maps of all layers, the effective receptive field, and both on one strip.

Every panel is the image in grey under its weights. Its colours run from 0 to its own largest weight on a square-root
scale, so that small weights show; what is large is written at its edge, for panels to be compared with each other.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from apps.vision.model import VisionModel
from apps.vision.views import PLACES, Rows, Seen, receptive_field, rows_of, special_token
from core.training.figures import canvas

MOST_LAYERS = 12
Places = Sequence[tuple[float, float]]
SCALE = "colours: from 0 (dark) to the largest weight of a panel (yellow), square-root scale; blue: below 0"


def draw_attention(path: Path, model: VisionModel, image: Seen, places: Places = PLACES) -> Path:
    """Rows of the attention matrix: a line per layer (12 at most, evenly chosen), a column per query."""
    queries = image.tokens(places)
    layers = list(enumerate(rows_of(model, image, queries, special=True), 1))
    if len(layers) > MOST_LAYERS:
        layers = [layers[round(n)] for n in np.linspace(0, len(layers) - 1, MOST_LAYERS)]
    special = special_token(model, image)
    titles = [*([special] if special else []), *(f"row {r}, column {c}" for r, c in queries)]
    high = 2.0 * _shape(image)
    with canvas(path, 2.0 * len(titles) + 0.6, (high + 0.2) * len(layers) + 0.7) as figure:
        axes = figure.subplots(len(layers), len(titles), squeeze=False)
        for line, (number, rows) in zip(axes, layers):
            for k, ax in enumerate(line):
                at = k - (special is not None)
                _panel(ax, image, rows, k, queries[at] if at >= 0 else None)
            line[0].set_ylabel(f"layer {number}\n{rows.variant}", fontsize=8)
        for ax, title in zip(axes[0], titles):
            ax.set_title(title, fontsize=8)
        figure.suptitle("What a token (+) reads: rows of the attention matrix, mean over the heads", fontsize=9)
        figure.supxlabel(SCALE, fontsize=7)
    return path


def draw_field(path: Path, model: VisionModel, image: Seen, place: tuple[float, float] = PLACES[0]) -> Path:
    """Effective receptive field of the token at a place after the last layer."""
    (query,) = image.tokens([place])
    with canvas(path, 4.6, 4.2 * _shape(image) + 0.9) as figure:
        axes = figure.add_subplot()
        _field(axes, image, receptive_field(model, image, query), query)
        axes.set_title(f"Effective receptive field of the token at row {query[0]}, column {query[1]}", fontsize=8)
    return path


def draw_strip(path: Path, model: VisionModel, image: Seen, places: Places = PLACES) -> Path:
    """The image, what two queries read in the first and in the last layer, and the receptive field, in one line."""
    return draw_strips(path, {"": model}, {"": image}, places)


def draw_strips(
    path: Path,
    models: dict[str, VisionModel],
    images: dict[str, Seen],
    places: Places = PLACES,
) -> Path:
    """The contact sheet: strips of several models, by label, of the same image."""
    first = next(iter(images.values()))
    wide = 1.85
    with canvas(path, wide * 6 + 0.4, (wide * _shape(first) + 0.22) * len(models) + 0.5) as figure:
        axes = figure.subplots(len(models), 6, squeeze=False)
        for line, (label, model) in zip(axes, models.items()):
            image = images[label]
            queries = image.tokens(places)[:2]
            layers = rows_of(model, image, queries, special=False)
            _paint(line[0], image, None)
            panels = [(k, rows) for k in range(2) for rows in (layers[0], layers[-1])]
            for ax, (k, rows) in zip(line[1:], panels):
                _panel(ax, image, rows, min(k, len(queries) - 1), queries[min(k, len(queries) - 1)])
            _field(line[5], image, receptive_field(model, image, queries[0]), queries[0])
            line[0].set_ylabel(label.replace(":", "\n"), fontsize=8)
        read = ("+ reads, first layer", "+ reads, last layer")
        for ax, title in zip(axes[0], ("as the model sees it", *read, *read, "pixels that move the first +")):
            ax.set_title(title, fontsize=8)
        figure.supxlabel(SCALE, fontsize=7)
    return path


def _shape(image: Seen) -> float:
    return image.shown.shape[1] / image.shown.shape[2]


def _panel(axes: Any, image: Seen, rows: Rows, k: int, query: tuple[int, int] | None) -> None:
    """Row k of a layer, and in words its largest weight and its sum over the image (and before it)."""
    weights = rows.grid[k]
    _paint(axes, image, weights)
    if query is not None:
        _mark(axes, image, query)
    before = f" + {float(rows.before[k]):.2f} before it" if image.first else ""
    axes.set_xlabel(f"max {float(weights.max()):.2g}, sum {float(weights.sum()):.2f}{before}", fontsize=6.5, labelpad=2)


def _field(axes: Any, image: Seen, field: Tensor, query: tuple[int, int]) -> None:
    _paint(axes, image, field)
    _mark(axes, image, query)
    share = float((field > 0.01).float().mean())
    axes.set_xlabel(f"{share:.0%} of pixels above 1 % of max", fontsize=6.5, labelpad=2)


def _mark(axes: Any, image: Seen, query: tuple[int, int]) -> None:
    """A cross in the middle of a token."""
    high, wide = (side / ends for side, ends in zip(image.shown.shape[1:], image.grid))
    at = ((query[1] + 0.5) * wide - 0.5, (query[0] + 0.5) * high - 0.5)
    for colour, width in (("black", 2.4), ("white", 1.2)):
        axes.plot(*at, marker="+", color=colour, markersize=8, markeredgewidth=width)


def _paint(axes: Any, image: Seen, weights: Tensor | None) -> None:
    """The image in grey under weights [h, w] of its whole; without any, in its own colours."""
    shown = image.shown.expand(3, -1, -1).permute(1, 2, 0).numpy()
    high, wide = shown.shape[:2]
    if weights is None:
        axes.imshow(shown, interpolation="nearest")
    else:
        axes.imshow(0.7 * shown.mean(-1), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        place = {"extent": (-0.5, wide - 0.5, high - 0.5, -0.5), "interpolation": "nearest"}
        axes.imshow(_colours(weights.numpy()), **place)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)


def _colours(weights: np.ndarray) -> np.ndarray:
    """RGBA [h, w, 4] of weights: from black through red to yellow above 0, to blue below."""
    import matplotlib as mpl

    most = max(float(np.abs(weights).max(initial=0)), 1e-30)
    strength = np.sqrt(np.abs(weights) / most)
    up = mpl.colormaps["inferno"](strength)
    down = np.stack([0.1 * strength, 0.55 * strength, strength, strength], -1)
    colours = np.where((weights >= 0)[..., None], up, down)
    colours[..., 3] = 0.45 + 0.4 * strength  # where nothing is read, the image shows
    return colours
