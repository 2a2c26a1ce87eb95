"""From what a backbone finds to maps of answers: a linear map per token, or tokens and finer maps brought together."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Features(NamedTuple):
    """What a backbone makes of images.

    tokens: [B, N, D], row by row.   grid: their rows and columns.   prefix: [B, P, D] tokens before them.
    finer: feature maps [B, D', h, w] from before the tokens, finest first.   mask: [B, N] real tokens, or None.
    start: the map [B, D, rows, columns] that became the tokens; None where the stem is timm's.
    """

    tokens: Tensor
    grid: tuple[int, int]
    prefix: Tensor
    finer: list[Tensor]
    mask: Tensor | None
    start: Tensor | None = None

    def map(self) -> Tensor:
        """The tokens as a feature map [B, D, rows, columns]."""
        return self.tokens.transpose(1, 2).unflatten(2, self.grid)


class MapHead(nn.Module):
    """One linear map per token: [B, D, rows, columns] -> [B, K, rows, columns]."""

    def __init__(self, dim: int, outputs: int):
        super().__init__()
        self.project = nn.Conv2d(dim, outputs, 1)

    def forward(self, features: Features) -> Tensor:
        """-> [B, K, rows, columns]."""
        return self.project(features.map())


class MultiScaleHead(nn.Module):
    """Tokens, brought up step by step, meet the finer maps of the stem (or, without any, their own upsampled selves).

    At each step: upsample by 2, add the projected finer map, convolve. The result has stride 4 or that of the finest
    map from stride 4 on.

    Source:
        The pattern of U-Nets and feature pyramids: Lin et al. 2017, arXiv:1612.03144; from a plain backbone: Li et al.
        2022 (ViTDet), arXiv:2203.16527
    """

    def __init__(self, dim: int, outputs: int, width: int, patch: int, finer: list[int]):
        super().__init__()
        steps = max(1, patch.bit_length() - 3)  # from stride `patch` up to stride 4
        self.enter = nn.Conv2d(dim, width, 1)
        kept = finer[::-1][:steps] + [0] * max(0, steps - len(finer))
        self.beside = nn.ModuleList(nn.Conv2d(one, width, 1) if one else nn.Identity() for one in kept)
        self.used = [bool(one) for one in kept]
        self.blend = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(1, width), nn.GELU()) for _ in range(steps)
        )
        self.project = nn.Conv2d(width, outputs, 1)

    def forward(self, features: Features) -> Tensor:
        """-> [B, K, h, w] at stride 4 or the patch's if that is smaller."""
        x = self.enter(features.map())
        finer = features.finer[::-1]
        for step, blend in enumerate(self.blend):
            if self.used[step]:
                side = self.beside[step](finer[step])
                x = F.interpolate(x, size=side.shape[2:], mode="bilinear", align_corners=False) + side
            else:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = blend(x)
        return self.project(x)
