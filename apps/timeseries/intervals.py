"""Intervals for point forecasts: the errors that were made on the validation part, per series and horizon step.

Split conformal prediction with signed residuals: the quantile q of the next value is the forecast plus the k-th
smallest of n validation residuals, k = ceil((n + 1) q) above one half and floor((n + 1) q) below. Were validation and
future exchangeable, an interval would cover at least its level. Time series are not: windows overlap and levels drift,
so `test` reports the coverage that was reached.

Source: Vovk, Gammerman, Shafer 2005; for several steps ahead Stankevičiūtė et al. 2021.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

MOST_WINDOWS = 1000
MOST_VALUES = 20_000_000
"""Residuals kept at once: enough for stable 5 % quantiles, small beside a model (80 MB)."""


class ResidualIntervals(nn.Module):
    """Quantile offsets per series and step, learned from validation residuals; part of the checkpoint.

    Args:
        series: C.   horizon: H.   levels: Q quantile levels, rising.
        first: row of the first validation origin.   windows: number of validation windows.
    """

    offsets: Tensor

    def __init__(self, series: int, horizon: int, levels: Sequence[float], first: int, windows: int):
        super().__init__()
        self.levels, self.first = list(levels), first
        most = min(MOST_WINDOWS, max(50, MOST_VALUES // (series * horizon)))
        self.every = max(1, -(-windows // most))
        self.kept: list[Tensor] = []
        self.register_buffer("offsets", torch.zeros(series, horizon, len(self.levels)))

    def collect(self, forecast: Tensor, future: Tensor, origins: Tensor, observed: Tensor | None = None) -> None:
        """Keep the residuals [B, C, H] of every n-th validation window, whichever batch it is in."""
        chosen = (origins - self.first) % self.every == 0
        residuals = (future - forecast)[chosen].float().cpu()
        if observed is not None:
            residuals = residuals.masked_fill(~observed[chosen].cpu(), math.nan)
        self.kept.append(residuals)

    def learn(self) -> None:
        """Turn the kept residuals into offsets, and forget them."""
        residuals = torch.cat(self.kept).sort(dim=0).values  # NaN last
        self.kept = []
        count = (~residuals.isnan()).sum(dim=0)
        offsets = []
        for level in self.levels:
            rank = (count + 1) * level
            # An even number of residuals has no middle one: for the median take the mean of both.
            low = rank.floor() if level <= 0.5 else rank.ceil()
            high = rank.ceil() if level >= 0.5 else rank.floor()
            pair = [residuals.gather(0, _index(k, count)[None])[0] for k in (low, high)]
            offsets.append((pair[0] + pair[1]) / 2)
        # A step without any validation value keeps the forecast itself.
        learned = torch.stack(offsets, dim=-1).nan_to_num(nan=0.0)
        self.offsets.copy_(learned.cummax(dim=-1).values)

    def forward(self, forecast: Tensor) -> Tensor:
        """Forecast [..., C, H] -> its quantiles [..., C, H, Q]."""
        return forecast.unsqueeze(-1) + self.offsets


def _index(rank: Tensor, count: Tensor) -> Tensor:
    return torch.minimum(rank.clamp(min=1), count.clamp(min=1)).long() - 1
