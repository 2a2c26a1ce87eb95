"""Short depth-wise convolutions: the few neighbours that a running sum cannot tell apart.

    y_i = sum_t w_t x_{i - r + t},   t = 0 .. width - 1,   r = width - 1 if causal, else (width - 1) // 2

Applied by `Attention(short_conv=...)` to queries, keys and values. A masked position counts as 0. The decoding state is
the last width - 1 inputs.

Source:
    Poli et al. 2023 (Hyena), arXiv:2302.10866; with linear attention: Yang et al. 2024, arXiv:2412.06464
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """Depth-wise convolution over the length of [B, H, L, D], followed by SiLU.

    Args:
        heads: H.   width: D.
        taps: number of positions that are combined, at least 2.
        causal: look at the past only; else at both sides.
    """

    def __init__(self, heads: int, width: int, taps: int, causal: bool):
        super().__init__()
        self.taps, self.causal = taps, causal
        self.weight = nn.Parameter(torch.empty(heads * width, 1, taps))
        nn.init.uniform_(self.weight, -(taps**-0.5), taps**-0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolve.

        Args:
            x: [B, H, L, D].   mask: [B, L] bool, True where a position is real.
            before: [B, H, taps - 1, D], what preceded x (zeros if None); causal only.

        Returns:
            (y [B, H, L, D], the last taps - 1 inputs [B, H, taps - 1, D]).
        """
        if mask is not None:
            x = torch.where(mask[:, None, :, None], x, 0.0)
        reach = self.taps - 1
        left = reach if self.causal else reach // 2
        if before is None and x.shape[2] == 0:
            return x, x.new_zeros(*x.shape[:2], reach, x.shape[3])
        if before is not None:
            left, x = 0, torch.cat((before.to(x.dtype), x), 2)
        padded = F.pad(x, (0, 0, left, reach - left if before is None else 0))
        y = F.conv1d(padded.transpose(2, 3).flatten(1, 2), self.weight.to(x.dtype), groups=self.weight.shape[0])
        y = F.silu(y.unflatten(1, (x.shape[1], x.shape[3])).transpose(2, 3))
        return y, padded[:, :, padded.shape[2] - reach :].contiguous()
