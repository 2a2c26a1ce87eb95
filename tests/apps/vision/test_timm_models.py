"""timm's models with the core's attention inside: same weights, same outputs where the mechanism is softmax."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from apps.vision.timm_models import attentions, create, key_mask_of, load_weights, replace_attention, statistics
from core.attention.registry import available, variant_class
from core.training.errors import UserError

MODELS = {
    "vit_tiny_patch16_224": 64,
    "deit_tiny_distilled_patch16_224": 64,
    "deit3_small_patch16_224": 64,
    "flexivit_small": 64,
    "vit_small_patch14_dinov2": 56,
    "vit_small_patch14_reg4_dinov2": 56,
    "vit_base_patch16_siglip_224": 64,
    "naflexvit_base_patch16_gap": 64,
    "eva02_tiny_patch14_224": 56,
    "vit_small_patch16_rope_224": 64,
    "vit_small_patch16_dinov3": 64,
}
WIDE = [{"variant": "window", "window": 999}, {"variant": "hybrid", "window": 999}]
WIDE_ON_GRID = [{"variant": "window2d", "window": 99}, {"variant": "hybrid2d", "window": 99}]


def small(name, **options):
    """Two blocks at a small size; layer scales at 1, so that attention counts."""
    torch.manual_seed(0)
    size = {} if "naflex" in name else {"img_size": MODELS.get(name, 64)}
    model = create(name, depth=2, num_classes=5, **size, **options).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "gamma" in key:
                weight.fill_(1.0)
            elif weight.dim() > 1 and "attn" in key:
                weight.normal_(0, weight.shape[-1] ** -0.5)  # timm's start makes softmax nearly flat
    return model


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", MODELS)
def test_softmax_and_windows_as_wide_as_the_image_equal_stock_timm(name):
    model = small(name)
    x = torch.randn(2, 3, MODELS[name], MODELS[name])
    with torch.no_grad():
        want = model(x)
        names = list(model.state_dict())
        for chosen in ({"variant": "softmax"}, *WIDE, *([] if "naflex" in name else WIDE_ON_GRID)):
            replace_attention(model, [chosen])
            assert relative(model(x), want) <= 1e-5, chosen
        stock = [key for key in model.state_dict() if ".attn.variant." not in key]
        assert stock == names
        # The test has power: another mechanism gives another answer.
        replace_attention(model, [{"variant": "linear"}])
        assert relative(model(x), want) > 1e-3


@pytest.mark.parametrize("size", [(224, 224), (320, 512), (336, 512)])
def test_other_sizes_equal_stock_timm(size):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, dynamic_img_size=True).eval()
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        want = model(x)
        for chosen in ({"variant": "softmax"}, {"variant": "hybrid2d", "window": 64}):
            assert relative(replace_attention(model, [chosen])(x), want) <= 1e-5


def test_gradients_equal_stock_timm():
    model = small("deit_tiny_distilled_patch16_224")
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for chosen in (None, {"variant": "hybrid2d", "window": 9}):
        if chosen:
            replace_attention(model, [chosen])
        model.zero_grad()
        model(x).sum().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if ".variant." not in key})
    for key, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", [name for name in available() if "bidirectional" in variant_class(name).can])
def test_every_variant_runs_and_trains_inside_timm(variant):
    model = replace_attention(small("vit_tiny_patch16_224"), [{"variant": variant}]).train()
    out = model(torch.randn(2, 3, 64, 64))
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_layers_may_differ_and_count():
    model = replace_attention(small("vit_tiny_patch16_224"), [{"variant": "linear"}, {"variant": "softmax"}])
    assert [module.variant.name for module in attentions(model)] == ["linear", "softmax"]
    with pytest.raises(UserError, match="2 blocks, the attention is given for 3"):
        replace_attention(model, [{"variant": "linear"}] * 3)


@pytest.mark.parametrize("variant", ["softmax", "linear", "hybrid"])
def test_naflex_masks_of_keys_change_nothing_for_padding_and_stay_small(variant):
    model = replace_attention(small("naflexvit_base_patch16_gap"), [{"variant": variant}])
    seen = []
    attentions(model)[0].register_forward_pre_hook(lambda m, a, k: seen.append(k["attn_mask"].shape), with_kwargs=True)
    patches = torch.randn(1, 12, 3 * 16 * 16)
    at = torch.cartesian_prod(torch.arange(3), torch.arange(4))[None]
    whole = {"patches": patches, "patch_coord": at, "patch_valid": torch.ones(1, 12, dtype=torch.bool)}
    longer = {
        "patches": torch.cat((patches, 9 * torch.randn(1, 8, 3 * 16 * 16)), 1),
        "patch_coord": torch.cat((at, torch.zeros(1, 8, 2, dtype=at.dtype)), 1),
        "patch_valid": torch.arange(20)[None] < 12,
    }
    with torch.no_grad():
        torch.testing.assert_close(model(longer), model(whole), rtol=1e-4, atol=1e-5)
    assert {tuple(shape[1:3]) for shape in seen} == {(1, 1)}


def test_naflex_has_no_common_grid():
    model = replace_attention(small("naflexvit_base_patch16_gap"), [{"variant": "window2d"}])
    at = torch.cartesian_prod(torch.arange(3), torch.arange(4))[None]
    given = {"patches": torch.randn(1, 12, 768), "patch_coord": at, "patch_valid": torch.arange(12)[None] < 9}
    with pytest.raises(ValueError, match="'window2d' needs a common grid"):
        model(given)


def test_a_symmetric_mask_is_read_as_a_mask_of_keys_and_any_other_refused():
    q, real = torch.zeros(2, 1, 5, 4), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    symmetric = (real[:, :, None] & real[:, None, :])[:, None]
    additive = torch.zeros(2, 1, 5, 5).masked_fill(~symmetric, -torch.inf)
    for mask in (symmetric, additive, real[:, None, None, :]):
        assert torch.equal(key_mask_of(mask, q), real)
    with pytest.raises(ValueError, match="masks of keys"):
        key_mask_of(torch.ones(5, 5).tril().bool()[None, None], q)


def test_stock_weights_load_by_name_and_what_does_not_fit_is_named(tmp_path):
    stock = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=1000)
    save_file(stock.state_dict(), tmp_path / "stock.safetensors")
    model = create("vit_tiny_patch16_224", [{"variant": "hybrid"}], depth=2, num_classes=7)
    left = load_weights(model, tmp_path / "stock.safetensors")
    assert sorted(left["missing"]) == [
        *(f"blocks.{n}.attn.variant.gate" for n in range(2)),
        "head.bias",
        "head.weight",
    ]
    assert torch.equal(model.blocks[1].attn.qkv.weight, stock.blocks[1].attn.qkv.weight)
    other = create("vit_tiny_patch16_224", depth=3)
    with pytest.raises(UserError, match=r"12 names are missing, such as blocks\.2\."):
        load_weights(other, tmp_path / "stock.safetensors")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="holds no weights"):
        load_weights(model, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="there is no file"):
        load_weights(model, tmp_path / "gone.pth")


def test_position_tables_of_another_size_are_resampled(tmp_path):
    stock = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    save_file(stock.state_dict(), tmp_path / "stock.safetensors")
    model = create("vit_tiny_patch16_224", depth=1, num_classes=0, img_size=320, weights=tmp_path / "stock.safetensors")
    assert model.pos_embed.shape[1] == 1 + 20 * 20
    torch.testing.assert_close(model.pos_embed.mean(), stock.pos_embed.mean(), atol=2e-4, rtol=0)


def test_mistakes_name_what_would_be_right():
    with pytest.raises(UserError, match="did you mean 'vit_tiny_patch16_224'"):
        create("vit_tiny_patch16_22")
    with pytest.raises(UserError, match="cannot be replaced; ViT, DeiT"):
        create("beit_base_patch16_224", [{"variant": "linear"}], depth=1)
    with pytest.raises(UserError, match="cannot do 'bidirectional'"):
        create("vit_tiny_patch16_224", [{"variant": "lolcats"}], depth=1)
    assert statistics("vit_tiny_patch16_224") == ([0.5] * 3, [0.5] * 3)
