"""LoLCATs attention by the letter, its gradient through the maximum, and where it meets its neighbours."""

import itertools
import math

import pytest
import torch

from core.attention import Attention, linear_attention, sliding_window_attention
from core.attention.blocked import window as blocked_window
from core.attention.contract import Attended, Heads
from core.attention.registry import build
from core.attention.variants.lolcats import mix


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(blocked_window, "ROWS", (2, 3))


def inputs(batch, heads, key_heads, length, keys, dtype=torch.float64):
    sizes = (batch, heads, length, 4), (batch, key_heads, keys, 4), (batch, key_heads, keys, 3)
    return [torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def by_hand(variant, q, k, v, mask, phi):
    outs = []
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        g, at = h // (q.shape[1] // k.shape[1]), i + k.shape[2] - q.shape[2]
        seen = [j for j in range(at + 1) if mask is None or mask[b, j]]
        near = [j for j in seen if at - j < variant.window]
        sigma = torch.sigmoid(variant.gate[h])
        rest = 1 - sigma if variant.complement else 1.0
        scores = {j: q[b, h, i].dot(k[b, g, j]) / math.sqrt(4) for j in near}
        top = torch.stack(list(scores.values())).max() if near else 0.0
        weights = {j: sigma * torch.exp(scores[j] - top) for j in near}
        weights |= {j: rest * phi(q[b, h, i], h, "query").dot(phi(k[b, g, j], g, "key")) for j in seen if j not in near}
        total = sum(weights.values())
        outs.append(sum(w / total * v[b, g, j] for j, w in weights.items()) if seen else q.new_zeros(3))
    return torch.stack(outs).view(*q.shape[:3], 3)


def features(variant, name):
    def elu(x, _head, _side):
        return torch.where(x > 0, x + 1, x.exp())

    def hedgehog(x, head, side):
        y = getattr(variant.map, side)[head] @ x
        return torch.cat((y.softmax(0), (-y).softmax(0)))

    return {"elu": elu, "hedgehog": hedgehog}[name]


@pytest.mark.parametrize("name", ["elu", "hedgehog"])
@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 2, 7, 7), (1, 2, 1, 4, 9), (1, 2, 2, 6, 4), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equals_the_papers_formula(name, complement, shape, masked, backend):
    variant = build("lolcats", Heads(shape[1], shape[2], 4, 3), window=2, feature_map=name, complement=complement)
    variant = variant.double()
    variant.gate.data.uniform_(-2, 2)
    q, k, v = inputs(*shape)
    mask = torch.rand(shape[0], shape[4]) > 0.4 if masked else None
    got = variant(q, k, v, causal=True, key_mask=mask, backend=backend)
    want = by_hand(variant, q, k, v, mask, features(variant, name))
    assert got.log_mass is None
    torch.testing.assert_close(got.out, want, rtol=1e-10, atol=1e-12)
    if want.requires_grad:
        mine, theirs = (
            torch.autograd.grad(y.sin().sum(), [q, k, v, *variant.parameters()], allow_unused=True)
            for y in (got.out, want)
        )
        for one, other in zip(mine, theirs):
            other = torch.zeros_like(one) if other is None else other
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_gradcheck_through_the_maximum_and_the_gate():
    variant = build("lolcats", Heads(2, 1, 3, 2), window=2, feature_map="elu").double()
    sizes = (1, 2, 6, 3), (1, 1, 6, 3), (1, 1, 6, 2)
    q, k, v = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
    mask = torch.tensor([[True, True, False, True, True, True]])

    def function(q, k, v, gate):
        run = torch.func.functional_call
        return run(variant, {"gate": gate}, (q, k, v), {"causal": True, "key_mask": mask}).out

    assert torch.autograd.gradcheck(function, (q, k, v, variant.gate), fast_mode=False)


def test_the_level_of_the_windows_scores_does_not_matter():
    q, k, v = inputs(1, 2, 2, 9, 9)
    tail = Attended(torch.randn(1, 2, 9, 3).double(), torch.randn(1, 2, 9).double())
    ratio = torch.tensor([0.3, -0.4], dtype=torch.float64)
    shifted = torch.cat((q, torch.full_like(q[..., :1], 7.0)), -1), torch.cat((k, torch.ones_like(k[..., :1])), -1)
    first = mix(q, k, v, tail, 3, ratio, None, 0.5, None)
    second = mix(*shifted, v, tail, 3, ratio, None, 0.5, None)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("complement", [False, True])
def test_it_is_a_window_where_the_gate_is_open_and_linear_beyond_where_it_is_shut(complement):
    variant = build("lolcats", Heads(2, 2, 4, 3), window=3, feature_map="elu", complement=complement).double()
    q, k, v = inputs(1, 2, 2, 12, 12)
    options = {"causal": True}
    long = build("lolcats", Heads(2, 2, 4, 3), window=12, feature_map="elu").double()
    torch.testing.assert_close(long(q, k, v, **options).out, sliding_window_attention(q, k, v, window=12, **options))
    if complement:
        variant.gate.data.fill_(40.0)
        want = sliding_window_attention(q, k, v, window=3, **options)
        torch.testing.assert_close(variant(q, k, v, **options).out, want, rtol=1e-8, atol=1e-10)
    variant.gate.data.fill_(-60.0)
    want = linear_attention(q[:, :, 3:], k[:, :, :9], v[:, :, :9], **options)
    torch.testing.assert_close(variant(q, k, v, **options).out[:, :, 3:], want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 4.0])
def test_error_is_at_most_twice_that_of_the_plain_formula_in_the_same_precision(dtype, scale, monkeypatch):
    monkeypatch.undo()
    variant = build("lolcats", Heads(2, 1, 16, 8), window=16).to(dtype)
    exact = build("lolcats", Heads(2, 1, 16, 8), window=16).double()
    exact.load_state_dict(variant.state_dict())
    truth = [(torch.randn(2, h, 97, n) * scale).to(dtype).double() for h, n in ((2, 16), (1, 16), (1, 8))]

    def run(variant, backend, dtype):
        tensors = [x.to(dtype).requires_grad_() for x in truth]
        out = variant(*tensors, causal=True, backend=backend).out
        return [out, *torch.autograd.grad(out.double().square().sum(), tensors)]

    got, plain = run(variant, "torch", dtype), run(variant, "reference", dtype)
    compared = 0
    for n, (mine, theirs, right) in enumerate(zip(got, plain, run(exact, "reference", torch.float64))):
        tiny = 1e-5 * max(1.0, scale) * (1 + right.abs().max())
        limit = (3 if n else 2) * (theirs.double() - right).abs().nan_to_num(nan=math.inf).max() + tiny
        assert (mine.double() - right).abs().max() <= limit
        assert mine.dtype == dtype
        compared += 1
    assert compared == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_inputs_stay_finite(dtype):
    variant = build("lolcats", Heads(2, 1, 16, 8), window=16).to(dtype)
    q, k, v = (torch.randn(1, h, 700, n).mul(10).to(dtype).requires_grad_() for h, n in ((2, 16), (1, 16), (1, 8)))
    out = variant(q, k, v, causal=True).out
    found = [out, *torch.autograd.grad(out.float().square().sum(), [q, k, v, *variant.parameters()])]
    assert all(torch.isfinite(x).all() for x in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be a whole number of at least 1"),
        ({"feature_map": "identity"}, "feature map 'identity' is signed"),
        ({"causal": False}, "cannot do 'bidirectional'"),
        ({"positions": "alibi"}, "does not compose with 'alibi'"),
    ],
)
def test_bad_options_say_what_is_valid(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(32, 4, "lolcats", **{"causal": True, **options})
