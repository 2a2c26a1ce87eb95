"""`predict`: beyond the end of the file, in the user's units, with dates that go on, from the checkpoint alone."""

import json

import numpy as np
import pandas as pd
import pytest

from core.training.errors import UserError
from core.training.fit import fit
from core.training.predict import predict
from core.training.recipe import load_recipe

ROWS = 500


def ramp_and_sine(stamps) -> pd.DataFrame:
    """A ramp of 2 units a step from 1000 and a sine of period 24: both obey a linear law, so the answer is known."""
    t = np.arange(len(stamps))
    return pd.DataFrame({"when": stamps, "ramp": 1000 + 2.0 * t, "sine": 5 * np.sin(2 * np.pi * t / 24)})


def truth(steps: int = 12) -> np.ndarray:
    t = ROWS + np.arange(steps)
    return np.concatenate([1000 + 2.0 * t, 5 * np.sin(2 * np.pi * t / 24)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    path = folder / "train.csv"
    ramp_and_sine(pd.date_range("2024-01-01", periods=ROWS, freq="h")).to_csv(path, index=False)
    options = ["model.shortcut=ridge", "data.lookback=48", "data.horizon=12", "optim.lr=1e-5", "trainer.epochs=1"]
    small = ["backbone.dim=8", "backbone.depth=1", "backbone.heads=2", "trainer.threads=1", "trainer.accelerator=cpu"]
    recipe = load_recipe("timeseries/csv", [f"data.path={path}", "data.time=when", *options, *small])
    result = fit(recipe, run_dir=folder / "run", quiet=True)
    path.rename(folder / "moved.csv")  # predict must not need the training file
    return result.run_dir, folder / "moved.csv"


def test_a_known_ramp_and_sine_go_on(trained, tmp_path):
    run, file = trained
    written = predict(run, file, tmp_path / "forecast.csv")
    assert [path.name for path in written] == ["forecast.csv", "forecast.png"]
    table = pd.read_csv(written[0], parse_dates=["ds", "origin"])
    assert list(table.columns) == ["unique_id", "origin", "ds", "step", "mean", "q10", "q50", "q90"]
    assert table["unique_id"].tolist() == ["ramp"] * 12 + ["sine"] * 12
    assert table["step"].tolist() == list(range(1, 13)) * 2
    last = pd.Timestamp("2024-01-01") + pd.Timedelta(hours=ROWS - 1)
    assert (table["origin"] == last).all()
    assert table["ds"].tolist() == [last + pd.Timedelta(hours=h) for h in range(1, 13)] * 2
    # One step too early or late would be 2 units of the ramp and 1.3 of the sine.
    assert np.abs(table["mean"] - truth())[:12].max() < 1.0
    assert np.abs(table["mean"] - truth())[12:].max() < 0.3
    assert (table["q10"] <= table["q90"]).all()
    assert written[1].read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("output", "told"), [("f.png", "written to a .csv file"), ("f.csv", "is a folder")])
def test_forecasts_go_to_a_csv_file(output, told, trained, tmp_path):
    run, file = trained
    (tmp_path / "f.csv").mkdir()
    with pytest.raises(UserError, match=rf"--output .*{output}:? .*{told}"):
        predict(run, file, tmp_path / output)


def test_a_checkpoint_file_alone_is_enough(trained, tmp_path):
    run, file = trained
    alone = tmp_path / "best.ckpt"
    alone.write_bytes((run / "checkpoints" / "best.ckpt").read_bytes())
    from_run = predict(run, file, tmp_path / "a.csv")[0].read_text()
    assert predict(alone, file, tmp_path / "b.csv")[0].read_text() == from_run


def test_the_order_of_columns_and_further_columns_do_not_matter(trained, tmp_path):
    run, file = trained
    frame = pd.read_csv(file)
    mixed = frame.assign(other=1.0, city="Oslo")[["city", "sine", "when", "other", "ramp"]].tail(48)
    mixed.to_csv(tmp_path / "mixed.csv", index=False)
    plain, other = (pd.read_csv(predict(run, f, tmp_path / "out.csv")[0]) for f in (file, tmp_path / "mixed.csv"))
    pd.testing.assert_frame_equal(plain, other)


def test_a_file_of_other_dates_continues_its_own(trained, tmp_path):
    run, _ = trained
    ramp_and_sine(pd.date_range("2030-06-01 06:00", periods=100, freq="h")).to_csv(tmp_path / "new.csv", index=False)
    table = pd.read_csv(predict(run, tmp_path / "new.csv", tmp_path / "out.csv")[0], parse_dates=["ds"])
    assert table["ds"][0] == pd.Timestamp("2030-06-01 06:00") + pd.Timedelta(hours=100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: f.rename(columns={"ramp": "Ramps"}),
            r"target column 'ramp' does not exist \(did you mean 'Ramps'\?\)",
        ),
        (lambda f: f.head(30), "30 rows, the run needs a look-back of 48"),
        (lambda f: f[::2], "its rows are 2h apart, the run was trained on h"),
        (lambda f: f.assign(ramp=f["ramp"].where(f.index != 490)), r"column 'ramp' has 1 missing values"),
        (lambda f: f.rename(columns={"when": "time"}), r"no time column 'when'"),
        (
            lambda f: f.assign(ramp=f["ramp"].astype(object).where(f.index != 7, "oops")),
            r"row 8 \(line 9\), column 'ramp': 'oops'",
        ),
    ],
)
def test_a_file_that_does_not_fit(trained, tmp_path, change, message):
    run, file = trained
    change(pd.read_csv(file)).to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(UserError, match=message):
        predict(run, tmp_path / "bad.csv", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("stamps", "column", "expected"),
    [
        (None, None, list(range(500, 506))),
        (range(10, 1010, 2), "t", [1010, 1012, 1014, 1016, 1018, 1020]),
        (pd.date_range("1980-01-01", periods=500, freq="MS"), "month", ["2021-09-01", "2021-10-01", "2021-11-01"]),
        (pd.date_range("2020-01-03", periods=500, freq="B"), "date", ["2021-12-03", "2021-12-06", "2021-12-07"]),
    ],
)
def test_every_kind_of_time_goes_on(tmp_path, stamps, column, expected):
    frame = pd.DataFrame({"y": np.sin(np.arange(500) / 3)})
    if column:
        frame.insert(0, column, list(stamps))
    frame.to_csv(tmp_path / "y.csv", index=False)
    small = ["backbone.dim=8", "backbone.depth=1", "backbone.heads=2", "trainer.max_steps=1", "trainer.accelerator=cpu"]
    overrides = [f"data.path={tmp_path / 'y.csv'}", "data.lookback=24", "data.horizon=6", "trainer.threads=1", *small]
    result = fit(load_recipe("timeseries/csv", overrides), run_dir=tmp_path / "run", quiet=True)
    table = pd.read_csv(predict(result.run_dir, tmp_path / "y.csv", tmp_path / "out.csv")[0])
    assert table["ds"].tolist()[: len(expected)] == expected


def test_a_quantile_run_gives_its_own_quantiles(tmp_path):
    ramp_and_sine(pd.date_range("2024-01-01", periods=ROWS, freq="h")).to_csv(tmp_path / "y.csv", index=False)
    options = [
        "model.output=quantiles",
        "model.quantiles=[0.025,0.5,0.975]",
        "trainer.max_steps=2",
        "trainer.threads=1",
    ]
    small = ["backbone.dim=8", "backbone.depth=1", "backbone.heads=2", "trainer.accelerator=cpu", "data.lookback=24"]
    recipe = load_recipe("timeseries/csv", [f"data.path={tmp_path / 'y.csv'}", *options, *small])
    result = fit(recipe, run_dir=tmp_path / "run", quiet=True)
    table = pd.read_csv(predict(result.run_dir, tmp_path / "y.csv", tmp_path / "out.csv")[0])
    assert {"q2.5", "q50", "q97.5"} <= set(table.columns)
    assert (table["mean"] == table["q50"]).all()
    assert (table["q2.5"] <= table["q97.5"]).all()


def test_the_spec_is_plain_json(trained):
    run, _ = trained
    spec = json.loads((run / "config.json").read_text())["spec"]
    assert spec["columns"] == ["ramp", "sine"]
    assert spec["clock"] == {"kind": "date", "column": "when", "frequency": "h"}
