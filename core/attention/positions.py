r"""Where a token stands: sinusoidal and learned tables, rotary embedding (1-D, 2-D), ALiBi.

Sinusoidal and learned positions are added to the input once and know nothing of the mechanism. Rotary and ALiBi act
inside it; how each composes with a mechanism:

    softmax, window      q and k are rotated; ALiBi is a bias of the scores
    linear, kernel maps  (taylor, cosine: functions of q.k) q and k are rotated before the feature map
    linear, other maps   (elu, relu, ...) the features are rotated, in the numerator only: a rotated denominator could
                         change its sign; weights then no longer sum to one, the normaliser stays the un-rotated sum
    linear with ALiBi    exp(-slope (i - j)) is a constant decay per head, exactly; two-sided: two directions
    hybrid               each part by its own rule
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal(positions: Tensor, dim: int, base: float = 10_000.0) -> Tensor:
    """Sine and cosine waves of geometrically growing wavelength.

    Args:
        positions: [...] positions, any real numbers.
        dim: width of the embedding, even.

    Returns:
        [..., dim] float32: even columns sin(p / base^(2i/dim)), odd columns cos.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762
    """
    if dim % 2:
        raise ValueError(f"sinusoidal positions need an even width, got {dim}")
    angles = positions.float().unsqueeze(-1) * _frequencies(dim, base, positions.device)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


class LearnedPositions(nn.Module):
    """A learned table, interpolated to other lengths than it was made for.

    Args:
        size: positions, an int, or (rows, columns) for images.
        dim: width of the embedding.

    Where we differ:
        Tables usually refuse longer inputs; ours is resampled (linear in 1-D, bicubic in 2-D, corners not aligned),
        so that a model trained at one length runs at another. The result for the own size is the table itself.
    """

    def __init__(self, size: int | tuple[int, int], dim: int):
        super().__init__()
        self.size: tuple[int, ...] = (size,) if isinstance(size, int) else tuple(size)
        self.table = nn.Parameter(torch.empty(*self.size, dim))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, size: int | tuple[int, int]) -> Tensor:
        """[size, dim], for 2-D [rows * columns, dim] in row-major order."""
        wanted: tuple[int, ...] = (size,) if isinstance(size, int) else tuple(size)
        if len(wanted) != len(self.size):
            raise ValueError(f"positions were learned on a grid of {len(self.size)} dimensions, got size {size}")
        if wanted == self.size:
            return self.table.flatten(0, -2)
        stacked = self.table.movedim(-1, 0).unsqueeze(0)
        if len(wanted) == 1:
            new = F.interpolate(stacked, size=wanted, mode="linear", align_corners=False)
        else:
            shrinks = any(a < b for a, b in zip(wanted, self.size))
            new = F.interpolate(stacked, size=wanted, mode="bicubic", align_corners=False, antialias=shrinks)
        return new.squeeze(0).movedim(0, -1).flatten(0, -2)


class Rotation(NamedTuple):
    """A rotary embedding at given positions; applies to any even width, so to q, k and to their features.

    coordinates: [L] or [B, L] positions, or [..., L, 2] rows and columns (2-D).
    base: wavelength base.   interleaved: pairs (2i, 2i+1) instead of (i, i + width/2); part of a checkpoint's meaning.
    planes: 1, or 2 for rows and columns.
    """

    coordinates: Tensor
    base: float = 10_000.0
    interleaved: bool = False
    planes: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate x [B, H, L, D]; angles in float32 (float64 for float64 inputs).

        In 2-D the first half of the width turns with the row, the second with the column.

        Raises:
            ValueError: D is not divisible by 2 (1-D) or 4 (2-D).

        Source:
            Su et al. 2021, arXiv:2104.09864
        """
        width = x.shape[-1]
        if width % (2 * self.planes):
            raise ValueError(
                f"rotary positions in {self.planes}-D need a width divisible by {2 * self.planes}, got {width}"
            )
        if self.planes == 1:
            return self._turn(x, self.coordinates)
        rows, columns = x.chunk(2, dim=-1)
        return torch.cat(
            (self._turn(rows, self.coordinates[..., 0]), self._turn(columns, self.coordinates[..., 1])), -1
        )

    def extended(self, before: int) -> "Rotation":
        """The same with the `before` positions that precede the first one, for keys of a ring."""
        earlier = self.coordinates[..., :1] + torch.arange(-before, 0, device=self.coordinates.device)
        return self._replace(coordinates=torch.cat((earlier, self.coordinates), -1))

    def first(self, number: int) -> "Rotation":
        """The same for the first `number` positions only."""
        return self._replace(coordinates=self.coordinates[..., :number])

    def _turn(self, x: Tensor, at: Tensor) -> Tensor:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        angles = at.to(exact).unsqueeze(-1) * _frequencies(x.shape[-1], self.base, x.device, exact)
        if angles.dim() == 3:  # one row of positions per sequence: make room for the heads
            angles = angles.unsqueeze(1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        if self.interleaved:
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def alibi_slopes(heads: int, device: torch.device | None = None) -> Tensor:
    """[heads] float32 slopes of the linear distance penalty.

    For a power of two: 2^(-8(h+1)/heads). Otherwise the slopes of the next lower power, then every other one of the
    doubled set.

    Source:
        Press et al. 2022, arXiv:2108.12409
    """

    def powers(n: int) -> list[float]:
        return [2 ** (-8 * (h + 1) / n) for h in range(n)]

    lower = 2 ** math.floor(math.log2(heads))
    return torch.tensor(powers(lower) + powers(2 * lower)[0::2][: heads - lower], device=device)


def alibi_bias(slopes: Tensor, queries: int, keys: int) -> Tensor:
    """[H, L, M] dense scores -slope_h |i + M - L - j|. For references only."""
    at = torch.arange(queries, device=slopes.device)[:, None] + (keys - queries)
    distance = (at - torch.arange(keys, device=slopes.device)[None, :]).abs()
    return -slopes[:, None, None] * distance


def _frequencies(dim: int, base: float, device: torch.device | None, dtype: torch.dtype = torch.float32) -> Tensor:
    return base ** (torch.arange(0, dim, 2, device=device, dtype=dtype) / -dim)
