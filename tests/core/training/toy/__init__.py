"""A whole app in four small files: a linear model on generated numbers, for the tests of the glue."""

from core.training.app import App

APP = App(
    name="toy",
    summary="a line through generated points",
    recipe="longspan_toy.recipe:ToyRecipe",
    data="longspan_toy.data:build_data",
    task="longspan_toy.task:build_task",
    floors="longspan_toy.data:floors",
    predict="longspan_toy.task:predict",
    metric="mse",
    better="lower",
    inspect="longspan_toy.task:inspect",
)
