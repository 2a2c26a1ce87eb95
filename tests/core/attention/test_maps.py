"""Rows of the attention matrix: those of the definition, for mechanisms that form a matrix and those that do not."""

import pytest
import torch

from core.attention import Attention, available
from core.attention.maps import attention_rows
from core.attention.registry import variant_class
from core.backbone import Encoder

L = 13


def rows_of(layer, x, queries=(0, 5, -1), **masks):
    found = attention_rows(layer, lambda: layer(x, **masks), queries)
    assert list(found) == ["variant"]
    return found["variant"]


@pytest.fixture
def x():
    return torch.randn(2, L, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_softmax_are_its_weights(x, causal, kv_heads):
    layer = Attention(16, 4, "softmax", num_kv_heads=kv_heads, causal=causal).eval()
    rows = rows_of(layer, x)
    q, k, _ = layer._project(x, x)
    scores = q @ k.repeat_interleave(4 // kv_heads, 1).transpose(-1, -2) / 4**0.5
    if causal:
        scores = scores.masked_fill(torch.ones(L, L).triu(1).bool(), -torch.inf)
    expected = scores.softmax(-1)[:, :, [0, 5, L - 1]]
    torch.testing.assert_close(rows, expected, atol=1e-6, rtol=1e-5)


def test_rows_of_linear_are_the_weights_that_it_stands_for(x):
    layer = Attention(16, 4, "linear", feature_map="elu").eval()
    q, k, _ = layer._project(x, x)
    weights = (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).transpose(-1, -2)
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(rows_of(layer, x), weights[:, :, [0, 5, L - 1]], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("variant", [name for name in available() if "bidirectional" in variant_class(name).can])
def test_every_mechanism_has_rows_and_computes_as_before(x, variant):
    layer = Attention(16, 4, variant).eval()
    torch.manual_seed(0)
    before = layer(x)
    seen = []
    torch.manual_seed(0)
    rows = attention_rows(layer, lambda: seen.append(layer(x)), [3])["variant"]
    assert rows.shape == (2, 4, 1, L)
    assert torch.isfinite(rows).all()
    assert rows.abs().sum() > 0
    torch.testing.assert_close(seen[0], before)
    assert not seen[0].requires_grad
    assert not layer.variant._forward_hooks, "the hooks must go"


def test_what_is_masked_or_in_the_future_has_no_weight(x):
    mask = torch.ones(2, L, dtype=torch.bool)
    mask[1, 9:] = False
    for variant in ("softmax", "window", "linear", "hybrid", "gla"):
        layer = Attention(16, 4, variant, causal=True).eval()
        rows = rows_of(layer, x, [5, 8], key_mask=mask)
        assert rows[:, :, 0, 6:].abs().max() == 0
        assert rows[1, :, 1, 9:].abs().max() == 0
        assert rows[:, :, 0, :6].abs().max() > 0


def test_all_layers_of_a_model_are_named_and_the_graph_is_left_alone(x):
    model = Encoder(16, 3, 4, {"l": {"variant": "linear"}, "s": {"variant": "softmax"}}, layout="ls").eval()
    with torch.no_grad():
        rows = attention_rows(model, lambda: model(x), [0, 1])
    assert len(rows) == 3
    assert all(name.endswith("attention.variant") for name in rows)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_has_no_rows_says_so(x):
    with pytest.raises(ValueError, match="Linear holds no attention of the core"):
        attention_rows(torch.nn.Linear(2, 2), lambda: None, [0])
    layer = Attention(16, 4)
    with pytest.raises(ValueError, match="query 13 lies outside of a sequence of 13 positions"):
        rows_of(layer, x, [13])
    assert not layer.variant._forward_pre_hooks, "hooks go also after an error"
