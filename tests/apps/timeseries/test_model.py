"""The forecaster: what must not change the forecast, what must, and where training starts."""

import pytest
import torch

from apps.timeseries.model import Forecaster, Patches, default_patch
from core.attention.registry import available, entry, variant_class

CHANNELS = ("independent", "mixed", "tokens")


def build(channels: str = "independent", series: int = 3, attention: dict | None = None, **options) -> Forecaster:
    torch.manual_seed(0)
    encoder = {"dim": 16, "depth": 2, "heads": 2, "attention": attention or {"variant": "softmax"}}
    if channels != "tokens":
        options = {"patch": 8, "stride": 4, **options}
    return Forecaster(series, 40, 12, encoder, channels=channels, **options).eval()


def past(series: int = 3, windows: int = 5) -> torch.Tensor:
    return torch.randn(windows, series, 40, generator=torch.Generator().manual_seed(1))


def test_patches_hold_every_step_and_repeat_the_last():
    patches = Patches(lookback=10, length=4, stride=3, dim=4)
    with torch.no_grad():
        patches.embed.weight.copy_(torch.eye(4))
        patches.embed.bias.zero_()
    cut = patches(torch.arange(10.0).view(1, 1, 10))
    assert cut.tolist() == [[[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9], [9, 9, 9, 9]]]
    assert patches.tokens == 4
    assert Patches(336, 16, 8, 4).tokens == 42, "PatchTST/42"
    assert Patches(512, 16, 8, 4).tokens == 64, "PatchTST/64"


@pytest.mark.parametrize(
    ("lookback", "expected"), [(336, (16, 8)), (64, (16, 8)), (24, (6, 3)), (4, (1, 1)), (1, (1, 1))]
)
def test_the_default_patch_fits_short_windows(lookback, expected):
    assert default_patch(lookback, None, None) == expected


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("shortcut", [False, True])
def test_with_revin_level_and_scale_pass_through(channels, shortcut):
    model, x = build(channels, shortcut=shortcut), past()
    scale, level = torch.tensor([2.0, 0.5, 30.0])[:, None], torch.tensor([100.0, -3.0, 7.0])[:, None]
    torch.testing.assert_close(model(x * scale + level), model(x) * scale + level, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("channels", CHANNELS)
def test_without_revin_they_do_not(channels):
    model, x = build(channels, revin=False), past()
    assert not torch.allclose(model(x + 10), model(x) + 10, atol=0.1)


def test_independent_series_never_meet():
    model, x = build("independent"), past()
    changed = x.clone()
    changed[:, 1] += torch.randn(40, generator=torch.Generator().manual_seed(2))
    same = model(x)[:, [0, 2]], model(changed)[:, [0, 2]]
    torch.testing.assert_close(*same)
    # And they share their weights: the order of the series is the order of the forecasts.
    torch.testing.assert_close(model(x[:, [2, 0, 1]]), model(x)[:, [2, 0, 1]])


@pytest.mark.parametrize("channels", ["mixed", "tokens"])
def test_mixing_lets_a_series_see_the_others(channels):
    model, x = build(channels), past()
    changed = x.clone()
    changed[:, 1] += torch.randn(40, generator=torch.Generator().manual_seed(2))
    assert (model(x)[:, 0] - model(changed)[:, 0]).abs().max() > 1e-3


def test_series_as_tokens_have_no_order():
    model, x = build("tokens"), past()
    torch.testing.assert_close(model(x[:, [2, 0, 1]]), model(x)[:, [2, 0, 1]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("variant", [name for name in available() if "bidirectional" in variant_class(name).can])
def test_every_variant_trains_every_part(channels, variant):
    # A window narrower than the 5 or 10 tokens: otherwise hybrid's far part has nothing to do, and its gate idles.
    small = {"window": 3, "length": 10}
    options = {name: value for name, value in small.items() if name in entry(variant).options}
    model = build(channels, series=5, attention={"variant": variant, **options}, shortcut=True).train()
    model(past(series=5)).square().mean().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    idle = [name for name, gradient in trained.items() if gradient is None or not gradient.abs().sum() > 0]
    # Softmax over keys does not see a constant added to all of them: only the bias of a key map may be idle.
    assert [name for name in idle if "bias" not in name] == []


def test_training_starts_at_the_ridge_forecast():
    weights = torch.randn(40, 12, generator=torch.Generator().manual_seed(3))
    x = past()
    mean = x.mean(-1, keepdim=True)
    for channels in CHANNELS:
        for quantiles in (None, [0.1, 0.5, 0.9]):
            forecast = build(channels, shortcut=True, ridge=weights, quantiles=quantiles)(x)
            expected = (x - mean) @ weights + mean
            for level in forecast.unbind(-1) if quantiles else [forecast]:
                torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)


def test_quantiles_never_cross():
    model = build(quantiles=[0.1, 0.25, 0.5, 0.9])
    torch.nn.init.normal_(model.head.weight, std=3)
    forecast = model(past(windows=50))
    assert forecast.shape == (50, 3, 12, 4)
    assert (forecast.diff(dim=-1) >= 0).all()
    assert (forecast.diff(dim=-1) > 0.1).any()


def test_a_window_without_variation_gives_numbers():
    x = torch.zeros(2, 3, 40, requires_grad=True)
    forecast = build(shortcut=True)(x + 5)
    forecast.sum().backward()
    assert torch.isfinite(forecast).all()
    assert torch.isfinite(x.grad).all()


def test_the_cost_counts_what_is_there():
    independent, mixed = build("independent", shortcut=True), build("mixed")
    cost = independent.cost()
    assert cost["parameters"] == sum(p.numel() for p in independent.parameters())
    assert (cost["tokens_per_item"], mixed.cost()["tokens_per_item"]) == (3 * 10, 10)
    # Three times the series is three times the work, when each is on its own.
    assert build("independent", series=9, shortcut=True).cost()["flops_per_item"] == 3 * cost["flops_per_item"]


def test_a_patch_longer_than_the_lookback_is_refused():
    with pytest.raises(ValueError, match=r"model.patch=64 is longer than the look-back of 40 steps"):
        build(patch=64, stride=8)
