"""What a block does to each position after attention: a plain MLP, or one that also mixes neighbours (`mlp="mix"`)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.attention.grid import depthwise, last_positions

TAPS = 3


class MLP(nn.Sequential):
    """Two linear maps with a GELU between them, applied to each position."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0):
        outer, inner = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        super().__init__(outer, nn.GELU(), nn.Dropout(dropout), inner)
        self.hidden = hidden
        for layer in (outer, inner):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def flops(self, length: int) -> int:
        """Of `length` positions; a multiply-add counts as two."""
        return 2 * length * sum(layer.weight.numel() for layer in (self[0], self[-1]))  # type: ignore[operator]


class MixMLP(nn.Module):
    r"""Expand, look at the neighbours, gate, contract:

        [a, g] = conv(W_1 x + b_1) + c,    y = W_2 (a * silu(g)) + b_2

    with a depth-wise conv, 3 x 3 on an image grid, 3 on a line (the kernel's middle row), causal where attention is. It
    tells linear attention what stands next to what, and where the border is. A masked position counts as 0; a token
    before the grid has no neighbours, only itself.

    Args:
        dim: C.   hidden: width after the gate; before it, twice that.
        dropout: on the gated values.
        causal: look at the past only.

    Source:
        Xie et al. 2024 (Sana), arXiv:2410.10629
    """

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0, causal: bool = False):
        super().__init__()
        self.hidden, self.causal = hidden, causal
        self.outer, self.inner = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)
        self.kernel = nn.Parameter(torch.empty(2 * hidden, TAPS, TAPS))
        self.bias = nn.Parameter(torch.zeros(2 * hidden))
        self.drop = nn.Dropout(dropout)
        nn.init.uniform_(self.kernel, -1 / TAPS, 1 / TAPS)
        for layer in (self.outer, self.inner):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(y [B, L, C], what to give as `before` next: the last expanded positions [B, 2, 2 hidden])."""
        wide = self.outer(x).unsqueeze(1)
        y = depthwise(wide, self.kernel, causal=self.causal, mask=mask, grid=grid, before=_headed(before))
        if grid is not None and not self.causal:
            first = x.shape[1] - grid[0] * grid[1]
            alone = wide[:, :, :first] * self.kernel[:, TAPS // 2, TAPS // 2].to(wide.dtype)
            y = torch.cat((alone, y[:, :, first:]), 2)
        a, gate = (y.squeeze(1) + self.bias).chunk(2, -1)
        last = None if before is None else last_positions(wide, mask, before.unsqueeze(1)).squeeze(1)
        return self.inner(self.drop(a * F.silu(gate))), last

    def init_state(self, batch: int) -> Tensor:
        """`before` of the first position."""
        return self.kernel.new_zeros(batch, TAPS - 1, 2 * self.hidden)

    def flops(self, length: int) -> int:
        """Of `length` positions on a line; on a grid the convolution takes three times as many."""
        return 2 * length * (self.outer.weight.numel() + self.inner.weight.numel() + 2 * self.hidden * TAPS)


def _headed(before: Tensor | None) -> Tensor | None:
    return None if before is None else before.unsqueeze(1)


MLPS = ("gelu", "mix")
