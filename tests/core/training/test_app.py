"""Apps: found as folders and by entry points, and a broken one is named."""

import importlib
import sys

import pytest

from core.training.app import App, apps, get_app, load
from core.training.checkpoint import read_checkpoint
from core.training.errors import UserError
from core.training.fit import fit
from core.training.plan import make_plan
from core.training.recipe import load_recipe
from core.training.run import load_run


def test_apps_come_from_folders_and_entry_points(toy):
    found = apps()
    assert list(found) == sorted(found)
    assert found["timeseries"].recipe == "apps.timeseries.recipe:TimeSeriesRecipe"
    assert found["toy"].summary == "a line through generated points"
    assert (get_app("toy").folder / "recipes" / "demo.yaml").is_file()
    with pytest.raises(UserError, match=r"unknown app 'toi' \(did you mean 'toy'\?\); known: .*timeseries"):
        get_app("toi")


def test_the_better_value(toy):
    lower, higher = get_app("toy"), App(*"nsrdtfpm", better="higher")
    assert lower.improves(1.0, 2.0)
    assert not lower.improves(2.0, 2.0)
    assert higher.improves(2.0, 1.0)
    assert not higher.improves(1.0, 1.0)
    assert lower.improves(9.0, None)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import nowhere_to_be_found", "app 'broken_app:APP' cannot be imported: ModuleNotFoundError: No module named"),
        ("1 / 0", "app 'broken_app:APP' cannot be imported: ZeroDivisionError: division by zero"),
        ("app = 3", "reference 'broken_app:APP': broken_app has no 'APP'"),
        ("APP = 3", "app 'broken_app:APP' must be an App, got int"),
        ("from longspan_toy import APP", "two apps are called 'toy'; the second is 'longspan_toy:APP'"),
    ],
)
def test_a_broken_app_is_named(source, told, toy, monkeypatch):
    info = toy / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[longspan.apps]\nbroken = broken_app:APP\n")
    (toy / "broken_app.py").write_text(source)
    monkeypatch.syspath_prepend(str(toy))
    importlib.invalidate_caches()
    try:
        with pytest.raises(UserError, match=told):
            apps()
    finally:
        sys.modules.pop("broken_app", None)


@pytest.mark.parametrize("reference", ["json", ":x", "json:", "json:dumpz", "nowhere:x"])
def test_a_reference_that_leads_nowhere(reference):
    with pytest.raises(UserError, match=f"reference '{reference}'"):
        load(reference)
    assert load("json:dumps") is importlib.import_module("json").dumps


def test_a_recipe_may_be_judged_by_a_metric_of_its_own(toy):
    own = ["model.judge=fit", "trainer.epochs=4", "trainer.accelerator=cpu"]
    assert get_app("toy").judged_for(load_recipe("toy/demo")) == get_app("toy")
    recipe = load_recipe("toy/demo", own)
    judged = get_app("toy").judged_for(recipe)
    assert (judged.name, judged.metric, judged.better) == ("toy", "fit", "higher")
    fit(recipe, run_dir=toy / "run", quiet=True)
    rows = read_checkpoint(toy / "run" / "checkpoints" / "last.ckpt")["longspan"]["rows"]
    best = read_checkpoint(toy / "run" / "checkpoints" / "best.ckpt")["longspan"]["best"]
    # By "lower is better" the first epoch would win.
    assert best["val_fit"] == max(row["val_fit"] for row in rows) > min(row["val_fit"] for row in rows)
    assert load_run(toy / "run").app.metric == "fit"
    plan = make_plan("toy/demo", variants=["softmax"], seeds=1, overrides=own)
    assert (plan.metric, plan.better) == ("fit", "higher")
    with pytest.raises(UserError, match=r"different metrics, mse \(model.judge=null\) and fit \(model.judge=fit\)"):
        make_plan("toy/demo", variants=["softmax"], seeds=1, grid=["model.judge=null,fit"])
