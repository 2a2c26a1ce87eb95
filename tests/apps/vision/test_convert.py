"""Replacing the attention of a trained model: what is taken over, what distillation does, what is compared."""

import csv
import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from apps.vision.convert import Distillation, attention_modules, load_source, take_over
from apps.vision.data import build_data
from apps.vision.images import normalised
from apps.vision.model import VisionModel
from apps.vision.recipe import DistilSection
from apps.vision.task import build_task
from core.training.data import eval_loader, train_loader
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
    new = take_over(model, source.model)
    assert new == [f"backbone.encoder.blocks.{n}.attention.variant.gate" for n in range(2)]
    given = source.model.state_dict()
    assert all(torch.equal(x, given[name]) for name, x in model.state_dict().items() if name not in new)
    # With a window as wide as the image nothing has changed.
    x = torch.randn(2, 3, 32, 32)
    wide = VisionModel(converted(softmax_run, colours, "hybrid", "attention.window=99"), spec).eval()
    take_over(wide, source.model)
    torch.testing.assert_close(wide(x), source.model(x), rtol=1e-4, atol=1e-5)


def test_transfer_brings_each_layer_to_the_output_of_the_old_one(softmax_run, colours):
    recipe = converted(softmax_run, colours, "linear")
    spec = load_run(softmax_run).spec
    source, model = load_source(recipe, spec), VisionModel(recipe, spec)
    take_over(model, source.model)
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
    same = Distillation(source, DistilSection()).transfer(source.model, x, None)
    assert same.item() == 0.0


def test_the_run_reports_the_source_and_the_gap(softmax_run, colours, tmp_path):
    recipe = converted(softmax_run, colours, "linear", "model.distil.steps=1")  # an epoch
    result = fit(recipe, run_dir=tmp_path / "run", quiet=True, floors=False)
    test = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    source = json.loads((softmax_run / "metrics.json").read_text())["test"]["accuracy"]
    assert test["source_accuracy"] == source
    assert "replaced_accuracy" in test
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    # First the layers, then labels and answers; each figure under its own name, also after the change.
    assert [bool(row["train_transfer"]) for row in rows] == [True, False]
    assert [bool(row["train_distance"]) for row in rows] == [False, True]
    assert all(0 <= float(row["val_accuracy"]) <= 1 for row in rows)
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
    assert len(take_over(model, source.model)) == 12
    assert len(attention_modules(model)) == 12
    assert torch.isfinite(Distillation(source, DistilSection()).transfer(model, torch.randn(2, 3, 32, 32), None))


def test_what_does_not_fit_is_named(softmax_run, colours):
    spec = load_run(softmax_run).spec
    recipe = converted(softmax_run, colours, "linear", "backbone.mlp_dim=48")
    with pytest.raises(UserError, match=r"differ in more than attention: .*mlp.*take backbone and model from"):
        take_over(VisionModel(recipe, spec), load_source(recipe, spec).model)
    with pytest.raises(UserError, match=r"was trained for \['blue', 'red'\] \(classes\), the data has \['x', 'y'\]"):
        load_source(recipe, {**spec, "classes": ["x", "y"]})
    with pytest.raises(UserError, match="there is no run"):
        load_source(converted("gone", colours, "linear"), spec)


STOCK = ["model.timm=test_vit", "model.stem=patch", "data.size=32", "trainer.accelerator=cpu", "trainer.threads=1"]
STOCK += ["optim.lr=1e-3", "trainer.epochs=1", "trainer.batch_size=14", "optim.ema=0"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Weights of a stock timm model for two classes, and for a thousand."""
    folder, models = tmp_path_factory.mktemp("stock"), {}
    for classes in (2, 1000):
        torch.manual_seed(classes)
        models[classes] = timm.create_model("test_vit", num_classes=classes, img_size=32).eval()
        save_file(models[classes].state_dict(), folder / f"{classes}.safetensors")
    return folder, models


def stock_recipe(colours, file, *more):
    given = [f"data.path={colours}", *STOCK, "attention={variant: hybrid2d, window: 1}", f"model.convert_from={file}"]
    return load_recipe("vision/folder", [*given, *more])


def test_timm_weights_on_disk_convert_and_report_the_gap(stock, colours, tmp_path):
    folder, models = stock
    recipe = stock_recipe(colours, folder / "2.safetensors", "model.distil.steps=1")
    fit(recipe, run_dir=tmp_path / "run", quiet=True, floors=False)
    test = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    data = build_data(recipe)
    source = load_source(recipe, data.spec)
    assert source.answers
    batch = next(iter(eval_loader(data, "test", batch_size=6)))
    x = normalised(batch["image"], *(torch.tensor(data.spec[name]) for name in ("mean", "std")))
    with torch.no_grad():
        answer = models[2](x)
        torch.testing.assert_close(source.model(x), answer, rtol=1e-4, atol=1e-5)
    assert test["source_accuracy"] == pytest.approx((answer.argmax(1) == batch["label"]).float().mean().item())
    assert "replaced_accuracy" in test
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert "transfer" in rows[0]
    # The run stands for itself: it is loaded without the file.
    assert load_run(tmp_path / "run").task.model.backbone.model.blocks[0].attn.variant.name == "hybrid2d"


def test_layers_are_learned_from_timm_weights_whose_classifier_is_for_other_classes(stock, colours, monkeypatch):
    folder, models = stock
    recipe = stock_recipe(colours, folder / "1000.safetensors")
    data = build_data(recipe)
    task = build_task(recipe, data.spec)
    task.bring_weights()
    task.setup()
    own, given = task.model.backbone.model.state_dict(), models[1000].state_dict()
    assert all(torch.equal(own[name], x) for name, x in given.items() if not name.startswith("head."))
    assert not load_source(recipe, data.spec).answers
    task.total_steps = 10
    batch = next(iter(train_loader(data, batch_size=8, seed=0)))
    terms = []
    for step in (0, recipe.model.distil.steps):
        monkeypatch.setattr(type(task), "global_step", step)
        loss, found = task.loss(batch)
        assert torch.isfinite(loss)
        terms.append(set(found))
    assert terms == [{"transfer"}, set()]  # first the layers, then the labels alone
    assert task._others() == {}


def test_a_file_that_is_not_the_models_is_named(stock, colours):
    folder, _ = stock
    data = build_data(stock_recipe(colours, folder / "2.safetensors"))
    for file, more, text in (
        ("gone.pth", [], r"model.convert_from: there is no file"),
        (
            "2.safetensors",
            ["model.timm=test_vit3"],
            r"model.convert_from: .*2.safetensors does not fit VisionTransformer",
        ),
        ("2.safetensors", ["model.timm=null"], r"holds weights of timm: name the model.timm"),
    ):
        with pytest.raises(UserError, match=text) as error:
            load_source(stock_recipe(colours, folder / file, *more), data.spec)
        assert "\n" not in str(error.value)
