"""One image or mask: from any file to an 8-bit tensor, upright, and from there to the size that a model sees."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from apps.vision.native import native_size

BORDER = -1
"""Number in a mask of pixels that are not there."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm")


class BrokenImage(Exception):
    """A file that cannot be read as an image or mask; the text is the reason."""


def read_image(source: bytes | Path | Image.Image, channels: str) -> Tensor:
    """An image as uint8 [C, H, W], C = 3 for "rgb" and 1 for "grey", turned upright by its EXIF orientation.

    16-bit images keep their upper 8 bits; transparency is dropped; of several frames the first counts.

    Args:
        source: content or path of a file, or an opened image.
        channels: "rgb" or "grey".

    Raises:
        BrokenImage: the file is not a whole image, or one of floats outside 0 to 1.
    """
    image = ImageOps.exif_transpose(_opened(source))
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise BrokenImage(f"values from {values.min()} to {values.max()}; 8 or 16 bits are read")
        image = Image.fromarray(
            (values >> 8).astype(np.uint8) if values.max(initial=0) > 255 else values.astype(np.uint8)
        )
    elif image.mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise BrokenImage("floating-point values outside of 0 to 1")
        image = Image.fromarray((values * 255).round().astype(np.uint8))
    image = image.convert("RGB" if channels == "rgb" else "L")
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1).contiguous()


def read_mask(source: bytes | Path | Image.Image) -> Tensor:
    """A mask as int64 [H, W] of class numbers: grey or palette PNG or TIFF, 8 or 16 bits.

    Raises:
        BrokenImage: unreadable, or an image of colours.
    """
    image = ImageOps.exif_transpose(_opened(source))
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        raise BrokenImage(f"a mask holds class numbers (grey or palette), this is an image of mode {image.mode}")
    return torch.from_numpy(np.array(image).astype(np.int64))


def read_values(source: bytes | Path | Image.Image) -> Tensor:
    """A map of values as float32 [H, W]: 8-bit from 0 to 1, 16-bit from 0 to 1, floats as they are.

    Raises:
        BrokenImage: unreadable, an image of colours, or not finite.
    """
    image = ImageOps.exif_transpose(_opened(source))
    if image.mode not in ("L", "F") and not image.mode.startswith("I"):
        raise BrokenImage(f"a map of values is grey or floating point, this is an image of mode {image.mode}")
    values = np.array(image).astype(np.float32) / {"L": 255.0, "F": 1.0}.get(image.mode, 65535.0)
    if not np.isfinite(values).all():
        raise BrokenImage("values that are not finite")
    return torch.from_numpy(values)


def check_image(source: bytes | Path) -> tuple[int, int]:
    """Rows and columns of an image, upright, from its head; BrokenImage where that is not one."""
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
        with Image.open(io.BytesIO(content)) as image:
            # For its EXIF a PNG would have to be decoded, and cameras write none.
            turned = image.format != "PNG" and image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            columns, rows = image.size[::-1] if turned else image.size
            return rows, columns
    except Exception as error:
        raise BrokenImage(_reason(error)) from error


def _opened(source: bytes | Path | Image.Image) -> Image.Image:
    try:
        if not isinstance(source, Image.Image):
            # Read at once, so that no file stays open behind a broken image.
            source = Image.open(io.BytesIO(source if isinstance(source, bytes) else source.read_bytes()))
        source.load()
    except Exception as error:  # Pillow's decoders raise whatever their format makes them raise
        raise BrokenImage(_reason(error)) from error
    return source


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    text = str(error).split("\n")[0]
    return "not an image" if "cannot identify" in text else text or type(error).__name__


class Placement(NamedTuple):
    """How an image is brought to the size that a model sees: scaled, and what of that is looked at.

    scaled: rows and columns after scaling.   corner: first row and column that are looked at.
    real: rows and columns of the result that show the image; the rest is a border.
    """

    scaled: tuple[int, int]
    corner: tuple[int, int]
    real: tuple[int, int]


def placement(
    shape: Sequence[int], size: tuple[int, int], resize: str, ratio: float = 1.0, patch: int = 1
) -> Placement:
    """Where an image of this shape (rows, columns) goes.

    crop: scaled until `size` covers its share `ratio` of the image, then the middle. stretch: scaled out of shape. pad:
    scaled in shape until it fits, at the upper left. native: scaled in shape until it has as many patches as `size`,
    and nothing else; the result has a size of its own.
    """
    (high, wide), (rows, columns) = shape, size
    if resize == "native":
        scaled = native_size((high, wide), size, patch)
        return Placement(scaled, (0, 0), scaled)
    if resize == "stretch":
        return Placement(size, (0, 0), size)
    if resize == "pad":
        scale = min(rows / high, columns / wide)
        real = min(rows, max(1, round(high * scale))), min(columns, max(1, round(wide * scale)))
        return Placement(real, (0, 0), real)
    scale = max(rows / high, columns / wide) / ratio
    scaled = max(rows, round(high * scale)), max(columns, round(wide * scale))
    return Placement(scaled, ((scaled[0] - rows) // 2, (scaled[1] - columns) // 2), size)


def fitted(
    image: Tensor, size: tuple[int, int], resize: str, ratio: float = 1.0, patch: int = 1
) -> tuple[Tensor, tuple[int, int]]:
    """An image uint8 [C, H, W] at the size that a model sees, borders 0, and how many rows and columns are real."""
    place = placement(image.shape[1:], size, resize, ratio, patch)
    scaled = resized(image, place.scaled)
    return (scaled if resize == "native" else _looked_at(scaled, place, size, 0)), place.real


def fitted_mask(mask: Tensor, size: tuple[int, int], resize: str) -> Tensor:
    """A mask [H, W] moved as `fitted` moves its image; BORDER, of values NaN, beyond what pad shows of it."""
    place = placement(mask.shape, size, resize)
    return _looked_at(resized_mask(mask, place.scaled), place, size, torch.nan if mask.is_floating_point() else BORDER)


def _looked_at(x: Tensor, place: Placement, size: tuple[int, int], border: float) -> Tensor:
    (top, left), (rows, columns) = place.corner, place.real
    x = x[..., top : top + rows, left : left + columns]
    return F.pad(x, (0, size[1] - columns, 0, size[0] - rows), value=border) if place.real != size else x


def restored(answer: Tensor, shape: Sequence[int], resize: str, ratio: float) -> Tensor:
    """Maps [K, h, w] over what a model saw -> over the image as it is, [K, *shape]; the way back from `fitted`.

    crop: what lies beyond the middle gets the answers of the nearest pixel that was seen.
    """
    place = placement(shape, (answer.shape[1], answer.shape[2]), resize, ratio)
    (top, left), (rows, columns) = place.corner, place.real
    answer = answer[:, :rows, :columns]
    edges = (left, place.scaled[1] - columns - left, top, place.scaled[0] - rows - top)
    answer = F.pad(answer[None], edges, mode="replicate")
    return F.interpolate(answer, size=tuple(shape), mode="bilinear", align_corners=False)[0]


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [C, H, W] at another size, antialiased."""
    if tuple(image.shape[1:]) == tuple(size):
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]


def shrunk(image: Tensor, side: int | None) -> Tensor:
    """uint8 [C, H, W] with `side` as its shorter side, if it is longer."""
    shorter = min(image.shape[1:])
    if side is None or shorter <= side:
        return image
    return resized(image, (round(image.shape[1] * side / shorter), round(image.shape[2] * side / shorter)))


def resized_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask [H, W] of numbers or values at another size, nearest pixel."""
    if tuple(mask.shape) == tuple(size):
        return mask
    return F.interpolate(mask[None, None].float(), size=size, mode="nearest-exact")[0, 0].to(mask.dtype)


def normalised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, C, H, W] -> float32, (x / 255 - mean) / std per channel."""
    shape = (1, -1, 1, 1)
    return (images.float() - (mean * 255).view(shape)) / (std * 255).view(shape)
