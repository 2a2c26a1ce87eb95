"""The layer's strictness: options, heads, positions, packs."""

import pytest
import torch

from core.attention import Attention
from core.attention.registry import register
from core.attention.variants.softmax import SoftmaxAttention


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (32, 4, "linaer"),
            r"unknown attention 'linaer' \(did you mean 'linear'\?\); known: .*hybrid, .*linear, .*softmax, .*window",
        ),
        ((30, 4), r"num_heads must divide dim: 4 does not divide 30; valid: \[1, 2, 3, 5, 6, 10, 15, 30\]"),
        ((32, 0), "num_heads must divide dim"),
    ],
)
def test_construction_errors_name_what_is_valid(arguments, message):
    with pytest.raises(ValueError, match=message):
        Attention(*arguments)


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        (
            "window",
            {"windw": 3},
            r"attention 'window' has no option 'windw' \(did you mean 'window'\?\); it takes window",
        ),
        ("softmax", {"window": 3}, "attention 'softmax' has no option 'window'; it takes no options"),
        ("window", {"window": 0}, "window must be a whole number of at least 1"),
        ("hybrid", {"window": 2.5}, r"hybrid: window must be a whole number \(default 64\), got 2.5"),
        ("linear", {"feature_dim": 2.0}, r"feature_dim must be a whole number or null \(default None\), got 2.0"),
        ("delta", {"negative": "no"}, r"negative must be true or false \(default False\), got 'no'"),
        ("softmax", {"short_conv": 4.0}, "short_conv is a number of taps"),
        ("softmax", {"backend": "trch"}, r"unknown backend 'trch' \(did you mean 'torch'\?\)"),
        ("linear", {"feature_map": "identity"}, "signed"),
        ("linear", {"feature_map": "elu", "feature_dim": 9}, "feature_dim must be from 1 to the head width 8, got 9"),
        ("linear", {"dropout": 0.1}, "attention 'linear' cannot do 'dropout'; .*softmax can"),
        ("softmax", {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ("softmax", {"positions": "rop"}, r"unknown positions 'rop' \(did you mean 'rope'\?\)"),
        ("softmax", {"num_kv_heads": 3}, "multiple of num_kv_heads"),
    ],
)
def test_options_are_strict(variant, options, message):
    with pytest.raises(ValueError, match=message):
        Attention(32, 4, variant, **options)


def test_calls_that_make_no_sense_are_refused():
    x = torch.randn(1, 6, 32)
    with pytest.raises(ValueError, match=r"x must be \[batch, length, 32\], got \[1, 6, 16\]"):
        Attention(32, 4)(x[..., :16])
    with pytest.raises(ValueError, match="no meaning between two sequences"):
        Attention(32, 4, positions="rope")(x, x)
    with pytest.raises(ValueError, match="not both"):
        Attention(32, 4)(x, key_mask=torch.ones(1, 6, dtype=torch.bool), cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="must rise from 0 to 6"):
        Attention(32, 4)(x, cu_seqlens=torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="batch 1"):
        Attention(32, 4)(x.expand(2, -1, -1), cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="all three or none"):
        Attention(32, 4)(x, x, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="needs coordinates"):
        Attention(32, 4, positions="rope2d")(x)
    with pytest.raises(ValueError, match="needs causal=True"):
        Attention(32, 4).init_state(1)


def test_swapping_the_variant_keeps_every_other_weight():
    names = {
        variant: {n for n, _ in Attention(32, 4, variant).named_parameters() if not n.startswith("variant.")}
        for variant in ("softmax", "window", "linear", "hybrid")
    }
    assert len(set(map(frozenset, names.values()))) == 1


@pytest.mark.parametrize("name", ["softmax", "luong"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["mask", "pack", "alibi"])
def test_dropout_goes_with_masks_packs_and_alibi(name, causal, kind):
    dropping, plain = (
        Attention(16, 4, name, causal=causal, dropout=p, positions="alibi" if kind == "alibi" else None)
        for p in (1e-9, 0.0)  # a probability that never drops, on the way that dropout takes
    )
    plain.load_state_dict(dropping.state_dict())
    x = torch.randn(1 if kind == "pack" else 2, 6, 16)
    options = {}
    if kind == "mask":
        options["key_mask"] = torch.tensor([[False, True, True, True, False, True], [False] * 6])
    if kind == "pack":
        options["cu_seqlens"] = torch.tensor([0, 2, 2, 6])
    got, want = dropping(x, **options), plain(x, **options)
    torch.testing.assert_close(got, want)

    def gradients(y, layer):
        return torch.autograd.grad(y.sin().sum(), list(layer.parameters()), allow_unused=True)

    for mine, theirs in zip(gradients(got, dropping), gradients(want, plain)):
        torch.testing.assert_close(mine, theirs)
    dropping.dropout = 0.5
    assert not torch.allclose(dropping(x, **options), dropping(x, **options))


def test_dropout_acts_in_training_only():
    attention = Attention(32, 4, dropout=0.5)
    x = torch.randn(1, 20, 32)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


def test_a_variant_from_another_package_joins_by_one_decorator(monkeypatch):
    from core.attention import available, registry

    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))

    @register("mine", summary="softmax with a temperature", source="a test")
    class Mine(SoftmaxAttention):
        def __init__(self, heads, *, temperature: float = 2.0):
            super().__init__(heads)
            self.temperature = temperature

        def forward(self, q, k, v, **options):
            return super().forward(q / self.temperature, k, v, **options)

    assert "mine" in available()
    assert registry.entry("mine").options == {"temperature": 2.0}
    plain, cold = Attention(32, 4), Attention(32, 4, "mine", temperature=1.0)
    cold.load_state_dict(plain.state_dict())
    x = torch.randn(1, 5, 32)
    assert torch.equal(plain(x), cold(x))
    with pytest.raises(ValueError, match="already registered"):
        register("mine", summary="", source="")(type("Other", (SoftmaxAttention,), {}))
