"""Forecasting of one or many series: files in, forecasts with intervals out, floors beside every figure."""

from core.training.app import App

APP = App(
    name="timeseries",
    summary="forecast the next steps of one or many series",
    recipe="apps.timeseries.recipe:TimeSeriesRecipe",
    data="apps.timeseries.data:build_data",
    task="apps.timeseries.task:build_task",
    floors="apps.timeseries.baselines:floors",
    predict="apps.timeseries.predict:predict",
    metric="mse",
    better="lower",
)
