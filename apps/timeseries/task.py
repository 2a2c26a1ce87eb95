"""What training, validation and test do with a batch of windows."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.timeseries.intervals import ResidualIntervals
from apps.timeseries.metrics import ForecastErrors, pinball
from apps.timeseries.model import Forecaster, build_model
from apps.timeseries.recipe import TimeSeriesRecipe
from apps.timeseries.results import Kept, write_results
from core.training.task import Task

MOST_KEPT = 1000
"""Test windows whose forecasts are written out."""


class ForecastTask(Task):
    """Point or quantile forecasting of all series of a table.

    Args:
        recipe: the resolved recipe.
        spec: what `build_data` found: columns, scaler, sizes.
    """

    model: Forecaster
    recipe: TimeSeriesRecipe
    levels: Tensor

    def __init__(self, recipe: TimeSeriesRecipe, spec: dict[str, Any]):
        super().__init__(recipe, spec)
        self.model = build_model(recipe, spec)
        levels = recipe.model.quantiles
        series, horizon = len(spec["columns"]), spec["horizon"]
        windows = spec["test_from"] - spec["val_from"] - horizon + 1
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.median = levels.index(0.5)
        self.intervals = (
            None if self.model.is_quantile else ResidualIntervals(series, horizon, levels, spec["val_from"], windows)
        )
        self.errors = ForecastErrors(spec["scaler"]["mean"], spec["scaler"]["std"], horizon, levels)
        self.tested = self.errors  # the sums of the last finished pass
        tests = len(spec["test_stamps"]) - horizon + 1
        # Origins one horizon apart: together they forecast every row of the test part once.
        self.every = max(horizon, -(-tests // MOST_KEPT))
        self.kept: list[Kept] = []
        self.part = ""

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared, absolute or pinball loss over the observed values of a batch."""
        forecast, future = self.model(batch["past"]).float(), batch["future"]
        if self.model.is_quantile:
            losses = pinball(forecast, future, self.levels).mean(dim=-1)
        elif self.recipe.model.loss == "mae":
            losses = (forecast - future).abs()
        else:
            losses = (forecast - future).square()
        if "observed" not in batch:
            return losses.mean(), {}
        seen = batch["observed"].to(losses.dtype)
        return (losses * seen).sum() / seen.sum().clamp(min=1), {}

    def eval_update(self, batch: dict[str, Any]) -> None:
        """Add a batch to the sums; validation residuals become intervals, some test forecasts are kept."""
        if self.part != batch["part"]:
            self.part = batch["part"]
            self._start_pass()
        point, quantiles = self.forecast(batch["past"])
        future, observed = batch["future"], batch.get("observed")
        if self.part == "val" and self.intervals is not None:
            self.intervals.collect(point, future, batch["origin"], observed)
            quantiles = None  # the intervals of these weights are not known before the pass ends
        self.errors.update(point, future, observed, quantiles)
        if self.part == "test" and quantiles is not None:
            for row in torch.nonzero((batch["origin"] - self.spec["test_from"]) % self.every == 0).flatten().tolist():
                past, ahead, drawn, spread = (
                    t[row].double().cpu().numpy() for t in (batch["past"], future, point, quantiles)
                )
                seen = None if observed is None else observed[row].cpu().numpy()
                self.kept.append(Kept(int(batch["origin"][row]), past, ahead, drawn, spread, seen))

    def eval_compute(self) -> dict[str, float]:
        """Metrics of the pass that ends here."""
        if self.part == "val" and self.intervals is not None:
            self.intervals.learn()
        self.part, self.tested = "", self.errors
        return self.errors.compute()

    def forecast(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """Past [B, C, L] -> point forecast [B, C, H] and quantiles [B, C, H, Q], standardised float32.

        The point forecast of a quantile model is its median.
        """
        output = self.model(past).float()
        if self.model.is_quantile:
            return output[..., self.median], output
        assert self.intervals is not None
        return output, self.intervals(output)

    def cost(self) -> dict[str, Any]:
        """Parameters, FLOPs, state bytes and tokens of one window of all series."""
        return self.model.cost()

    def artifacts(self, run_dir: Path) -> list[Path]:
        """Errors by step and by series, forecasts with dates, and plots of all three."""
        return write_results(run_dir, self.spec, self.recipe.model.quantiles, self.tested, self.kept)

    def _start_pass(self) -> None:
        scaler = self.spec["scaler"]
        self.errors = ForecastErrors(scaler["mean"], scaler["std"], self.spec["horizon"], self.recipe.model.quantiles)
        self.kept = []
        if self.intervals is not None:
            self.intervals.kept = []


def build_task(recipe: TimeSeriesRecipe, spec: dict[str, Any]) -> ForecastTask:
    """The task of a recipe for the data that `spec` describes.

    Raises:
        ValueError: the model cannot be built as the recipe says.
    """
    return ForecastTask(recipe, spec)
