"""Gated and delta recurrences against loops over tokens that share no code with the package, and what defines them."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from core.attention import Attention
from core.attention.blocked import scan as blocked
from core.attention.blocked.scan import scan
from core.attention.contract import Heads, Inputs
from core.attention.registry import build

KINDS = tuple(blocked.CHUNK)
GATED = ("retnet", "lightning", "ssd", "gla", "rwkv6", "mlstm", "delta", "gated_delta", "kda")


def arguments(kind, length, batch=2, heads=4, keys=2, width=6, values=3, dtype=torch.float64, strength=3.0):
    q = torch.randn(batch, heads, length, width, dtype=torch.float64)
    k = normalize(torch.randn(batch, keys, length, width, dtype=torch.float64), dim=-1)
    v = torch.randn(batch, keys, length, values, dtype=torch.float64)
    g = -strength * torch.rand(
        batch, keys, length, *([width] if kind.startswith("vector") else []), dtype=torch.float64
    )
    beta = [torch.rand(batch, keys, length, dtype=torch.float64)] if kind.endswith("delta") else []
    state = torch.randn(batch, keys, width, values, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, g, *beta)], state.requires_grad_()


def by_hand(q, k, v, g, beta=None, state=None):
    """One head and one token at a time: decay, write, read."""
    outs, ends = [], []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            j = h * k.shape[1] // q.shape[1]
            s = state[b, j]
            rows = []
            for t in range(q.shape[2]):
                s = torch.diag(g[b, j, t].exp() * torch.ones(k.shape[3], dtype=q.dtype)) @ s
                if beta is None:
                    s = s + torch.outer(k[b, j, t], v[b, j, t])
                else:
                    old = torch.outer(k[b, j, t], k[b, j, t]) @ s
                    s = s - beta[b, j, t] * old + beta[b, j, t] * torch.outer(k[b, j, t], v[b, j, t])
                rows.append(s.T @ q[b, h, t])
            outs.append(torch.stack(rows))
            ends.append(s)
    out = torch.stack(outs).view(*q.shape[:3], -1)
    return out, torch.stack(ends).view(*q.shape[:2], *ends[0].shape)[:, :: q.shape[1] // k.shape[1]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 5, 16, 17, 37, 70])
def test_chunks_equal_the_loop_with_gradients_through_every_input_and_the_state(kind, length):
    tensors, state = arguments(kind, length)
    (out, end), (want, want_end) = scan(kind, *tensors, state=state), by_hand(*tensors, state=state)
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(end, want_end, rtol=1e-10, atol=1e-12)
    mine = torch.autograd.grad(out.sin().sum() + end.cos().sum(), [*tensors, state])
    theirs = torch.autograd.grad(want.sin().sum() + want_end.cos().sum(), [*tensors, state])
    for one, other in zip(mine, theirs):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_numerical_gradients(kind, monkeypatch):
    monkeypatch.setattr(blocked, "CHUNK", dict.fromkeys(KINDS, 3))
    tensors, state = arguments(kind, 7, batch=1, heads=2, keys=1, width=3, values=2)
    assert torch.autograd.gradcheck(lambda s, *xs: scan(kind, *xs, state=s), (state, *tensors), fast_mode=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 16, 32, 64, 1000])
def test_the_chunk_size_does_not_matter(kind, size, monkeypatch):
    tensors, state = arguments(kind, 100)
    want = scan(kind, *tensors, state=state)
    monkeypatch.setattr(blocked, "CHUNK", dict.fromkeys(KINDS, size))
    for one, other in zip(scan(kind, *tensors, state=state), want):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.0, 1e-6, 5.0, 50.0])
def test_gates_of_any_strength_stay_finite_and_true_in_float32(kind, strength):
    tensors, _ = arguments(kind, 200, strength=strength)
    single = [x.detach().float().requires_grad_() for x in tensors]
    out, _ = scan(kind, *single)
    want, _ = scan(kind, *(x.detach() for x in tensors))
    scale = want.abs().max()
    assert (out.double() - want).abs().max() < 1e-5 * scale
    for gradient in torch.autograd.grad(out.square().sum(), single):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", ["decay", "vector_decay"])
def test_no_decay_is_plain_unnormalised_linear_attention_and_full_decay_the_own_token(kind):
    (q, k, v, g), _ = arguments(kind, 90)
    out, _ = scan(kind, q, k, v, torch.zeros_like(g))
    grouped = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, (q @ grouped[0].mT).tril() @ grouped[1])
    alone, _ = scan(kind, q, k, v, torch.full_like(g, -1000.0))
    torch.testing.assert_close(alone, (q * grouped[0]).sum(-1, keepdim=True) * grouped[1])


def test_a_delta_write_of_full_strength_recalls_its_value_and_none_leaves_the_state():
    (q, k, v, g, beta), state = arguments("delta", 40)
    none, ones = torch.zeros_like(g), torch.ones_like(beta)
    out, _ = scan("delta", k, k, v, none, ones, state=state)
    torch.testing.assert_close(out, v, rtol=1e-9, atol=1e-11)
    _, end = scan("delta", q, k, v, none, torch.zeros_like(beta), state=state)
    torch.testing.assert_close(end, state)


@pytest.mark.parametrize("name", GATED)
def test_two_sided_use_counts_the_diagonal_once(name):
    torch.manual_seed(3)
    one = build(name, Heads(2, 2, 4, 4, 8), norm=False, gate=False).double()
    q, k, v = (torch.randn(1, 2, 1, 4, dtype=torch.float64) for _ in range(3))
    inputs = Inputs(torch.randn(1, 1, 8, dtype=torch.float64))
    both, past = (one(q, k, v, causal=causal, inputs=inputs).out for causal in (False, True))
    torch.testing.assert_close(both, past)


@pytest.mark.parametrize("name", GATED)
def test_two_sided_use_turns_with_the_sequence(name):
    torch.manual_seed(3)
    one = build(name, Heads(4, 2, 4, 4, 8)).double()
    q, k, v = (torch.randn(2, heads, 30, 4, dtype=torch.float64) for heads in (4, 2, 2))
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    out = one(q, k, v, inputs=Inputs(x)).out
    past = one(q, k, v, causal=True, inputs=Inputs(x)).out
    assert not torch.allclose(out, past)
    if name in ("delta", "gated_delta", "kda"):
        return  # the own position belongs to the past: the rule of two reads is not a mirror image
    turned = one(q.flip(2), k.flip(2), v.flip(2), inputs=Inputs(x.flip(1))).out.flip(2)
    torch.testing.assert_close(out, turned, rtol=1e-8, atol=1e-10)


def test_retention_is_its_decayed_sum_on_both_sides():
    one = build("retnet", Heads(4, 2, 4, 3, 8), norm=False, gate=False).double()
    q, k, v = (torch.randn(2, heads, 50, width, dtype=torch.float64) for heads, width in ((4, 4), (2, 4), (2, 3)))
    inputs = Inputs(torch.zeros(2, 50, 8, dtype=torch.float64))
    rate = torch.tensor([1 - 2.0**-5, 1 - 2.0**-6], dtype=torch.float64).repeat_interleave(2)
    distance = (torch.arange(50)[:, None] - torch.arange(50)).abs()
    weights = q @ k.repeat_interleave(2, 1).mT / 2 * rate[:, None, None] ** distance
    for causal in (True, False):
        want = (weights.tril() if causal else weights) @ v.repeat_interleave(2, 1)
        torch.testing.assert_close(one(q, k, v, causal=causal, inputs=inputs).out, want, rtol=1e-5, atol=1e-6)


def mlstm_by_hand(q, k, v, i, f, causal):
    """Un-stabilised, dense: weights e^{sum of log f + i} scale q.k, one bounded normaliser."""
    length = q.shape[1]
    outs = []
    for t in range(length):
        number, total = torch.zeros_like(v[:, 0]), torch.zeros_like(q[:, 0, 0])
        for j in range(length):
            if j > t and causal:
                continue
            between = f[:, j + 1 : t + 1] if j <= t else f[:, t:j]
            weight = (between.sum(-1) + i[:, j]).exp() * (q[:, t] * k[:, j]).sum(-1) / math.sqrt(q.shape[-1])
            number, total = number + weight[:, None] * v[:, j], total + weight
        outs.append(number / total.abs().clamp(min=1)[:, None])
    return torch.stack(outs, 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("bias", [-10.0, 0.0, 12.0])
def test_mlstm_equals_its_unstabilised_definition(causal, input_gate, bias):
    one = build("mlstm", Heads(3, 3, 4, 5, 8), input_gate=input_gate, norm=False, gate=False).double()
    with torch.no_grad():
        one.gates.bias.view(3, 2)[:, 0] = bias
    q, k, v = (torch.randn(1, 3, 25, width, dtype=torch.float64) for width in (4, 4, 5))
    x = torch.randn(1, 25, 8, dtype=torch.float64)
    pre = 15 * torch.tanh((x @ one.gates.weight.T + one.gates.bias) / 15)
    i, f = pre.view(25, 3, 2).permute(2, 1, 0)
    i = i if input_gate == "exp" else torch.nn.functional.logsigmoid(i)
    want = mlstm_by_hand(q[0], k[0], v[0], i, torch.nn.functional.logsigmoid(f), causal)
    got = one(q, k, v, causal=causal, inputs=Inputs(x)).out[0]
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_rwkv6_reads_the_past_without_itself_and_itself_with_the_bonus():
    one = build("rwkv6", Heads(2, 2, 4, 3, 8), norm=False, gate=False).double()
    q, k, v = (torch.randn(1, 2, 20, width, dtype=torch.float64) for width in (4, 4, 3))
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    w = (one.wide.bias + torch.tanh(x[0] @ one.narrow.weight.T) @ one.wide.weight.T).exp().neg().exp()
    w = w.view(20, 2, 4)
    got = one(q, k, v, causal=True, inputs=Inputs(x)).out
    for h in range(2):
        s = torch.zeros(4, 3, dtype=torch.float64)
        for t in range(20):
            own = torch.outer(one.bonus[h] * k[0, h, t], v[0, h, t])
            torch.testing.assert_close(got[0, h, t], (s + own).T @ q[0, h, t] / 2)
            s = w[t, h][:, None] * s + torch.outer(k[0, h, t], v[0, h, t])


@pytest.mark.parametrize("name", GATED)
def test_masked_positions_leave_the_state_as_it_was(name):
    attention = Attention(16, 2, name, causal=True).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    mask = torch.tensor([[True] * 4 + [False] * 5])
    _, short = attention.prefill(x[:, :4], attention.init_state(1))
    _, long = attention.prefill(x, attention.init_state(1), key_mask=mask)
    torch.testing.assert_close(long["sum"], short["sum"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "wrong", "text"),
    [
        ("gla", {"gate_rank": 0}, "gate_rank >= 1"),
        ("gla", {"temperature": 0.0}, "temperature > 0"),
        ("mlstm", {"input_gate": "tanh"}, "input_gate must be one of exp, sigmoid, got 'tanh'"),
        ("lightning", {"layer": 3, "layers": 3}, "got layer=3, layers=3"),
        ("kda", {"gate_rank": 0}, "gate_rank must be at least 1, got 0"),
    ],
)
def test_bad_options(name, wrong, text):
    with pytest.raises(ValueError, match=text):
        Attention(16, 2, name, **wrong)


@pytest.mark.parametrize("name", GATED)
def test_without_a_layer_the_missing_input_is_named(name):
    with pytest.raises(ValueError, match=f"attention '{name}' reads the layer's input"):
        build(name, Heads(2, 2, 4, 4))
    with pytest.raises(ValueError, match=f"attention '{name}' reads the layer's input"):
        build(name, Heads(2, 2, 4, 4, 8))(*(torch.randn(1, 2, 3, 4) for _ in range(3)))
    with pytest.raises(ValueError, match="cannot do 'cross'"):
        Attention(16, 2, name)(torch.zeros(1, 3, 16), torch.zeros(1, 4, 16))
