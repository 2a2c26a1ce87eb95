"""The app contract: every app has the same files, an `APP` whose references hold, a demo that runs any variant."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from core.attention.registry import available, variant_class
from core.training.app import App, apps, load
from core.training.data import Data, eval_loader, train_loader
from core.training.errors import UserError
from core.training.fit import fit
from core.training.recipe import Recipe, load_recipe
from core.training.task import Task

ROOT = Path(__file__).resolve().parents[1]
APPS = apps()
FILES = ("__init__", "recipe", "data", "model", "task", "predict", "baselines")

# How to make an app's demo so small that all variants can run it here: a list of overrides, tests/apps/<app>/tiny.yaml.
TINY = {
    name: yaml.safe_load(path.read_text()) if path.is_file() else []
    for name in APPS
    for path in [ROOT / "tests" / "apps" / name / "tiny.yaml"]
}
HEADINGS = ["Your data", "Model", "Figures and files", "Protocol", "Limits", "Reading order"]


def missing_files(folder: Path) -> list[str]:
    wanted = [f"{name}.py" for name in FILES] + ["README.md", "recipes/demo.yaml"]
    return [name for name in wanted if not (folder / name).is_file()]


def test_every_folder_of_apps_is_an_app_and_listed():
    folders = [path.name for path in (ROOT / "apps").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert len(folders) >= 1
    assert sorted(folders) == [name for name, app in APPS.items() if app.folder.parent == ROOT / "apps"]


@pytest.mark.parametrize("name", APPS)
def test_an_app_has_the_files_that_every_app_has(name):
    assert missing_files(APPS[name].folder) == []


@pytest.mark.parametrize("gone", ["model.py", "README.md", "recipes/demo.yaml"])
def test_a_missing_file_is_seen(tmp_path, gone):
    for name in [f"{name}.py" for name in FILES] + ["README.md", "recipes/demo.yaml"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / gone).unlink()
    assert missing_files(tmp_path) == [gone]


@pytest.mark.parametrize("name", APPS)
def test_an_app_page_has_the_headings_that_every_page_has(name):
    text = (APPS[name].folder / "README.md").read_text()
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert [heading for heading in headings if heading != "Results"] == HEADINGS
    assert f"longspan fit {name}/demo" in text


@pytest.mark.parametrize("name", APPS)
def test_references_of_an_app_hold(name):
    app = APPS[name]
    assert isinstance(app, App)
    assert app.name == name
    assert app.better in ("lower", "higher")
    assert 10 < len(app.summary) < 100
    names = ("recipe", "data", "task", "floors", "predict", *(["inspect"] if app.inspect else []))
    parts = {part: load(getattr(app, part)) for part in names}
    assert issubclass(parts.pop("recipe"), Recipe)
    for part, function in parts.items():
        assert callable(function), part
        assert getattr(app, part).startswith(f"{app.folder.parent.name}.{app.folder.name}."), "lives in another room"


def test_a_reference_that_does_not_hold_is_an_error():
    with pytest.raises(UserError, match="no module"):
        load("apps.nowhere:APP")
    with pytest.raises(UserError, match="did you mean 'load_recipe'"):
        load("core.training.recipe:load_recipee")


@pytest.mark.parametrize("name", APPS)
def test_demo_gives_what_the_glue_expects(name):
    recipe = load_recipe(f"{name}/demo", TINY[name])
    app = APPS[name].judged_for(recipe)
    data = app.part("data")(recipe)
    assert isinstance(data, Data)
    assert data.test is not None
    # The checkpoint holds the spec as JSON, so it must come back from JSON as it was.
    assert json.loads(json.dumps(data.spec)) == data.spec
    assert json.loads(json.dumps(data.summary)) == data.summary
    floors = app.part("floors")(recipe, data)
    assert len(floors) >= 1
    for floor, metrics in floors.items():
        assert math.isfinite(metrics[app.metric]), floor

    task = app.part("task")(recipe, data.spec)
    assert isinstance(task, Task)
    loss, _ = task.loss(next(iter(train_loader(data, batch_size=4, seed=0))))
    loss.backward()
    silent = [key for key, weight in task.named_parameters() if weight.requires_grad and weight.grad is None]
    assert torch.isfinite(loss)
    assert silent == [], "weights that the loss does not reach"
    task.eval()
    with torch.no_grad():
        task.eval_update(next(iter(eval_loader(data, "test", batch_size=4))))
    assert math.isfinite(task.eval_compute()[app.metric])
    assert {"parameters", "flops_per_item", "state_bytes", "tokens_per_item"} <= set(task.cost())


@pytest.mark.parametrize("variant", available())
@pytest.mark.parametrize("name", APPS)
def test_every_variant_runs_in_every_app(name, variant, tmp_path):
    overrides = [f"attention={variant}", "trainer.max_steps=2", "trainer.accelerator=cpu", *TINY[name]]
    if "bidirectional" not in variant_class(variant).can:
        with pytest.raises(UserError, match=f"attention '{variant}' cannot do 'bidirectional'"):
            fit(load_recipe(f"{name}/demo", overrides), run_dir=tmp_path / "run", quiet=True)
        return
    recipe = load_recipe(f"{name}/demo", overrides)
    result = fit(recipe, run_dir=tmp_path / "run", quiet=True)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result.metrics == metrics
    assert math.isfinite(metrics["test"][APPS[name].judged_for(recipe).metric])
    assert set(metrics) == {"val", "test", "floors", "cost"}
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert written["attention"]["variant"] == variant or variant == "auto"  # whose choice is what was trained
