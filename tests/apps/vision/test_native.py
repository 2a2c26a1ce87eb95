"""NaFlexViT through a recipe: images in their own shapes in one batch, masked by keys, from reading to prediction."""

import csv
import json
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import generate_default_cfgs, register_model
from timm.models.naflexvit import NaFlexVitCfg, _cfg, _create_naflexvit

from apps.vision.costs import sized
from apps.vision.data import build_data
from apps.vision.images import fitted
from apps.vision.model import VisionModel
from apps.vision.native import as_patches, bordered, mirrored, native_size, without_border
from apps.vision.task import build_task
from apps.vision.timm_models import patch_of
from core.attention.registry import available, variant_class
from core.training.data import eval_loader, train_loader
from core.training.errors import UserError
from core.training.fit import fit
from core.training.predict import inspect, predict
from core.training.recipe import load_recipe
from core.training.run import load_run

TINY = "naflexvit_tiny_patch8_of_these_tests"
GIVEN = [f"model.timm={TINY}", "model.stem=patch", "data.resize=native", "data.size=32", "attention=softmax"]
GIVEN += ["trainer.accelerator=cpu", "trainer.threads=1", "trainer.batch_size=8", "data.shrink=null"]
SHAPES = [(40, 40), (24, 72), (80, 20), (33, 50)]

default_cfgs = generate_default_cfgs({TINY: _cfg()})
__all__: list[str] = []


def _tiny(pretrained=False, **given):
    """NaFlexViT with patches of 8, two blocks and two registers."""
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "reg_tokens": 2, "global_pool": "avg"}
    cfg = NaFlexVitCfg(**options, fc_norm=True)
    return _create_naflexvit(TINY, pretrained=pretrained, cfg=cfg, **given)


if not timm.is_model(TINY):
    _tiny.__name__ = TINY
    _tiny.__module__ = __name__
    sys.modules[__name__].__dict__[TINY] = register_model(_tiny)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Class folders red and blue, 16 images each in four shapes."""
    folder = tmp_path_factory.mktemp("shapes")
    draw = np.random.default_rng(0)
    for name, colour in (("red", (200, 60, 60)), ("blue", (60, 60, 200))):
        (folder / name).mkdir()
        for n in range(16):
            values = np.array(colour) + draw.integers(-20, 21, (*SHAPES[n % 4], 3))
            Image.fromarray(values.astype(np.uint8)).save(folder / name / f"{name}{n}.png")
    return folder


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    """A run that tells red from blue, scored at another size, too."""
    torch.manual_seed(0)
    more = ["trainer.epochs=3", "optim.lr=3e-3", "model.eval_sizes=[16]", "augment.mixup=0.2", "augment.erasing=0.2"]
    more += ["augment.sizes=[16,32]"]
    made = load_recipe("vision/folder", [f"data.path={shapes}", *GIVEN, *more])
    folder = tmp_path_factory.mktemp("native") / "run"
    fit(made, run_dir=folder, quiet=True, floors=False)
    return folder


def recipe_of(folder, *more):
    return load_recipe("vision/folder", [f"data.path={folder}", *GIVEN, *more])


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (3000, 7), (5, 900), (480, 640)])
@pytest.mark.parametrize("size", [(32, 32), (224, 224), (64, 512)])
def test_an_image_keeps_its_shape_within_as_many_patches(shape, size):
    high, wide = native_size(shape, size, 8)
    assert high % 8 == wide % 8 == 0
    assert 0 < (high // 8) * (wide // 8) <= (size[0] // 8) * (size[1] // 8)
    if min(high, wide) >= 64:  # rounding to whole patches weighs less
        assert (high / wide) / (shape[0] / shape[1]) == pytest.approx(1, abs=0.25)
    shown, real = fitted(torch.zeros(1, *shape, dtype=torch.uint8), size, "native", patch=8)
    assert tuple(shown.shape[1:]) == real == (high, wide)


def test_the_real_patches_of_a_batch_come_first_in_the_order_of_their_rows():
    images = [torch.randn(3, 16, 24), torch.randn(3, 32, 8)]
    real = torch.tensor([[16, 24], [32, 8]])
    x = bordered(images)
    assert x.shape == (2, 3, 32, 24)
    assert all(torch.equal(a, b) for a, b in zip(without_border(x, real), images))
    found = as_patches(x, real, (8, 8))
    assert found["patches"].shape == (2, 6, 192)
    assert found["patch_valid"].sum(1).tolist() == [6, 4]
    assert found["patch_coord"][0].tolist() == [[r, c] for r in range(2) for c in range(3)]
    assert found["patch_coord"][1].tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [0, 0], [0, 0]]
    # Row 1, column 2 of the first image, in the order that timm's own cut gives.
    assert torch.equal(found["patches"][0, 5], images[0][:, 8:16, 16:24].permute(1, 2, 0).flatten())
    assert not found["patches"][1, 4:].any()


def test_mirroring_leaves_the_border_where_it_is():
    x, real = bordered([torch.arange(6.0).view(1, 2, 3), torch.ones(1, 2, 1)]), torch.tensor([[2, 3], [2, 1]])
    assert mirrored(x, real)[0, 0].tolist() == [[2, 1, 0], [5, 4, 3]]
    assert torch.equal(mirrored(x, real)[1], x[1])
    assert torch.equal(mirrored(x, None), x.flip(-1))


@pytest.mark.parametrize(
    "variant",
    [name for name in available() if {"bidirectional", "grid"} & variant_class(name).can == {"bidirectional"}]
    + ["linear", "hybrid"],
)
def test_every_mechanism_of_sequences_answers_for_an_image_as_if_it_were_alone(variant):
    torch.manual_seed(0)
    recipe = load_recipe("vision/folder", [*GIVEN, f"attention={variant}", "data.path=x"])
    model = VisionModel(recipe, {"classes": ["a", "b", "c"], "size": [32, 32]}).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "attn" in name and ".variant." not in name:
                weight.normal_(0, weight.shape[-1] ** -0.5)
    images = [torch.randn(3, 32, 32), torch.randn(3, 8, 72), torch.randn(3, 40, 16)]
    real = torch.tensor([image.shape[1:] for image in images])
    x = bordered(images)
    x[1, :, 8:] = 50.0  # what stands in the border is not seen
    with torch.no_grad():
        together = model(x, real)
        alone = torch.cat([model(image[None], one[None]) for image, one in zip(images, real)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-5)
    model.train()(x, real).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("attention", ["window2d", "hybrid2d", "relu_conv", "{variant: linear, conv: 3}"])
def test_mechanisms_on_a_grid_are_refused_in_one_line_and_run_where_there_is_one(attention):
    spec = {"classes": ["a", "b"], "size": [32, 32]}
    with pytest.raises(UserError, match=r"reads neighbours on a grid, and images in their own shapes") as error:
        VisionModel(load_recipe("vision/folder", [*GIVEN, f"attention={attention}", "data.path=x"]), spec)
    assert "\n" not in str(error.value)
    cropped = load_recipe("vision/folder", [*GIVEN, f"attention={attention}", "data.path=x", "data.resize=crop"])
    model = VisionModel(cropped, spec)
    assert torch.isfinite(model(torch.randn(2, 3, 32, 48))).all()
    assert model.backbone.model.blocks[0].attn.grid == (4, 6)


def test_no_mask_of_all_pairs_is_made():
    model = VisionModel(
        load_recipe("vision/folder", [*GIVEN, "data.path=x"]), {"classes": ["a", "b"], "size": [32, 32]}
    )
    seen = []
    attention = model.backbone.model.blocks[0].attn
    attention.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["attn_mask"].shape), with_kwargs=True
    )
    model(torch.randn(2, 3, 32, 40), torch.tensor([[16, 40], [32, 16]]))
    assert seen == [(2, 1, 1, 2 + 10)]


def test_batches_hold_images_in_their_own_shapes(shapes):
    assert patch_of(TINY) == 8
    data = build_data(recipe_of(shapes, "model.eval_sizes=[16]"))
    assert data.spec["reading"]["patch"] == 8
    batch = next(iter(train_loader(data, batch_size=8, seed=0)))
    assert len({tuple(real) for real in batch["real"].tolist()}) > 1
    assert tuple(batch["image"].shape[2:]) == tuple(batch["real"].amax(0).tolist())
    held = next(iter(eval_loader(data, "test", batch_size=8)))
    image, real = held["sizes"]["at_16x16"]
    assert int((real // 8).prod(1).max()) <= 4
    assert tuple(image.shape[2:]) == tuple(real.amax(0).tolist())


def test_a_run_learns_and_is_scored_at_another_size(run):
    test = json.loads((run / "metrics.json").read_text())["test"]
    assert test["accuracy"] == 1.0
    assert test["at_16x16_accuracy"] >= 0.75
    rows = list(csv.DictReader((run / "sizes.csv").read_text().splitlines()))
    assert [row["tokens"] for row in rows] == ["4", "16"]


@pytest.mark.parametrize("more", [["augment.mixup=0.5"], ["augment.cutmix=1.0"], ["augment.erasing=0.9"], []])
def test_nothing_is_written_into_the_border_that_could_be_seen(shapes, more, monkeypatch):
    data = build_data(recipe_of(shapes, "augment.sizes=[16,32]", *more))
    task = build_task(recipe_of(shapes, "augment.sizes=[16,32]", *more), data.spec)
    task.total_steps = 10
    batch = next(iter(train_loader(data, batch_size=8, seed=0)))
    seen = []
    task.model.register_forward_pre_hook(lambda m, args: seen.append(args))
    for step in (0, 9):
        monkeypatch.setattr(type(task), "global_step", step)
        task.loss(batch)[0].backward()
    (small, less), (x, real) = seen
    assert torch.equal(real, batch["real"])
    assert int((less // 8).prod(1).max()) <= 4 < int((real // 8).prod(1).max())
    assert tuple(small.shape[2:]) == tuple(less.amax(0).tolist())
    assert tuple(x.shape[2:]) == tuple(real.amax(0).tolist())


def test_predict_gives_the_answers_of_the_test_whatever_stands_beside(run, shapes, tmp_path):
    def table(path, source, *more):
        (file,) = predict(run, source, tmp_path / path, more)
        return {row["image"]: row for row in csv.DictReader(file.read_text().splitlines())}

    plain, alone = table("0.csv", shapes), table("1.csv", shapes, "predict.batch_size=1")
    assert len(plain) == 32
    for row in csv.DictReader((run / "test_predictions.csv").read_text().splitlines()):
        for found in (plain, alone):
            assert float(found[row["image"]]["p_red"]) == pytest.approx(float(row["p_red"]), abs=2e-5)
    for more in ("predict.flips=true", "predict.size=64"):
        other = table("2.csv", shapes, more)
        assert any(other[name]["p_red"] != row["p_red"] for name, row in plain.items())
        assert all(row["predicted"] == name.split("/")[0] for name, row in other.items())
    one = table("3.csv", shapes / "red" / "red2.png")
    assert float(one["red2.png"]["p_red"]) == pytest.approx(float(plain["red/red2.png"]["p_red"]), abs=2e-5)


def test_its_cost_is_told_at_any_size():
    found = sized(recipe_of("x", "attention=linear"), ["16", "32x48"], 2, "cpu")
    assert {name: one.tokens for name, one in found.items()} == {"16x16": 4, "32x48": 24}
    assert found["32x48"].cost() > found["16x16"].cost() > 0


def test_inspect_draws_an_image_in_its_own_shape(run, shapes, tmp_path):
    files = inspect(run, shapes / "red" / "red1.png", tmp_path / "look")
    assert [file.name for file in files] == ["red1_attention.png", "red1_field.png"]


def test_stock_weights_load_strictly_and_answer_as_timm_does(shapes, tmp_path):
    torch.manual_seed(1)
    stock = timm.create_model(TINY, num_classes=2).eval()
    save_file(stock.state_dict(), tmp_path / "stock.safetensors")
    recipe = recipe_of(shapes, f"model.weights={tmp_path / 'stock.safetensors'}")
    data = build_data(recipe)
    task = build_task(recipe, data.spec).eval()
    task.bring_weights()
    batch = next(iter(eval_loader(data, "test", batch_size=8)))
    x, real = task._inputs(batch)
    with torch.no_grad():
        # timm's own symmetric N x N mask against our mask of keys.
        torch.testing.assert_close(task.model(x, real), stock(as_patches(x, real, (8, 8))), rtol=1e-5, atol=1e-6)
    state = stock.state_dict()
    state["blocks.7.attn.qkv.weight"] = state.pop("blocks.1.attn.qkv.weight")
    save_file(state, tmp_path / "other.safetensors")
    other = build_task(recipe_of(shapes, f"model.weights={tmp_path / 'other.safetensors'}"), data.spec)
    with pytest.raises(
        UserError, match=r"1 names are missing, such as blocks.1.attn.qkv.weight; 1 are not the model's"
    ):
        other.bring_weights()


def test_a_converted_model_learns_from_real_tokens_only(run, shapes):
    recipe = recipe_of(shapes, "attention=linear", f"model.convert_from={run}")
    task = build_task(recipe, load_run(run).spec)
    task.bring_weights()
    task.setup()
    real = torch.tensor([[32, 32], [8, 72]])
    x = torch.randn(2, 3, 32, 72)
    noisy = x.clone()
    noisy[1, :, 8:] = 9.0
    with torch.no_grad():
        first, second = (task.distillation[0].transfer(task.model, images, real) for images in (x, noisy))
    assert first > 0
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["model.timm=vit_tiny_patch16_224"], "data.resize=native is for NaFlexViT, model.timm=naflexvit_"),
        (["model.timm=null"], "data.resize=native is for NaFlexViT"),
        (["data.crop_ratio=0.9"], "native shows the whole image"),
        (["data.resize=pad"], "use crop, stretch or native"),
        (["data.masks=masks", "model.task=segments"], "segments need a common grid: crop or stretch"),
    ],
)
def test_what_native_does_not_go_with_is_said_in_one_line(given, text):
    quiet = ["augment.smoothing=0", "augment.cutmix=0"] if "model.task=segments" in given else []
    with pytest.raises(UserError, match=text) as error:
        load_recipe("vision/folder", [*GIVEN, *given, *quiet])
    assert "\n" not in str(error.value)


def test_masks_are_answered_by_a_flexible_model_on_a_grid():
    given = ["data.path=x", f"model.timm={TINY}", "data.resize=stretch", "data.size=32", "model.stem=patch"]
    recipe = load_recipe("vision/segmentation", [*given, "model.stem_width=null", "model.head_width=8"])
    model = VisionModel(recipe, {"classes": ["a", "b", "c"], "size": [32, 32]})
    assert model(torch.randn(2, 3, 32, 48)).shape == (2, 3, 32, 48)
