"""Images in their own shapes: how large each one is seen, several as one batch, and a batch as NaFlexViT's patches.

A batch is [B, C, H, W], as large as its largest image in each direction, with `real` [B, 2], the rows and columns that
are no border. The model sees the patches of the images alone, filled up to the longest sequence of the batch.

Source:
    NaFlex: Tschannen et al. 2025 (SigLIP 2), arXiv:2502.14786, after Dehghani et al. 2023 (NaViT), arXiv:2307.06304;
    the sizes, the patches and the mixing are timm's.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 64
"""Smaller images are enlarged in thought before timm looks for a size: it enlarges by less than 100 at most."""


@lru_cache(maxsize=4096)
def native_size(shape: tuple[int, int], size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Rows and columns, in whole patches, at which an image of `shape` fills about as many patches as `size` has.

    Never more than these; the shape is kept up to the rounding to whole patches. Small images are enlarged.
    """
    from timm.data.naflex_transforms import get_image_size_for_seq

    scale = LEAST if max(shape) < LEAST else 1
    patches = (size[0] // patch) * (size[1] // patch)
    high, wide = get_image_size_for_seq((shape[0] * scale, shape[1] * scale), patch, patches)[1]
    return high, wide


def bordered(images: Sequence[Tensor]) -> Tensor:
    """Images [C, H, W] of several sizes as one batch, at the upper left of a border of zeros."""
    high, wide = (max(image.shape[dim] for image in images) for dim in (1, 2))
    if all(image.shape[1:] == (high, wide) for image in images):
        return torch.stack(list(images))
    return torch.stack([F.pad(image, (0, wide - image.shape[2], 0, high - image.shape[1])) for image in images])


def without_border(x: Tensor, real: Tensor) -> list[Tensor]:
    """The images [C, rows, columns] of a batch [B, C, H, W] as views of it; real [B, 2]."""
    return [one[:, :rows, :columns] for one, (rows, columns) in zip(x, real.tolist())]


def mirrored(x: Tensor, real: Tensor | None) -> Tensor:
    """Images or maps [B, C, H, W], left and right exchanged; a border stays where it is."""
    if real is None:
        return x.flip(-1)
    turned = x.clone()
    for one, other in zip(without_border(turned, real), without_border(x, real)):
        one.copy_(other.flip(-1))
    return turned


def as_patches(x: Tensor, real: Tensor, patch: tuple[int, int], *, channels_last: bool = True) -> dict[str, Tensor]:
    """What timm's NaFlexViT takes: patches [B, N, P], their rows and columns [B, N, 2], and which are real [B, N].

    N is that of the longest image. Real patches stand first, row by row; the others are zeros at row and column 0.

    Args:
        x: [B, C, H, W], sides in whole patches.   real: [B, 2], likewise.
        patch: rows and columns.   channels_last: order of the values of a patch, as the model wants it.
    """
    from timm.models.naflexvit import batch_patchify

    patches, grid = batch_patchify(x, patch, pad=False, channels_last=channels_last)
    rows, columns = (torch.arange(n, device=x.device) for n in grid)
    ends = real.to(x.device) // torch.tensor(patch, device=x.device)
    there = ((rows[:, None] < ends[:, 0, None, None]) & (columns < ends[:, 1, None, None])).flatten(1)
    # Stable: the patches of an image stay in the order of its rows.
    order = there.int().argsort(dim=1, descending=True, stable=True)[:, : int(there.sum(1).max())]
    valid = there.gather(1, order)
    at = torch.stack((order // grid[1], order % grid[1]), -1)
    found = patches.gather(1, order[..., None].expand(-1, -1, patches.shape[2]))
    return {"patches": found * valid[..., None], "patch_coord": at * valid[..., None], "patch_valid": valid}
