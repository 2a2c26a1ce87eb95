"""HEPOS: who reads what, by the letter; padding; what a remembered context weighs."""

import itertools
import math

import pytest
import torch

from core.attention import Attention
from core.attention.contract import Heads, state_bytes
from core.attention.registry import build

OPTIONS = [
    {"stride": 1},
    {"stride": 2},
    {"stride": 4},
    {"stride": 2, "kind": "block", "block_size": 3},
    {"stride": 4, "kind": "block", "block_size": 2},
]


def inputs(heads, key_heads, keys, dtype=torch.float64):
    sizes = (2, heads, 3, 4), (2, key_heads, keys, 4), (2, key_heads, keys, 5)
    return [torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def reads(h, j, *, stride, kind="stride", block_size=1):
    return (j if kind == "stride" else math.floor(j / block_size)) % stride == h % stride


def by_hand(q, k, v, mask, options):
    outs, masses = [], []
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        g = h // (q.shape[1] // k.shape[1])
        seen = [j for j in range(k.shape[2]) if reads(h, j, **options) and (mask is None or mask[b, j])]
        scores = [q[b, h, i].dot(k[b, g, j]) / math.sqrt(4) for j in seen]
        total = sum(s.exp() for s in scores)
        mean = sum(s.exp() * v[b, g, j] for s, j in zip(scores, seen)) / total if seen else q.new_zeros(5)
        outs.append(mean)
        masses.append(total.log() if seen else q.new_tensor(-math.inf))
    return torch.stack(outs).view(*q.shape[:3], 5), torch.stack(masses).view(q.shape[:3])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1), (8, 4), (12, 4)])
@pytest.mark.parametrize("keys", [1, 7, 12])
@pytest.mark.parametrize("masked", [False, True])
def test_every_head_reads_its_part(options, heads, key_heads, keys, masked):
    variant = build("hepos", Heads(heads, key_heads, 4, 5), **options)
    q, k, v = inputs(heads, key_heads, keys)
    mask = torch.rand(2, keys) > 0.4 if masked else None
    want_out, want_mass = by_hand(q, k, v, mask, options)
    seen = torch.isfinite(want_mass)
    for backend in ("torch", "reference"):
        got = variant(q, k, v, key_mask=mask, return_mass=True, backend=backend)
        torch.testing.assert_close(got.out, want_out, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got.log_mass, want_mass, rtol=1e-10, atol=1e-12)
        if seen.any():
            results = (got, (want_out, want_mass))
            mine, theirs = (
                torch.autograd.grad(
                    out.sin().sum() + mass[seen].cos().sum(), (q, k, v), retain_graph=True, allow_unused=True
                )
                for out, mass in results
            )
            for one, other in zip(mine, theirs):
                other = torch.zeros_like(one) if other is None else other
                torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(variant(q, k, v, key_mask=mask).out, want_out, rtol=1e-10, atol=1e-12)


def test_what_a_head_does_not_read_gets_no_gradient():
    variant = build("hepos", Heads(4, 4, 4, 5), stride=4)
    q, k, v = inputs(4, 4, 8)
    for gradient in torch.autograd.grad(variant(q, k, v).out.sin().sum(), (k, v)):
        touched = gradient.abs().sum(-1)[0] > 0
        assert touched.tolist() == [[j % 4 == h for j in range(8)] for h in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_error_is_at_most_twice_that_of_the_plain_formula_in_the_same_precision(options, dtype):
    variant = build("hepos", Heads(4, 2, 4, 5), **options)
    exact = inputs(4, 2, 97, dtype)
    want = variant(*(x.double() for x in exact), backend="reference").out
    plain, got = variant(*exact, backend="reference").out, variant(*exact, return_mass=True).out
    assert (got - want).abs().max() <= 2 * (plain - want).abs().max() + 1e-5
    assert got.dtype == dtype


def test_a_remembered_context_holds_the_picked_keys_only():
    attention, whole = Attention(32, 8, "hepos", stride=4), Attention(32, 8, "softmax")
    context = torch.randn(2, 64, 32)
    assert 4 * state_bytes(attention.remember(context)) == state_bytes(whole.remember(context))


def test_more_padding_on_the_right_changes_no_heads_part():
    for options in OPTIONS:
        attention = Attention(32, 4, "hepos", **options).double()
        x, context = torch.randn(1, 5, 32, dtype=torch.float64), torch.randn(1, 10, 32, dtype=torch.float64)
        padded = torch.cat((context, torch.full((1, 9, 32), torch.nan, dtype=torch.float64)), 1)
        got = attention(x, padded, key_mask=torch.arange(19)[None] < 10)
        torch.testing.assert_close(got, attention(x, context))


def test_it_compiles_with_any_context_length():
    attention = Attention(32, 4, "hepos", stride=2)
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for keys in (20, 33):
        x, context = torch.randn(2, 5, 32), torch.randn(2, keys, 32)
        torch.testing.assert_close(compiled(x, context), attention(x, context))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 3}, r"stride must divide the 4 heads, got 3; valid: \[1, 2, 4\]"),
        ({"kind": "blocks"}, r"unknown kind 'blocks' \(did you mean 'block'\?\); known: stride, block"),
        ({"block_size": 4}, "block_size=4 goes with kind='block'"),
        ({"kind": "block", "block_size": 0}, "block_size must be a whole number of at least 1"),
        ({"causal": True}, "cannot do 'causal'"),
    ],
)
def test_bad_options_say_what_is_valid(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(32, 4, "hepos", **options)


def test_self_attention_is_refused():
    with pytest.raises(ValueError, match="cannot do 'bidirectional'"):
        Attention(32, 4, "hepos")(torch.zeros(1, 4, 32))
