"""Infini-attention by the letter: segments, the memory between them, both updates."""

import itertools
import math

import pytest
import torch

from core.attention import Attention, softmax_attention
from core.attention.blocked.memory import memory_forward, read, write
from core.attention.contract import Heads, state_bytes
from core.attention.positions import alibi_slopes
from core.attention.registry import build

SHAPES = [(2, 4, 2, 7, 3), (1, 2, 1, 9, 3), (1, 2, 2, 5, 1), (1, 1, 1, 4, 9), (1, 1, 1, 1, 2)]


def sigma(x):
    return torch.where(x > 0, x + 1, x.exp())


def inputs(batch, heads, key_heads, length, dtype=torch.float64):
    sizes = (batch, heads, length, 4), (batch, key_heads, length, 4), (batch, key_heads, length, 3)
    return [torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def by_hand(variant, q, k, v, mask, slopes):
    batch, heads, length, _ = q.shape
    outs = {}
    for b, h in itertools.product(range(batch), range(heads)):
        g, gate = h // (heads // k.shape[1]), torch.sigmoid(variant.gate[h])
        memory, mass = torch.zeros(4, 3, dtype=q.dtype), torch.zeros(4, dtype=q.dtype)
        real = [j for j in range(length) if mask is None or mask[b, j]]

        def recall(x, memory, mass):
            return sigma(x) @ memory / (sigma(x) @ mass) if bool(mass.sum() > 0) else torch.zeros(3, dtype=q.dtype)

        for start in range(0, length, variant.segment):
            own = [j for j in real if start <= j < start + variant.segment]
            for i in range(start, min(start + variant.segment, length)):
                near = [j for j in own if j <= i]
                slope = 0.0 if slopes is None else slopes[h]
                local = torch.zeros(3, dtype=q.dtype)
                if near:
                    scores = [q[b, h, i].dot(k[b, g, j]) / math.sqrt(4) - slope * (i - j) for j in near]
                    local = sum(p * v[b, g, j] for p, j in zip(torch.stack(scores).softmax(0), near))
                outs[b, h, i] = gate * recall(q[b, h, i], memory, mass) + (1 - gate) * local
            before = memory, mass
            for j in own:
                new = v[b, g, j] - recall(k[b, g, j], *before) if variant.delta else v[b, g, j]
                memory = memory + torch.outer(sigma(k[b, g, j]), new)
                mass = mass + sigma(k[b, g, j])
    return torch.stack([outs[at] for at in itertools.product(*map(range, q.shape[:3]))]).view(batch, heads, length, 3)


@pytest.mark.parametrize("update", ["delta", "plain"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equals_the_papers_formula(update, shape, masked, backend):
    *sizes, segment = shape
    variant = build("infini", Heads(shape[1], shape[2], 4, 3), segment=segment, update=update).double()
    variant.gate.data.uniform_(-2, 2)
    q, k, v = inputs(*sizes)
    mask = torch.rand(shape[0], shape[3]) > 0.4 if masked else None
    slopes = alibi_slopes(4).double() if shape[1] == 4 else None
    got = variant(q, k, v, causal=True, key_mask=mask, slopes=slopes, backend=backend)
    want = by_hand(variant, q, k, v, mask, slopes)
    assert got.log_mass is None
    torch.testing.assert_close(got.out, want, rtol=1e-10, atol=1e-12)
    mine, theirs = (
        torch.autograd.grad(y.sin().sum(), [q, k, v, variant.gate], allow_unused=True) for y in (got.out, want)
    )
    for one, other in zip(mine, theirs):
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("delta", [False, True])
def test_gradcheck_of_the_memory_from_its_first_to_its_last_state(delta):
    f, g = (torch.rand(1, 2, n, 7, 3, dtype=torch.float64) + 0.1 for n in (2, 1))
    v, state = torch.randn(1, 2, 1, 7, 2, dtype=torch.float64), torch.rand(1, 2, 1, 3, 3, dtype=torch.float64) + 0.1
    tensors = [x.requires_grad_() for x in (f, g, v, state)]

    def function(f, g, v, state):
        return memory_forward(f, g, v, state, 3, delta, True)[:2]

    assert torch.autograd.gradcheck(function, tensors, fast_mode=False)


def test_the_first_segment_is_local_attention_under_the_gate():
    variant = build("infini", Heads(2, 2, 4, 3), segment=6).double()
    variant.gate.data = torch.tensor([-1.0, 0.5], dtype=torch.float64)
    q, k, v = inputs(1, 2, 2, 9)
    share = torch.sigmoid(variant.gate)[:, None, None]
    got = variant(q, k, v, causal=True).out
    want = (1 - share) * softmax_attention(q[:, :, :6], k[:, :, :6], v[:, :, :6], causal=True)
    torch.testing.assert_close(got[:, :, :6], want)
    variant.gate.data.fill_(-50.0)
    long = build("infini", Heads(2, 2, 4, 3), segment=100).double()
    long.gate.data.fill_(-50.0)
    torch.testing.assert_close(long(q, k, v, causal=True).out, softmax_attention(q, k, v, causal=True))
    assert not torch.allclose(variant(q, k, v, causal=True).out[:, :, 6:], long(q, k, v, causal=True).out[:, :, 6:])


def test_delta_writes_only_what_the_memory_does_not_hold():
    g, v = torch.rand(1, 5, dtype=torch.float64) + 0.1, torch.randn(1, 3, dtype=torch.float64)
    once = write(torch.zeros(5, 4, dtype=torch.float64), g, v, True)
    torch.testing.assert_close(read(once, g), v)
    twice, plain = write(once, g, v, True), write(once, g, v, False)
    torch.testing.assert_close(twice[:, :-1], once[:, :-1])
    torch.testing.assert_close(plain[:, :-1], 2 * once[:, :-1])
    torch.testing.assert_close(twice[:, -1], 2 * once[:, -1])


def test_an_earlier_segment_is_seen_through_the_memory_only_and_the_state_stays_small():
    attention = Attention(16, 2, "infini", segment=8, causal=True).double()
    x = torch.randn(1, 24, 16, dtype=torch.float64, requires_grad=True)
    attention.variant.gate.data.fill_(-60.0)
    gradient = torch.autograd.grad(attention(x)[:, 16:].sum(), x)[0]
    assert gradient[:, :16].abs().max() < 1e-20
    attention.variant.gate.data.fill_(0.0)
    gradient = torch.autograd.grad(attention(x)[:, 16:].sum(), x)[0]
    assert gradient[:, :16].abs().max() > 1e-4
    sizes, state = [], attention.init_state(1)
    for at in range(24):
        _, state = attention.step(x[:, at], state)
        sizes.append(state_bytes(state))
    assert sizes[:8] == sizes[8:16] == sizes[16:]
    assert sizes[7] == state_bytes(attention.init_state(1)) < sizes[0] < sizes[6]


@pytest.mark.parametrize("update", ["delta", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 4.0])
def test_error_is_at_most_twice_that_of_the_plain_formula_in_the_same_precision(update, dtype, scale):
    variant = build("infini", Heads(2, 1, 16, 8), segment=16, update=update)
    truth = [(torch.randn(2, h, 97, n) * scale).to(dtype).double() for h, n in ((2, 16), (1, 16), (1, 8))]

    def run(backend, dtype):
        tensors = [x.to(dtype).requires_grad_() for x in truth]
        out = variant.to(dtype)(*tensors, causal=True, backend=backend).out
        return [out, *torch.autograd.grad(out.double().square().sum(), tensors)]

    got, plain = run("torch", dtype), run("reference", dtype)
    compared = 0
    for n, (mine, theirs, right) in enumerate(zip(got, plain, run("reference", torch.float64))):
        tiny = 1e-5 * max(1.0, scale) * (1 + right.abs().max())
        limit = (3 if n else 2) * (theirs.double() - right).abs().nan_to_num(nan=math.inf).max() + tiny
        assert (mine.double() - right).abs().max() <= limit
        assert mine.dtype == dtype
        compared += 1
    assert compared == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_inputs_stay_finite(dtype):
    variant = build("infini", Heads(2, 1, 16, 8), segment=64).to(dtype)
    q, k, v = (torch.randn(1, h, 1500, n).mul(10).to(dtype).requires_grad_() for h, n in ((2, 16), (1, 16), (1, 8)))
    out = variant(q, k, v, causal=True).out
    found = [out, *torch.autograd.grad(out.float().square().mean(), [q, k, v, variant.gate])]
    assert all(torch.isfinite(x).all() for x in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": 0}, "segment must be a whole number of at least 1, got 0"),
        ({"update": "deltas"}, r"unknown update 'deltas' \(did you mean 'delta'\?\); known: delta, plain"),
        ({"causal": False}, "cannot do 'bidirectional'"),
    ],
)
def test_bad_options_say_what_is_valid(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(32, 4, "infini", **{"causal": True, **options})


def test_queries_and_keys_must_stand_in_the_same_segments():
    q, k, v = inputs(1, 2, 2, 6)
    with pytest.raises(ValueError, match="as many queries as keys, got L=4, M=6"):
        build("infini", Heads(2, 2, 4, 3))(q[:, :, :4], k, v, causal=True)
