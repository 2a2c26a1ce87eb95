"""What there is to see inside a vision model, in numbers: rows of the attention matrix over an image, receptive fields.

Rows are those of `core.attention.maps`, so they exist for every mechanism, also for those that never form a matrix; an
effective receptive field is the size of a token's gradient by the pixels. Both are of an image as the model sees it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apps.vision.model import PlainBackbone, VisionModel
from core.attention.maps import attention_rows

PLACES = ((1 / 2, 1 / 2), (1 / 6, 1 / 6), (1 / 6, 5 / 6), (5 / 6, 1 / 6), (5 / 6, 5 / 6))
"""Where queries stand unless `predict.places` says otherwise: shares of the rows and columns, from the upper left."""


class Seen(NamedTuple):
    """An image as a model sees it.

    shown: uint8 [C, H, W] at the model's size.   x: the same, normalised, [1, C, H, W].
    real: [1, 2] rows and columns that are no border; None: all.
    grid: rows and columns of its tokens.   first: how many tokens stand before the grid.
    """

    shown: Tensor
    x: Tensor
    real: Tensor | None
    grid: tuple[int, int]
    first: int

    def tokens(self, places: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
        """Rows and columns, from 0, of the tokens at these shares of what is no border; each once."""
        high, wide = self.shown.shape[1:] if self.real is None else self.real[0].tolist()
        rows, columns = (
            -(-side * ends // whole) for side, ends, whole in zip((high, wide), self.grid, self.shown.shape[1:])
        )
        at = [(min(rows - 1, int(r * rows)), min(columns - 1, int(c * columns))) for r, c in places]
        return list(dict.fromkeys(at))


class Rows(NamedTuple):
    """Rows of the attention matrix of one layer for some queries, mean over the heads.

    variant: name of the mechanism.   grid: [Q, rows, columns], weights of the image's tokens; they may be negative.
    before: [Q], summed weights of the tokens before the grid.
    """

    variant: str
    grid: Tensor
    before: Tensor


def look_at(model: VisionModel, shown: Tensor, x: Tensor, real: Tensor | None = None) -> Seen:
    """An image uint8 [C, H, W] at a size that the model takes, and the same normalised, [1, C, H, W].

    real: [1, 2], its rows and columns that are no border; None: all. What is given may be on the model's device; what
    comes is on the CPU, where the model has to be for `rows_of` and `receptive_field`.
    """
    with torch.no_grad():
        features = model.backbone(x, real)
    return Seen(shown.cpu(), x.cpu(), None if real is None else real.cpu(), features.grid, features.prefix.shape[1])


def rows_of(model: VisionModel, image: Seen, queries: Sequence[tuple[int, int]], *, special: bool) -> list[Rows]:
    """Rows of all layers, first to last.

    Args:
        queries: rows and columns of tokens.
        special: begin with the row of the token that answers for the image (or the first register), if there is one.
    """
    columns = image.grid[1]
    asked = [image.first + r * columns + c for r, c in queries]
    if special and image.first:
        asked = [_special(model, image.first)[0], *asked]
    found = attention_rows(model, lambda: model(image.x, image.real), asked)
    layers = []
    for name, rows in found.items():
        mean = rows[0].mean(0).cpu()  # [Q, M]
        variant = str(model.get_submodule(name).name)
        layers.append(Rows(variant, mean[:, image.first :].unflatten(1, image.grid), mean[:, : image.first].sum(1)))
    return layers


def special_token(model: VisionModel, image: Seen) -> str | None:
    """What the first row is called that `rows_of` gives with `special`; None: there is no token before the grid."""
    return _special(model, image.first)[1] if image.first else None


def _special(model: VisionModel, first: int) -> tuple[int, str]:
    backbone = model.backbone
    if isinstance(backbone, PlainBackbone):  # registers first, the class token last
        return (first - 1, "class token") if model.pool == "token" else (0, "first register")
    return 0, "class token" if getattr(backbone.model, "cls_token", None) is not None else "first register"


def receptive_field(model: VisionModel, image: Seen, query: tuple[int, int]) -> Tensor:
    """|d token / d pixel| of the token at a row and column, summed over the channels: [H, W], at most 1, on the CPU.

    Of the token's features after the last layer, one random direction of them (always the same) is followed.
    """
    with torch.enable_grad():
        pixels = image.x.detach().clone().requires_grad_()
        token = model.backbone(pixels, image.real).map()[0, :, query[0], query[1]]
        direction = torch.randn(token.shape, generator=torch.Generator().manual_seed(0)).to(token)
        (gradient,) = torch.autograd.grad((token * direction).sum(), pixels)
    field = gradient[0].abs().sum(0).float().cpu()
    return field / field.max().clamp(min=1e-30)
