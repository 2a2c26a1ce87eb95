"""The plain backbone and the heads: any size, borders that change nothing, positions that know rows from columns."""

import pytest
import torch

from apps.vision.costs import count_cost
from apps.vision.model import VisionModel
from apps.vision.stems import ConvStem, Residual, ResidualStem, Texture
from core.training.recipe import load_recipe

SPEC = {"classes": ["a", "b", "c"], "size": [32, 48]}
BASE = ["data.size=[32,48]", "model.patch=8", "model.stem=patch", "model.stem_width=null", "backbone.dim=16"]
BASE += ["backbone.depth=2", "backbone.heads=2", "backbone.mlp_dim=32"]


def model_of(*more, recipe="vision/folder"):
    torch.manual_seed(0)
    return VisionModel(load_recipe(recipe, [*BASE, *more]), SPEC).eval()


@pytest.mark.parametrize("attention", ["softmax", "linear", "hybrid2d", "window2d", "inline", "relu_conv"])
@pytest.mark.parametrize("size", [(32, 48), (64, 16), (8, 8), (8, 72)])
def test_any_size_that_the_patch_divides(attention, size):
    model = model_of(f"attention={attention}", "model.registers=2", "model.pool=token")
    assert model(torch.randn(2, 3, *size)).shape == (2, 3)


@pytest.mark.parametrize("head", ["plain", "multiscale"])
@pytest.mark.parametrize("stem", ["patch", "conv", "residual"])
@pytest.mark.parametrize("patch", [1, 4, 8, 16])
def test_maps_have_the_size_of_the_image(head, stem, patch):
    model = model_of(f"model.head={head}", f"model.stem={stem}", f"model.patch={patch}", recipe="vision/segmentation")
    out = model(torch.randn(1, 3, 32, 48))
    assert out.shape == (1, 3, 32, 48)
    model.train()(torch.randn(1, 3, 32, 48)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_size_that_does_not_divide_names_the_nearest():
    with pytest.raises(ValueError, match="images of 30 x 48 do not divide into patches of 8; the nearest is 32 x 48"):
        model_of()(torch.randn(1, 3, 30, 48))
    with pytest.raises(
        ValueError, match=r"data.size=\[32, 48\] does not divide into patches of 5; the nearest size is \[30, 50\]"
    ):
        model_of("model.patch=5")


@pytest.mark.parametrize("attention", ["softmax", "linear", "hybrid2d", "window2d", "hybrid"])
@pytest.mark.parametrize("pool", ["mean", "token"])
def test_a_border_changes_nothing(attention, pool):
    model = model_of(f"attention={attention}", f"model.pool={pool}", "data.resize=pad").double()
    x = torch.randn(1, 3, 32, 24, dtype=torch.float64)
    wider = torch.cat((x, 9 * torch.randn(1, 3, 32, 24, dtype=torch.float64)), 3)
    got = model(wider, torch.tensor([[32, 24]]))
    if attention == "hybrid":  # its window counts along the line, which a border lengthens
        assert torch.isfinite(got).all()
        return
    torch.testing.assert_close(got, model(x), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rope2d"])
def test_positions_tell_rows_from_columns(positions):
    model = model_of(f"backbone.positions={positions}", "attention=softmax")
    x = torch.randn(1, 3, 32, 48)
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8)  # [1, 3, 4, 6, 8, 8]
    swapped = patches.clone()
    swapped[:, :, 0, 0], swapped[:, :, 2, 5] = patches[:, :, 2, 5], patches[:, :, 0, 0]
    moved = swapped.permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 32, 48)
    assert not torch.allclose(model(moved), model(x), atol=1e-5)
    without = model_of("backbone.positions=rope2d", "attention=softmax")
    without.backbone.encoder.blocks = torch.nn.ModuleList()  # nothing but the mean: order is lost
    torch.testing.assert_close(without(moved), without(x))


def test_the_conv_stem_halves_until_the_patch_is_a_token():
    stem = ConvStem(3, 24, 16, 6)
    out, finer = stem(torch.randn(1, 3, 64, 32))
    assert out.shape == (1, 24, 4, 2)
    assert [tuple(one.shape[1:]) for one in finer] == [(6, 32, 16), (12, 16, 8), (24, 8, 4)]
    assert stem.widths == [6, 12, 24]


@pytest.mark.parametrize(("patch", "grid", "widths"), [(16, (4, 2), [6, 12, 24]), (2, (32, 16), []), (1, (64, 32), [])])
def test_the_residual_stem_halves_until_the_patch_is_a_token(patch, grid, widths):
    stem = ResidualStem(3, 12, patch, 6)
    out, finer = stem(torch.randn(2, 3, 64, 32))
    assert out.shape == (2, 12, *grid)
    assert stem.widths == widths == [one.shape[1] for one in finer]
    block = Residual(6).eval()
    x = torch.randn(1, 6, 5, 4)
    torch.testing.assert_close(block(x), torch.nn.functional.gelu(x))


def test_texture_starts_at_the_answer_of_the_tokens_and_reads_no_places():
    with_it, without = (model_of("model.stem=residual", f"model.texture={on}") for on in ("true", "false"))
    with_it.load_state_dict(without.state_dict(), strict=False)
    x = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(with_it(x), without(x))

    texture = Texture([4], 3).eval()
    torch.nn.init.normal_(texture.project.weight)
    a = torch.randn(2, 4, 6, 8)
    shuffled = a.flatten(2)[..., torch.randperm(48)].unflatten(2, (6, 8))
    torch.testing.assert_close(texture([a]), texture([shuffled]))
    assert not torch.allclose(texture([a]), texture([a + 1]), atol=1e-2)  # the mean
    assert not torch.allclose(texture([a]), texture([a * 2 - a.mean((2, 3), keepdim=True)]), atol=1e-2)  # the deviation


@pytest.mark.parametrize("stem", ["conv", "residual"])
def test_every_weight_learns_with_texture(stem):
    model = model_of(f"model.stem={stem}", "model.texture=true").train()
    # What starts at zero lets nothing flow back through it.
    torch.nn.init.normal_(model.texture.project.weight)
    for block in (one for one in model.modules() if isinstance(one, Residual)):
        torch.nn.init.ones_(block.norm.weight)
    model(torch.randn(3, 3, 32, 48)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_texture_bears_flat_images_and_a_batch_of_one():
    model = model_of("model.stem=residual", "model.texture=true").train()
    torch.nn.init.normal_(model.texture.project.weight)
    model(torch.zeros(1, 3, 32, 48)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_flops_are_counted_where_they_run():
    model = model_of("attention=softmax")
    cost = count_cost(model, 3, (32, 48))
    tokens, dim = 24, 16
    stem, block = 2 * tokens * 3 * 64 * dim, 2 * tokens * (4 * dim * dim + 2 * dim * 32) + 4 * tokens * tokens * dim
    assert cost["flops_per_item"] == stem + 2 * block + 2 * dim * 3
    assert cost["tokens_per_item"] == tokens
    wide = count_cost(model_of("attention=window2d", "attention.window=99"), 3, (32, 48))
    assert wide["flops_per_item"] == cost["flops_per_item"]
    narrow = count_cost(model_of("attention=window2d", "attention.window=2"), 3, (32, 48))
    assert narrow["flops_per_item"] < cost["flops_per_item"]


def test_a_timm_backbone_segments_with_layers_by_letter():
    recipe = load_recipe(
        "vision/segmentation", ["data.size=[32,48]", "model.timm=vit_tiny_patch16_224", "model.stem=patch"]
    )
    recipe.attention, recipe.backbone.layout = {"l": {"variant": "linear"}, "s": {"variant": "softmax"}}, "ls"
    model = VisionModel(recipe, SPEC)
    names = [block.attn.variant.name for block in model.backbone.model.blocks]
    assert names == ["linear", "softmax"] * 6
    assert model(torch.randn(1, 3, 64, 32)).shape == (1, 3, 64, 32)
