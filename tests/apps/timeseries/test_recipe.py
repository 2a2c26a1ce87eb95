"""Recipes: every shipped one is complete and honest about its data; options that cannot mean anything are errors."""

import json

import pytest

from apps.timeseries.data import build_data
from core.training.errors import UserError
from core.training.recipe import load_recipe, recipes

SHIPPED = ("csv", "demo", "ettm1", "ettm2", "etth1", "etth2", "exchange", "illness", "weather")


def test_all_recipes_are_there():
    found = [reference for reference, *_ in recipes() if reference.startswith("timeseries/")]
    assert sorted(found) == sorted(f"timeseries/{name}" for name in SHIPPED)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.lookbak=96"], r"unknown key 'data.lookbak' \(did you mean 'lookback'\?\)"),
        (["data.lookback=0"], r"data.lookback must be greater than or equal to 1, got 0"),
        (["data.lookback=long"], r"data.lookback must be .*integer, got 'long'"),
        (["data.val_from=2020-01-01"], r"val_from and test_from belong to split=dates, the split is ratio"),
        (["data.split=dates"], r"split=dates needs data.val_from and data.test_from"),
        (["data.train_share=0.8", "data.test_share=0.2"], r"must leave a validation part, got 0.8 \+ 0.2"),
        (["data.split=ett_hour", "data.train_share=0.5"], r"train_share and test_share belong to split=ratio"),
        (["model.channels=token"], r"model.channels must be 'independent', 'mixed' or 'tokens', got 'token'"),
        (["model.channels=tokens", "model.patch=8"], r"patch and stride have no meaning with channels=tokens"),
        (["model.patch=4", "model.stride=8"], r"stride must not exceed patch"),
        (["model.output=quantiles", "model.loss=mae"], r"loss belongs to output=point"),
        (["model.quantiles=[0.1,0.9]"], r"quantiles must rise and contain 0.5"),
        (["model.quantiles=[0.1,0.5,1.5]"], r"must be less than 1, got 1.5"),
        (["backbone.heads=3"], r"heads must divide dim"),
        (["attention=windoe"], r"unknown attention 'windoe' \(did you mean 'window'\?\)"),
        (["attention=window", "attention.window=0"], r"window must be at least 1"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        load_recipe("timeseries/csv", overrides)


def test_generated_and_path_exclude_each_other():
    with pytest.raises(UserError, match="give one of the two"):
        load_recipe("timeseries/demo", ["data.path=my.csv"])


def test_the_users_file_must_be_named(monkeypatch):
    with pytest.raises(UserError, match=r"data.path is missing: name your file, as in data.path=FILE"):
        build_data(load_recipe("timeseries/csv"))


@pytest.mark.parametrize("name", SHIPPED)
def test_each_recipe_is_plain_and_strict(name):
    recipe = load_recipe(f"timeseries/{name}")
    assert recipe.app == "timeseries"
    json.dumps(recipe.model_dump(mode="json"), allow_nan=False)
