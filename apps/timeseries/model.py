"""The forecaster: a window of the past in, the whole horizon out, by attention over patches or over series.

    past [B, C, L] -> (window scaling) -> tokens -> encoder -> head -> (scaling back) -> forecast [B, C, H]
                    \\-> (linear shortcut) ---------------------------/

Shapes: B windows, C series, L look-back, H horizon, N tokens, P patch, D width, Q quantiles. All values are in training
standard deviations; `windows.Scaler` is applied outside.

Sources: patches and independent channels from PatchTST (Nie et al. 2023, arXiv:2211.14730), series as tokens from
iTransformer (Liu et al. 2024, arXiv:2310.06625), window scaling from RevIN (Kim et al. 2022), the shortcut from
DLinear (Zeng et al. 2023, arXiv:2205.13504). Where we differ: no affine weights in RevIN, no batch norm.
"""

from typing import Any

import torch
from torch import Tensor, nn

from apps.timeseries.recipe import TimeSeriesRecipe
from core.backbone import Encoder
from core.training.matrices import unpack


class Patches(nn.Module):
    """Cut the look-back into overlapping patches, one token each; the end is padded by repeating the last value.

    Args:
        lookback: L.   length: P.   stride: steps between patches.   dim: D.
        series: how many series share a token: 1, or all of them for channels=mixed.
    """

    def __init__(self, lookback: int, length: int, stride: int, dim: int, series: int = 1):
        super().__init__()
        self.length, self.stride = length, stride
        self.tokens = (lookback + stride - length) // stride + 1
        self.embed = nn.Linear(length * series, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, L] -> [B, N, D] with S the `series` of a token."""
        padded = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], self.stride)], dim=-1)
        patches = padded.unfold(-1, self.length, self.stride)  # [B, S, N, P]
        return self.embed(patches.transpose(1, 2).flatten(2))


class Forecaster(nn.Module):
    """Forecast H steps of C series from their last L steps.

    Args:
        series: C.   lookback: L.   horizon: H.
        encoder: keyword arguments of `core.backbone.Encoder` except `max_length`.
        channels: "independent": each series alone, weights shared; "mixed": a token is a patch of all series;
            "tokens": a token is the whole look-back of one series, so attention runs over series.
        patch, stride: of the patches; unused, and to be None, with channels="tokens".
        revin: scale every window by its own mean and deviation.
        shortcut: add a linear map of the look-back (its mean removed and added back) to the forecast.
        ridge: [L, H] start of that map; the head then starts at zero, so that training starts at the ridge forecast.
        quantiles: Q levels; None: one value per step.
        eps: floor of the window's variance.

    Raises:
        ValueError: the patch is longer than the look-back, or anything that the encoder refuses.
    """

    def __init__(
        self,
        series: int,
        lookback: int,
        horizon: int,
        encoder: dict[str, Any],
        *,
        channels: str = "independent",
        patch: int | None = None,
        stride: int | None = None,
        revin: bool = True,
        shortcut: bool = False,
        ridge: Tensor | None = None,
        quantiles: list[float] | None = None,
        eps: float = 1e-5,
    ):
        super().__init__()
        dim = encoder["dim"]
        self.series, self.horizon, self.channels, self.revin, self.eps = series, horizon, channels, revin, eps
        self.outputs = len(quantiles) if quantiles else 1
        self.is_quantile = quantiles is not None
        if channels == "tokens":
            self.embed: nn.Linear | Patches = nn.Linear(lookback, dim)
            self.tokens, features, targets = series, dim, horizon
        else:
            length, step = default_patch(lookback, patch, stride)
            if length > lookback:
                raise ValueError(f"model.patch={length} is longer than the look-back of {lookback} steps")
            shared = series if channels == "mixed" else 1
            self.embed = Patches(lookback, length, step, dim, shared)
            self.tokens, features, targets = self.embed.tokens, self.embed.tokens * dim, horizon * shared
        if encoder.get("positions") is None and channels != "tokens":
            encoder = {**encoder, "positions": "learned"}  # patches have an order, series have none
        self.encoder = Encoder(**encoder, max_length=self.tokens)
        self.head = nn.Linear(features, targets * self.outputs)
        self.shortcut = nn.Linear(lookback, horizon, bias=False) if shortcut else None
        if ridge is not None and self.shortcut is not None:
            with torch.no_grad():
                self.shortcut.weight.copy_(ridge.T)
                self.head.weight.zero_()
                self.head.bias.zero_()

    def forward(self, past: Tensor) -> Tensor:
        """Past [B, C, L] -> forecast [B, C, H], or [B, C, H, Q] in rising order if there are quantiles."""
        mean = past.mean(dim=-1, keepdim=True)
        centred = past - mean
        deviation = (centred.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()
        drawn = self._attend(centred / deviation if self.revin else past)
        forecast = drawn * deviation.unsqueeze(-1) if self.revin else drawn
        if self.revin or self.shortcut is not None:
            forecast = forecast + mean.unsqueeze(-1)
        if self.shortcut is not None:
            forecast = forecast + self.shortcut(centred).unsqueeze(-1)
        # Sorted, not penalised: quantiles that cross are then impossible, and the gradient goes where the value went.
        return forecast.sort(dim=-1).values if self.is_quantile else forecast.squeeze(-1)

    def _attend(self, x: Tensor) -> Tensor:
        """The attention branch, [B, C, L] -> [B, C, H, Q]."""
        batch = x.shape[0]
        if self.channels == "independent":
            x = x.reshape(-1, 1, x.shape[-1])
        tokens = self.encoder(self.embed(x))
        features = tokens if self.channels == "tokens" else tokens.flatten(1)
        return self.head(features).view(batch, self.series, self.horizon, self.outputs)

    def cost(self) -> dict[str, int]:
        """Parameters, and FLOPs (forward), state bytes and tokens of one window of all series."""
        rows = self.series if self.channels == "independent" else 1
        inside = self.encoder.cost(rows, self.tokens)
        linear = [(self.head, rows * (self.tokens if self.channels == "tokens" else 1))]
        embed = self.embed.embed if isinstance(self.embed, Patches) else self.embed
        linear.append((embed, rows * self.tokens))
        if self.shortcut is not None:
            linear.append((self.shortcut, self.series))
        around = sum(2 * count * layer.weight.numel() for layer, count in linear)
        return {
            "parameters": sum(p.numel() for p in self.parameters()),
            "flops_per_item": int(inside.flops + around),
            "state_bytes": int(inside.state_bytes),
            "tokens_per_item": rows * self.tokens,
        }


def default_patch(lookback: int, patch: int | None, stride: int | None) -> tuple[int, int]:
    """Patch 16, stride 8, as published, where the look-back is long enough for a handful of them; less below that."""
    length = patch or max(1, min(16, lookback // 4))
    return length, stride or max(1, length // 2)


def build_model(recipe: TimeSeriesRecipe, spec: dict[str, Any]) -> Forecaster:
    """The forecaster of a recipe, for the data that `spec` describes.

    Raises:
        ValueError: a combination that cannot be built.
    """
    backbone, model = recipe.backbone, recipe.model
    return Forecaster(
        len(spec["columns"]),
        spec["lookback"],
        spec["horizon"],
        {"attention": recipe.attention, **backbone.model_dump()},
        channels=model.channels,
        patch=model.patch,
        stride=model.stride,
        revin=model.revin,
        shortcut=model.shortcut != "none",
        ridge=unpack(spec["ridge"]) if model.shortcut == "ridge" else None,
        quantiles=model.quantiles if model.output == "quantiles" else None,
    )
