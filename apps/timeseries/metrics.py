"""Errors of forecasts, summed over windows: in training standard deviations and in the units of the file.

Names: `mse`, `mae` are means over windows x horizon x series of STANDARDISED values, the published convention;
`mse_raw`, `mae_raw` are the same in the units of the file. Sums are kept, not means of batches, so the result does not
depend on the batch size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def pinball(forecast: Tensor, future: Tensor, levels: Tensor) -> Tensor:
    r"""Pinball loss \( \max(q(y - f), (q - 1)(y - f)) \) of each quantile.

    Args:
        forecast: [..., Q].   future: [...].   levels: [Q] between 0 and 1.

    Returns:
        [..., Q]
    """
    error = future.unsqueeze(-1) - forecast
    return torch.maximum(levels * error, (levels - 1) * error)


class ForecastErrors:
    """Running sums of errors per series and horizon step.

    Args:
        mean, std: [C] scaler of the series, to go back to the units of the file.
        horizon: H.
        levels: quantile levels, if quantiles are given to `update`.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], horizon: int, levels: Sequence[float] = ()):
        self.mean = torch.as_tensor(mean, dtype=torch.float64)[:, None]
        self.std = torch.as_tensor(std, dtype=torch.float64)[:, None]
        self.levels = torch.as_tensor(levels, dtype=torch.float64)
        self.horizon = horizon
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        shape = (len(self.mean), self.horizon)
        self.count, self.square, self.absolute, self.size = (torch.zeros(shape, dtype=torch.float64) for _ in range(4))
        self.pinball, self.below = (torch.zeros(*shape, len(self.levels), dtype=torch.float64) for _ in range(2))
        self.has_quantiles = False

    def update(
        self, forecast: Tensor, future: Tensor, observed: Tensor | None = None, quantiles: Tensor | None = None
    ) -> None:
        """Take in a batch.

        Args:
            forecast, future: [B, C, H].
            observed: [B, C, H] bool; False where `future` was filled in and must not count.
            quantiles: [B, C, H, Q] forecasts of `levels`.
        """
        forecast, future = forecast.double().cpu(), future.double().cpu()
        seen = torch.ones_like(future) if observed is None else observed.cpu().double()
        error = (forecast - future) * seen
        self.count += seen.sum(0)
        self.square += error.square().sum(0)
        self.absolute += error.abs().sum(0)
        self.size += ((future * self.std + self.mean).abs() * seen).sum(0)
        if quantiles is not None:
            quantiles = quantiles.double().cpu()
            self.has_quantiles = True
            self.pinball += (pinball(quantiles, future, self.levels) * seen.unsqueeze(-1)).sum(0)
            self.below += ((future.unsqueeze(-1) <= quantiles) * seen.unsqueeze(-1)).sum(0)

    def compute(self) -> dict[str, float]:
        """All metrics by name; see the head of this file."""
        count = self.count.sum()
        values = {
            "mse": self.square.sum() / count,
            "mae": self.absolute.sum() / count,
            "mse_raw": (self.square * self.std**2).sum() / count,
            "mae_raw": (self.absolute * self.std).sum() / count,
        }
        if self.has_quantiles:
            raw = (self.pinball * self.std.unsqueeze(-1)).sum()
            values["pinball"] = self.pinball.sum() / count / len(self.levels)
            # Weighted quantile loss: 2 sum pinball / sum |y| over all values, mean over the levels, units of the file.
            values["wql_raw"] = 2 * raw / self.size.sum() / len(self.levels) if self.size.sum() > 0 else raw * 0
            for low, high in self.intervals():
                inside = self.below[..., high] - self.below[..., low]
                values[coverage_name(self.levels, low, high)] = inside.sum() / count
        return {name: float(value) for name, value in values.items()}

    def intervals(self) -> list[tuple[int, int]]:
        """Pairs of levels that lie symmetrically around one half, the widest first."""
        levels = self.levels.tolist()
        pairs = [(i, len(levels) - 1 - i) for i in range(len(levels) // 2)]
        return [(i, j) for i, j in pairs if abs(levels[i] + levels[j] - 1) < 1e-9]

    def by_step(self) -> list[dict[str, float]]:
        """A row per horizon step: mse, mae, mse_raw, mae_raw over all series."""
        return [{"step": step + 1, **self._row((slice(None), step))} for step in range(self.horizon)]

    def by_series(self, names: Sequence[str]) -> list[dict[str, float | str]]:
        """A row per series: mse, mae, mse_raw, mae_raw over all steps."""
        return [{"unique_id": name, **self._row((index, slice(None)))} for index, name in enumerate(names)]

    def _row(self, where: tuple) -> dict[str, float]:
        std = self.std.expand(-1, self.horizon)[where]
        square, absolute, count = self.square[where], self.absolute[where], self.count[where].sum()
        sums = {
            "mse": square.sum(),
            "mae": absolute.sum(),
            "mse_raw": (square * std**2).sum(),
            "mae_raw": (absolute * std).sum(),
        }
        return {name: float(total / count) for name, total in sums.items()}


def coverage_name(levels: Tensor, low: int, high: int) -> str:
    """ "coverage_80" for the levels 0.1 and 0.9."""
    return f"coverage_{100 * float(levels[high] - levels[low]):.6g}"
