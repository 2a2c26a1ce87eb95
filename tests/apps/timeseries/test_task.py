"""From a recipe to figures: runs of seconds on small files, and what must be the same whatever the batch."""

import numpy as np
import pandas as pd
import pytest
import torch

from apps.timeseries.data import build_data
from apps.timeseries.task import build_task
from core.training.errors import UserError
from core.training.fit import evaluate, fit
from core.training.recipe import build_recipe, load_recipe
from core.training.run import load_model, load_run

TINY = ["backbone.dim=8", "backbone.depth=1", "backbone.heads=2", "trainer.threads=1", "trainer.accelerator=cpu"]


def waves(path, rows: int = 400, noise: float = 0.1, **more):
    """A file with two hourly series, seasons of a day, in different units."""
    t = np.arange(rows)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "date": pd.date_range("2024-01-01", periods=rows, freq="h"),
            "load": 500 + 80 * np.sin(2 * np.pi * t / 24) + 80 * noise * rng.normal(size=rows),
            "price": 3 + np.cos(2 * np.pi * t / 24 + 1) + noise * rng.normal(size=rows),
            **more,
        }
    )
    frame.to_csv(path, index=False)
    return path


def recipe_for(path, *overrides: str):
    sizes = ["data.lookback=48", "data.horizon=12", "trainer.epochs=1", "trainer.batch_size=64"]
    return load_recipe("timeseries/csv", [f"data.path={path}", *TINY, *sizes, *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    path = waves(folder / "waves.csv")
    return fit(recipe_for(path, "trainer.epochs=3", "optim.lr=3e-3"), run_dir=folder / "run", quiet=True)


def test_a_run_has_both_units_and_all_floors(run):
    test, floors = run.metrics["test"], run.metrics["floors"]
    assert {"mse", "mae", "mse_raw", "mae_raw", "coverage_80", "wql_raw"} <= set(test)
    assert set(floors) == {"last_value", "seasonal_naive", "ridge"}
    assert test["mse"] < floors["last_value"]["mse"] / 5
    # The load is about 100 times the price: in its own units its error dominates.
    assert test["mse_raw"] > 100 * test["mse"]


def test_test_writes_tables_and_plots(run):
    steps = pd.read_csv(run.run_dir / "errors_by_step.csv")
    series = pd.read_csv(run.run_dir / "errors_by_series.csv")
    assert steps["step"].tolist() == list(range(1, 13))
    assert series["unique_id"].tolist() == ["load", "price"]
    assert steps["mse"].mean() == pytest.approx(run.metrics["test"]["mse"])
    assert series["mae_raw"].mean() == pytest.approx(run.metrics["test"]["mae_raw"])
    for plot in ("errors_by_step", "errors_by_series", "windows"):
        assert (run.run_dir / "plots" / f"{plot}.png").read_bytes()[:4] == b"\x89PNG"


def test_forecasts_carry_the_rows_of_the_file(run, tmp_path):
    rows = pd.read_csv(run.run_dir / "forecasts.csv")
    file = pd.read_csv(waves(tmp_path / "again.csv"), parse_dates=["date"]).set_index("date")
    assert list(rows.columns) == ["unique_id", "origin", "ds", "step", "actual", "mean", "q10", "q50", "q90"]
    # 80 test rows hold six whole horizons of 12; each row and series is forecast once.
    assert len(rows) == 2 * 72
    assert not rows.duplicated(["unique_id", "ds"]).any()
    assert rows["origin"][0] == "2024-01-14 08:00:00"
    rows["ds"], rows["origin"] = (pd.to_datetime(rows[name], format="ISO8601") for name in ("ds", "origin"))
    for row in rows.sample(20, random_state=0).itertuples():
        assert row.actual == pytest.approx(file.loc[row.ds, row.unique_id], rel=1e-5)
        assert row.ds == row.origin + pd.Timedelta(hours=row.step - 1)
    assert rows["ds"].min() == file.index[320]
    assert (rows["q10"] <= rows["q50"]).all()
    assert (rows["q50"] <= rows["q90"]).all()


def test_the_metric_is_the_same_for_every_batch_size(run):
    loaded = load_run(run.run_dir)
    data = build_data(loaded.recipe)
    found = []
    for size in (1, 7, 512):
        loaded.task.part = ""
        for chosen in torch.arange(len(data.test)).split(size):
            with torch.no_grad():
                loaded.task.eval_update(data.test.__getitems__(chosen.tolist()))
        found.append(loaded.task.eval_compute())
    assert found[0] == pytest.approx(run.metrics["test"], rel=1e-5)
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_testing_again_gives_the_same_figures(run):
    again = evaluate(run.run_dir)
    assert again["test"] == pytest.approx(run.metrics["test"], rel=1e-6)
    assert again["floors"] == run.metrics["floors"]


def test_the_exported_model_is_the_trained_one(run):
    model, task = load_model(run.run_dir), load_run(run.run_dir).task
    x = torch.randn(3, 2, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(x), task.model(x))


def test_quantile_output_is_calibrated_on_easy_data(tmp_path):
    path = waves(tmp_path / "waves.csv", rows=1500, noise=0.4)
    options = ["model.output=quantiles", "model.quantiles=[0.05,0.25,0.5,0.75,0.95]", "model.shortcut=ridge"]
    result = fit(recipe_for(path, *options, "trainer.epochs=4", "optim.lr=5e-3"), run_dir=tmp_path / "run", quiet=True)
    test = result.metrics["test"]
    assert test["coverage_90"] == pytest.approx(0.9, abs=0.06)
    assert test["coverage_50"] == pytest.approx(0.5, abs=0.1)
    assert test["mse"] < result.metrics["floors"]["seasonal_naive"]["mse"]


def test_ridge_shortcut_starts_at_the_floor(tmp_path):
    # A learning rate of nothing: what is tested is where training starts.
    path = waves(tmp_path / "waves.csv")
    start = fit(recipe_for(path, "model.shortcut=ridge", "optim.lr=1e-12"), run_dir=tmp_path / "run", quiet=True)
    for name in ("mse", "mae", "mse_raw"):
        assert start.metrics["test"][name] == pytest.approx(start.metrics["floors"]["ridge"][name], rel=1e-4)


@pytest.mark.parametrize("channels", ["mixed", "tokens"])
def test_channel_modes_run(tmp_path, channels):
    recipe = recipe_for(waves(tmp_path / "waves.csv"), f"model.channels={channels}", "trainer.max_steps=2")
    result = fit(recipe, run_dir=tmp_path / "run", quiet=True)
    assert np.isfinite(result.metrics["test"]["mse"])


def holes(path):
    frame = pd.read_csv(waves(path)).astype(object)
    frame.loc[100:120, "load"] = None
    frame.loc[350:352, "price"] = None
    return frame.drop(index=range(200, 206))


def test_missing_values_are_masked_in_loss_and_score(tmp_path):
    path = tmp_path / "holes.csv"
    frame = holes(path)
    frame.to_csv(path, index=False)
    with pytest.raises(UserError, match=r"'load' has 27 missing values .*6 whole rows are absent.*data.missing=error"):
        build_data(recipe_for(path))
    recipe = recipe_for(path, "data.missing=mask", "data.sentinels=[-1]")
    data = build_data(recipe)
    assert data.summary["gaps"].startswith("6 rows absent in 1 gaps, first at 2024-01-09 08:00")
    assert data.summary["missing"] == {"load": 27, "price": 9}
    # Whatever stands in the holes, the loss does not see it.
    task = build_task(recipe, data.spec).eval()
    batch = data.train.__getitems__(range(len(data.train)))
    assert not batch["observed"].all()
    spoiled = {**batch, "future": batch["future"].where(batch["observed"], 1e6)}
    assert task.loss(spoiled)[0].item() == pytest.approx(task.loss(batch)[0].item(), rel=1e-6)
    result = fit(recipe, run_dir=tmp_path / "run", quiet=True)
    assert np.isfinite(result.metrics["test"]["mse"])
    assert pd.read_csv(result.run_dir / "forecasts.csv")["actual"].isna().sum() == 3


def test_filled_values_count_as_real(tmp_path):
    path = tmp_path / "holes.csv"
    holes(path).to_csv(path, index=False)
    data = build_data(recipe_for(path, "data.missing=fill"))
    assert "observed" not in data.train.__getitems__([0])


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        (
            60,
            ["data.lookback=48", "data.horizon=12"],
            r"look-back 48 \+ horizon 12 = 60 rows do not fit into the training part",
        ),
        (
            100,
            ["data.lookback=20", "data.horizon=15"],
            r"a horizon of 15 does not fit into the val part.*data.horizon=10 or less",
        ),
    ],
)
def test_a_series_too_short(tmp_path, rows, overrides, message):
    with pytest.raises(UserError, match=message):
        build_data(recipe_for(waves(tmp_path / "short.csv", rows=rows), *overrides))


def test_the_scaler_knows_the_training_rows_alone(tmp_path):
    path = waves(tmp_path / "waves.csv")
    frame = pd.read_csv(path)
    before = build_data(recipe_for(path)).spec["scaler"]
    frame.loc[280:, "load"] += 1000
    frame.to_csv(path, index=False)
    assert build_data(recipe_for(path)).spec["scaler"] == before
    frame.loc[279, "load"] += 1000
    frame.to_csv(path, index=False)
    assert build_data(recipe_for(path)).spec["scaler"] != before


@pytest.mark.parametrize(
    ("file", "lookback", "horizon"),
    [
        ("darts_small/AirPassengers.csv", 24, 12),
        ("darts_small/heart_rate.csv", 168, 24),
        ("darts_small/taylor.csv", 168, 24),
        ("darts_small/wineind.csv", 36, 12),
        ("illness/national_illness.csv", 208, 52),
    ],
)
def test_sizes_follow_from_the_length(shared_data, file, lookback, horizon):
    data = build_data(load_recipe("timeseries/csv", [f"data.path={shared_data / 'timeseries' / file}"]))
    assert (data.spec["lookback"], data.spec["horizon"]) == (lookback, horizon)
    assert len(data.train) > 0
    assert len(data.test) > 0


def test_the_ett_windows_are_the_published_ones(shared_data):
    path = shared_data / "timeseries" / "ett" / "ETTh1.csv"
    for horizon, count in ((96, 2785), (720, 2161)):
        options = {"path": str(path), "split": "ett_hour", "lookback": 336, "horizon": horizon}
        data = build_data(build_recipe({"app": "timeseries", "data": options}))
        assert len(data.test) == count
        assert data.test.origins[0] == 11520, "the first test window forecasts the first test row"
    assert data.summary["rows_unused"] == 3020


@pytest.mark.parametrize(
    ("name", "rows", "frequency", "series", "place"),
    [
        ("etth2", 17420, "h", 7, "ett/ETTh2.csv"),
        ("ettm2", 69680, "15min", 7, "ett/ETTm2.csv"),
        ("weather", 52696, "10min", 21, "weather/weather.csv"),
    ],
)
def test_recipes_of_files_that_are_not_here_work_on_their_shape(
    tmp_path, monkeypatch, name, rows, frequency, series, place
):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(rows, series)).cumsum(axis=0).astype(np.float32)
    stamps = pd.date_range("2016-07-01", periods=rows, freq=frequency).to_numpy().copy()
    if name == "weather":  # the public file has a duplicate time stamp and cells of -9999
        stamps[30000] = stamps[29999]
        values[40000, 3] = -9999
    path = tmp_path / "timeseries" / place
    path.parent.mkdir(parents=True)
    frame = pd.DataFrame(values, columns=[f"v{i}" for i in range(series)])
    frame.insert(0, "date", stamps)
    frame.to_csv(path, index=False)
    monkeypatch.setenv("LONGSPAN_DATA", str(tmp_path))
    recipe = load_recipe(f"timeseries/{name}", [*TINY, "trainer.max_steps=1", "trainer.batch_size=8"])
    data = build_data(recipe)
    used = {"etth2": 14400, "ettm2": 57600, "weather": 52696}[name]
    assert data.spec["test_from"] + len(data.spec["test_stamps"]) == used, "no row is added or dropped"
    task = build_task(recipe, data.spec)
    assert torch.isfinite(task.loss(data.train.__getitems__(range(4)))[0])
    if name == "weather":
        assert any("-9999" in warning for warning in data.summary["warnings"])
