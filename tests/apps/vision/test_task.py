"""Training learns what can be learned, evaluation sums over images, and a run leaves its tables and plots."""

import csv
import json

import pytest
import torch

from apps.vision.data import build_data
from apps.vision.images import fitted, restored
from apps.vision.task import _weights, build_task
from core.training.data import eval_loader, train_loader
from core.training.errors import UserError
from core.training.fit import fit
from core.training.recipe import load_recipe
from core.training.run import load_run


def test_red_is_told_from_blue(classifier):
    metrics = json.loads((classifier / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] == 1.0
    assert metrics["test"]["accuracy_low"] == 1.0
    rows = list(csv.DictReader((classifier / "test_predictions.csv").read_text().splitlines()))
    assert {(row["label"], row["predicted"]) for row in rows} == {("red", "red"), ("blue", "blue")}
    assert all(row["image"].startswith(row["label"]) for row in rows)
    for name in ("classes.csv", "confusion.png", "calibration.png", "curves.png"):
        assert (classifier / name).stat().st_size > 0


def test_the_bright_part_is_found(segmenter):
    metrics = json.loads((segmenter / "metrics.json").read_text())
    assert metrics["test"]["miou"] > 0.85
    rows = {row["class"]: row for row in csv.DictReader((segmenter / "classes.csv").read_text().splitlines())}
    assert int(rows["0"]["pixels"]) + int(rows["1"]["pixels"]) == 4 * 39 * 48  # the ignored row counts nowhere
    assert (segmenter / "test_masks.png").stat().st_size > 0


def batch_and_task(folder, *more, recipe="vision/folder"):
    small = ["data.size=32", "model.patch=8", "backbone.dim=16", "backbone.depth=1", "backbone.heads=2"]
    made = load_recipe(recipe, [f"data.path={folder}", *small, *more])
    data = build_data(made)
    task = build_task(made, data.spec)
    task.total_steps = 10
    return data, task


def test_metrics_do_not_depend_on_the_batch_size(colours):
    data, task = batch_and_task(colours, "model.eval_sizes=[16]")
    found = []
    for size in (1, 4, 6):
        task.eval()
        with torch.no_grad():
            for batch in eval_loader(data, "test", batch_size=size):
                task.eval_update(batch)
        found.append(task.eval_compute())
    assert found[0].keys() == found[1].keys()
    assert "at_16x16_accuracy" in found[0]
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, abs=1e-6) == found[2][name], name


@pytest.mark.parametrize("sizes", [[16, 32], [[16, 24]]])
def test_the_training_size_rises_to_that_of_the_data(colours, sizes, monkeypatch):
    data, task = batch_and_task(colours, f"augment.sizes={sizes}")
    batch = next(iter(train_loader(data, batch_size=4, seed=0)))
    seen = []
    task.model.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape[2:])))
    for step in range(10):
        monkeypatch.setattr(type(task), "global_step", step)
        task.loss(batch)
    first = (sizes[0], sizes[0]) if isinstance(sizes[0], int) else tuple(sizes[0])
    assert seen == [first] * 5 + [(32, 32)] * 5


def test_a_border_stays_unseen_at_other_sizes_in_smaller_steps_and_in_the_mirror(colours, monkeypatch):
    data, task = batch_and_task(
        colours, "data.resize=pad", "model.eval_sizes=[16]", "augment.sizes=[16,32]", "augment.crop=null"
    )
    seen = []
    task.model.register_forward_pre_hook(
        lambda m, args: seen.append(tuple(map(tuple, (args[0].shape[2:], args[1][0].tolist()))))
    )
    monkeypatch.setattr(type(task), "global_step", 0)
    task.loss(next(iter(train_loader(data, batch_size=4, seed=0))))
    task.eval()
    batch = next(iter(eval_loader(data, "test", batch_size=2)))
    with torch.no_grad():
        task.eval_update(batch)
    # Images of 40 x 48 pixels in a square: 27 of 32 rows, or 13 of 16.
    assert seen == [((16, 16), (14, 16)), ((32, 32), (27, 32)), ((16, 16), (13, 16))]
    x, real = task._inputs(batch)
    real[:, 1] = 20  # a border on the right, too
    x[..., 20:] = 7.0
    turned = x.clone()
    turned[..., :20] = x[..., :20].flip(-1)
    with torch.no_grad():
        torch.testing.assert_close(task.answer(x, real, flips=True), task.answer(turned, real, flips=True))


def test_layer_decay_slows_the_layers_below(colours):
    _, task = batch_and_task(colours, "optim.layer_decay=0.5", "backbone.depth=2")
    optimizer = task.configure_optimizers()["optimizer"]
    names = {id(p): name for name, p in task.named_parameters()}
    rates = {names[id(p)]: group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    lr = task.recipe.optim.lr
    assert rates["model.head.weight"] == pytest.approx(lr)
    blocks = [rates[f"model.backbone.encoder.blocks.{n}.mlp.0.weight"] for n in (0, 1)]
    assert blocks[0] == pytest.approx(blocks[1] / 2)
    assert rates["model.backbone.stem.last.weight"] < blocks[0]
    assert len(rates) == sum(p.requires_grad for p in task.parameters())


def test_balance_weighs_rare_classes_more():
    weights = _weights([900, 100], 0.5)
    assert float(weights[1] / weights[0]) == pytest.approx(3.0)
    assert float(0.9 * weights[0] + 0.1 * weights[1]) == pytest.approx(1.0)
    assert _weights([900, 100], 0.0) is None


@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
def test_answers_come_back_to_the_place_of_their_pixels(resize):
    image = torch.zeros(1, 60, 90, dtype=torch.uint8)
    image[:, 20:40, 40:60] = 255
    shown, _ = fitted(image, (32, 32), resize)
    back = restored(shown.float(), (60, 90), resize, 1.0)
    assert back.shape == (1, 60, 90)
    assert ((back[0] > 128) == (image[0] > 128)).float().mean() > 0.95


def test_values_per_pixel_are_learned(halves, tmp_path):
    import numpy as np
    from PIL import Image

    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for n in range(16):
        level = np.full((32, 32), 20 + 14 * n, dtype=np.uint8)
        Image.fromarray(level).save(tmp_path / "images" / f"{n}.png")
        Image.fromarray(level).save(tmp_path / "masks" / f"{n}.png")
    small = [
        "data.size=32",
        "model.patch=8",
        "backbone.dim=16",
        "backbone.depth=1",
        "backbone.heads=2",
        "model.stem=patch",
    ]
    more = ["model.task=values", "model.class_balance=0", "augment.colour=0", "trainer.epochs=25", "optim.lr=1e-2"]
    recipe = load_recipe("vision/segmentation", [f"data.path={tmp_path}", *small, *more, "trainer.accelerator=cpu"])
    metrics = fit(recipe, run_dir=tmp_path / "run", quiet=True).metrics
    assert metrics["test"]["mse"] < 0.5 * metrics["floors"]["mean"]["mse"]


def test_weights_of_another_run_start_a_new_one_also_with_another_head(classifier, colours):
    small = ["model.stem=patch", "model.stem_width=null", "backbone.depth=2", "backbone.mlp_dim=32"]
    small.append(f"model.pretrained={classifier}")
    _, task = batch_and_task(colours, *small)
    task.bring_weights()
    source = load_run(classifier).task.model.state_dict()
    assert all(torch.equal(weight, source[name]) for name, weight in task.model.state_dict().items())
    _, other = batch_and_task(colours, *small, "data.classes=[blue,green,red]")
    other.bring_weights()
    weights = other.model.state_dict()
    assert weights["head.weight"].shape[0] == 3
    assert all(torch.equal(weight, source[name]) for name, weight in weights.items() if not name.startswith("head."))
    with pytest.raises(UserError, match="use the same backbone"):
        batch_and_task(colours, *small, "backbone.dim=32")[1].bring_weights()
