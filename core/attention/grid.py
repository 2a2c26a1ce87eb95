r"""Depth-wise convolutions over an image grid or a line: each channel with its own s x s neighbours.

    y_(r, c) = sum_(i, j) w_(i, j) x_(r + i - s // 2, c + j - s // 2),    s odd

A line is an image of one row, so it meets the kernel's middle row; causally that row looks at the past s positions,
y_t = sum_j w_j x_(t - s + 1 + j). Masked positions and those beyond the border count as 0. To causal attention an
image is a line: its rows below and its columns to the right are the future.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.attention.contract import Attended, Cost, State, hide


def check_taps(name: str, taps: int) -> None:
    """Raise ValueError unless the width of a kernel is a whole odd number."""
    if isinstance(taps, bool) or not isinstance(taps, int) or taps < 1 or taps % 2 == 0:
        raise ValueError(f"{name} must be an odd number of at least 1, got {taps!r}")


def depthwise(
    x: Tensor,
    weight: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """Convolve x [B, K, L, E].

    Args:
        weight: [E, s, s], shared by heads; [K, E, s, s]; or [B, K, E, s, s], one kernel per sample.
        mask: [B, L] bool, True where a position is real.
        grid: (rows, columns) of the last rows * columns positions; those before them give 0. None: a line.
        before: [B, K, s - 1, E], what preceded x; causal only.
    """
    x = hide(x, mask)
    size, length = weight.shape[-1], x.shape[2]
    if length == 0:
        return x
    if before is not None:
        x = torch.cat((before.to(x.dtype), x), 2)
    channels = weight.shape[:-2].numel()
    rows = x.transpose(2, 3)
    lines = rows.reshape(x.shape[0] * x.shape[1] * x.shape[3] // channels, channels, x.shape[2])
    weight = weight.reshape(channels, 1, size, size).to(x.dtype)
    if grid is None or causal:
        left = 0 if before is not None else size - 1 if causal else size // 2
        lines = F.pad(lines, (left, 0 if causal else size // 2))
        y = F.conv1d(lines, weight[:, :, size // 2], groups=channels)
    else:
        first = length - grid[0] * grid[1]
        image = lines[..., first:].unflatten(-1, grid)
        y = F.pad(F.conv2d(image, weight, padding=size // 2, groups=channels).flatten(-2), (first, 0))
    return y.reshape(*rows.shape[:-1], length).transpose(2, 3)


def last_positions(x: Tensor, mask: Tensor | None, before: Tensor) -> Tensor:
    """What a causal convolution keeps: the last of `before` and x [B, K, L, E], as many as `before` has."""
    return torch.cat((before, hide(x, mask).to(before.dtype)), 2)[:, :, x.shape[2] :].contiguous()


class ValueConvolution(nn.Module):
    """Rank restoration: a depth-wise convolution of the values, added to the output of attention.

    Attention maps of low rank (linear ones of narrow heads) make neighbours alike; their own values tell them apart.

    Args:
        width: E.   taps: s, odd.

    Source:
        Han et al. 2023 (FLatten), arXiv:2308.00442

    Where we differ:
        No bias, so that a query without a visible key still gives 0. A line and causal sequences have one, too.
    """

    def __init__(self, width: int, taps: int):
        super().__init__()
        check_taps("conv", taps)
        self.taps = taps
        self.weight = nn.Parameter(torch.empty(width, taps, taps))
        nn.init.uniform_(self.weight, -1 / taps, 1 / taps)

    def add_to(
        self,
        attended: Attended,
        v: Tensor,
        *,
        causal: bool,
        key_mask: Tensor | None,
        grid: tuple[int, int] | None,
        before: Tensor | None = None,
    ) -> Attended:
        """attended with the convolved values [B, K, M, E] added to `out`; it has no part in the mass.

        Causal queries stand at the last positions of the keys; those before the first key get nothing.
        """
        y = depthwise(v, self.weight, causal=causal, mask=key_mask, grid=grid, before=before)
        y = F.pad(y, (0, 0, attended.out.shape[2] - v.shape[2], 0))
        out = attended.out.unflatten(1, (v.shape[1], -1)) + y.unsqueeze(2)
        return Attended(out.flatten(1, 2), attended.log_mass)

    def init_state(self, batch: int, heads: int, *, device=None, dtype=None) -> State:
        """The values before the first one."""
        return {"before": torch.zeros(batch, heads, self.taps - 1, self.weight.shape[0], device=device, dtype=dtype)}

    def cost(self, batch: int, length: int, heads: int, causal: bool, element_bytes: int) -> Cost:
        """Cost on a line of `length` values with so many heads; on a grid it is `taps` times the FLOPs."""
        values = batch * heads * self.weight.shape[0]
        return Cost(
            flops=2 * values * length * self.taps,
            bytes_moved=2 * values * length * element_bytes,
            state_bytes=values * (self.taps - 1) * element_bytes if causal else 0,
            parameters=self.weight.numel(),
        )
