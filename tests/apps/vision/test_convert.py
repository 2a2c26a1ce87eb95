"""Replacing the attention of a trained model: what is taken over, what distillation does, what is compared."""

import json

import pytest
import torch

from apps.vision.convert import Distillation, attention_modules, load_source, take_over
from apps.vision.model import VisionModel
from apps.vision.recipe import DistilSection
from core.training.errors import UserError
from core.training.fit import fit
from core.training.recipe import load_recipe
from core.training.run import load_run

SMALL = ["data.size=32", "model.patch=8", "model.stem=patch", "model.stem_width=null", "backbone.dim=16"]
SMALL += ["backbone.depth=2", "backbone.heads=2", "backbone.mlp_dim=32", "trainer.accelerator=cpu", "trainer.epochs=2"]


@pytest.fixture(scope="module")
def softmax_run(colours, tmp_path_factory):
    run = tmp_path_factory.mktemp("convert") / "softmax"
    recipe = load_recipe("vision/folder", [f"data.path={colours}", *SMALL, "attention=softmax", "optim.lr=3e-3"])
    fit(recipe, run_dir=run, quiet=True, floors=False)
    return run


def converted(run, colours, attention, *more):
    given = [f"data.path={colours}", *SMALL, f"attention={attention}", f"model.convert_from={run}", *more]
    return load_recipe("vision/folder", given)


def test_all_weights_but_the_mechanisms_own_are_taken_over(softmax_run, colours):
    recipe = converted(softmax_run, colours, "hybrid")
    spec = load_run(softmax_run).spec
    source, model = load_source(recipe, spec), VisionModel(recipe, spec)
    new = take_over(model, source)
    assert new == [f"backbone.encoder.blocks.{n}.attention.variant.gate" for n in range(2)]
    given = source.state_dict()
    assert all(torch.equal(x, given[name]) for name, x in model.state_dict().items() if name not in new)
    # With a window as wide as the image nothing has changed.
    x = torch.randn(2, 3, 32, 32)
    wide = VisionModel(converted(softmax_run, colours, "hybrid", "attention.window=99"), spec).eval()
    take_over(wide, source)
    torch.testing.assert_close(wide(x), source(x), rtol=1e-4, atol=1e-5)


def test_transfer_brings_each_layer_to_the_output_of_the_old_one(softmax_run, colours):
    recipe = converted(softmax_run, colours, "linear")
    spec = load_run(softmax_run).spec
    source, model = load_source(recipe, spec), VisionModel(recipe, spec)
    take_over(model, source)
    learned = Distillation(source, DistilSection())
    x = torch.randn(4, 3, 32, 32)
    first = learned.transfer(model, x, None)
    first.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved
    assert all(".attention." in name for name in moved)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        learned.transfer(model, x, None).backward()
        optimizer.step()
    assert learned.transfer(model, x, None).item() < 0.5 * first.item()
    same = Distillation(source, DistilSection()).transfer(source, x, None)
    assert same.item() == 0.0


def test_the_run_reports_the_source_and_the_gap(softmax_run, colours, tmp_path):
    recipe = converted(softmax_run, colours, "linear", "model.distil.steps=2")
    result = fit(recipe, run_dir=tmp_path / "run", quiet=True, floors=False)
    test = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    source = json.loads((softmax_run / "metrics.json").read_text())["test"]["accuracy"]
    assert test["source_accuracy"] == source
    assert "replaced_accuracy" in test
    columns = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert "transfer" in columns or "distance" in columns
    # The converted run needs the source no more, and holds none of its weights.
    names = load_run(result.run_dir).task.state_dict()
    assert not [name for name in names if "source" in name]


def test_timm_models_convert_too(colours, tmp_path):
    given = [f"data.path={colours}", "model.timm=vit_tiny_patch16_224", "data.size=32", "model.stem=patch"]
    given += ["trainer.max_steps=1", "trainer.accelerator=cpu", "attention=softmax"]
    fit(load_recipe("vision/folder", given), run_dir=tmp_path / "source", quiet=True, floors=False)
    recipe = load_recipe("vision/folder", [*given, "attention=hybrid2d", f"model.convert_from={tmp_path / 'source'}"])
    spec = load_run(tmp_path / "source").spec
    source, model = load_source(recipe, spec), VisionModel(recipe, spec)
    assert len(take_over(model, source)) == 12
    assert len(attention_modules(model)) == 12
    assert torch.isfinite(Distillation(source, DistilSection()).transfer(model, torch.randn(2, 3, 32, 32), None))


def test_what_does_not_fit_is_named(softmax_run, colours):
    spec = load_run(softmax_run).spec
    recipe = converted(softmax_run, colours, "linear", "backbone.mlp_dim=48")
    with pytest.raises(UserError, match=r"differ in more than attention: .*mlp.*take backbone and model from"):
        take_over(VisionModel(recipe, spec), load_source(recipe, spec))
    with pytest.raises(UserError, match=r"was trained for \['blue', 'red'\] \(classes\), the data has \['x', 'y'\]"):
        load_source(recipe, {**spec, "classes": ["x", "y"]})
    with pytest.raises(UserError, match="there is no run"):
        load_source(converted("gone", colours, "linear"), spec)
