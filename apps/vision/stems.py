"""Stems: how pixels become tokens; and what the maps on that way say of texture.

Every stem: images [B, C, H, W] -> (map [B, D, rows, columns], finer maps, finest first); `widths` are their channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchStem(nn.Module):
    """One linear map per patch."""

    def __init__(self, channels: int, dim: int, patch: int):
        super().__init__()
        self.project = nn.Conv2d(channels, dim, patch, patch)
        self.widths: list[int] = []

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, C, H, W] -> ([B, D, rows, columns], no finer maps)."""
        return self.project(x), []


class ConvStem(nn.Module):
    """3 x 3 convolutions of stride 2 until a pixel is a patch: a better start for few images than one linear map.

    Group norm with one group, so that no image depends on its batch.

    Source:
        Xiao et al. 2021, arXiv:2106.14881
    """

    def __init__(self, channels: int, dim: int, patch: int, width: int):
        super().__init__()
        self.stages = nn.ModuleList()
        widths = [min(dim, width * 2**i) for i in range(patch.bit_length() - 2)] + [dim] if patch > 1 else [dim]
        for out in widths[:-1]:
            self.stages.append(nn.Sequential(nn.Conv2d(channels, out, 3, 2, 1), nn.GroupNorm(1, out), nn.GELU()))
            channels = out
        self.last = nn.Conv2d(channels, dim, 3, 2 if patch > 1 else 1, 1)
        self.widths = widths[:-1]

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, C, H, W] -> ([B, D, rows, columns], maps of stride 2, 4, ... before it)."""
        finer = []
        for stage in self.stages:
            x = stage(x)
            finer.append(x)
        return self.last(x), finer


class Residual(nn.Module):
    """A 3 x 3 convolution beside the map itself; starts as the identity (before its activation)."""

    def __init__(self, width: int):
        super().__init__()
        self.convolve = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, h, w] -> the same."""
        return F.gelu(x + self.norm(self.convolve(x)))


class ResidualStem(nn.Module):
    """As `ConvStem`, wider and with batch norm, a residual block after each step from the third on, and a last 1 x 1.

    Batch norm keeps what group norm with one group divides out: how bright and how rich in contrast an image is. Blocks
    stand where maps are small, since a block after the first step would cost as much as all others together.

    Source:
        The pattern of He et al. 2016, arXiv:1512.03385, as a stem: Xiao et al. 2021, arXiv:2106.14881
    """

    def __init__(self, channels: int, dim: int, patch: int, width: int):
        super().__init__()
        self.stages = nn.ModuleList()
        widths = [min(2 * dim, width * 2**i) for i in range(max(1, patch.bit_length() - 1))]
        for at, out in enumerate(widths):
            step = nn.Conv2d(channels, out, 3, 2 if patch > 1 else 1, 1, bias=False)
            block = [Residual(out)] if at > 1 else []
            self.stages.append(nn.Sequential(step, nn.BatchNorm2d(out), nn.GELU(), *block))
            channels = out
        self.last = nn.Conv2d(channels, dim, 1)
        self.widths = widths[:-1]

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, C, H, W] -> ([B, D, rows, columns], maps of stride 2, 4, ... before it)."""
        x = x.contiguous(memory_format=torch.channels_last)  # a third faster on a CPU, whose batch norm is slow else
        finer = []
        for stage in self.stages:
            x = stage(x)
            finer.append(x)
        return self.last(x), finer[:-1]


STEMS = {"patch": PatchStem, "conv": ConvStem, "residual": ResidualStem}


class Texture(nn.Module):
    """A linear map of mean and deviation of every map of the stem, added to the answer of the tokens; starts at zero.

    What a thing is made of shows in colours and small patterns wherever they are: their statistics are few numbers that
    few images suffice to weigh, and the tokens are left with what depends on places.

    Args:
        widths: channels of the maps.   outputs: K, numbers of the answer.

    Source:
        Statistics of filter responses as texture: Portilla & Simoncelli 2000, doi:10.1023/A:1026553619983
    """

    def __init__(self, widths: list[int], outputs: int):
        super().__init__()
        numbers = 2 * sum(widths)
        self.norm = nn.BatchNorm1d(numbers)
        self.project = nn.Linear(numbers, outputs)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps [B, D', h, w] -> [B, K]."""
        parts = [x.float().flatten(2) for x in maps]
        # The floor keeps the gradient of the root finite where a map is constant.
        found = [part for x in parts for part in (x.mean(2), (x.var(2, correction=0) + 1e-4).sqrt())]
        row = torch.cat(found, 1)
        # An epoch may end with a batch of one image, which has no deviation of its own.
        alone = self.training and len(row) == 1
        norm = self.norm
        normed = F.batch_norm(row, norm.running_mean, norm.running_var, norm.weight, norm.bias) if alone else norm(row)
        return self.project(normed)
