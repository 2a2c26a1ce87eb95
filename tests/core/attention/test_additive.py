"""Additive and Luong attention: the letter of the papers, token by token, and the tiles that compute it."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from core.attention import Attention
from core.attention.blocked import additive as blocked
from core.attention.contract import Heads
from core.attention.positions import alibi_slopes
from core.attention.registry import build
from core.attention.variants.additive import attend

BUILDS = {
    "additive": ("additive", {}),
    "additive-5": ("additive", {"hidden": 5}),
    "dot": ("luong", {"score": "dot"}),
    "general": ("luong", {"score": "general"}),
    "concat": ("luong", {"score": "concat"}),
}
SHAPES = [(2, 4, 2, 6, 6), (1, 2, 1, 4, 9), (1, 4, 4, 7, 4), (1, 2, 2, 1, 1)]


def variant_and_inputs(name, shape, dtype=torch.float64):
    batch, heads, key_heads, length, keys = shape
    torch.manual_seed(3)
    kind, options = BUILDS[name]
    variant = build(kind, Heads(heads, key_heads, 4, 3), **options).to(dtype)
    for parameter in variant.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # no bias at 0, no W at the identity
    sizes = (batch, heads, length, 4), (batch, key_heads, keys, 4), (batch, key_heads, keys, 3)
    return variant, [torch.randn(size, dtype=dtype).requires_grad_() for size in sizes]


def score_by_hand(name, variant, h, g, q, k):
    weights = dict(variant.score.named_parameters())
    if name == "dot":
        return q.dot(k)
    if name == "general":
        return sum(q[i] * weights["between"][h, i, j] * k[j] for i in range(4) for j in range(4))
    both = torch.cat((weights["query"][h], weights["key"][g]))  # [2 D, A] acts on [q; k]
    inner = torch.cat((q, k)) @ both + (weights["bias"][h] if "bias" in weights else 0)
    return weights["weight"][h].dot(torch.tanh(inner))


def by_hand(name, variant, q, k, v, causal, mask, slopes):
    outs, masses = [], []
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        g, at = h // (q.shape[1] // k.shape[1]), i + k.shape[2] - q.shape[2]
        seen = [j for j in range(k.shape[2]) if (j <= at or not causal) and (mask is None or mask[b, j])]
        if not seen:
            outs.append(q.new_zeros(3))
            masses.append(q.new_tensor(-math.inf))
            continue
        slope = 0.0 if slopes is None else slopes[h]
        scores = torch.stack(
            [score_by_hand(name, variant, h, g, q[b, h, i], k[b, g, j]) - slope * abs(at - j) for j in seen]
        )
        outs.append(sum(p * v[b, g, j] for p, j in zip(scores.softmax(0), seen)))
        masses.append(scores.exp().sum().log())
    return torch.stack(outs).view(*q.shape[:3], 3), torch.stack(masses).view(q.shape[:3])


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equals_the_papers_formula(name, shape, causal, masked, backend, monkeypatch):
    monkeypatch.setattr(blocked, "KEYS", 2)
    monkeypatch.setattr(blocked, "block_elements", lambda device: 48)
    variant, (q, k, v) = variant_and_inputs(name, shape)
    mask = torch.rand(shape[0], shape[4]) > 0.5 if masked else None
    slopes = alibi_slopes(shape[1]).double() if shape[1] == 4 else None
    got = variant(q, k, v, causal=causal, key_mask=mask, slopes=slopes, return_mass=True, backend=backend)
    want_out, want_mass = by_hand(name, variant, q, k, v, causal, mask, slopes)
    torch.testing.assert_close(got.out, want_out, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got.log_mass, want_mass, rtol=1e-10, atol=1e-12)
    seen = torch.isfinite(want_mass)
    if seen.any():

        def gradients(out, mass):
            inputs = [q, k, v, *variant.parameters()]
            return torch.autograd.grad(out.sin().sum() + mass[seen].cos().sum(), inputs)

        for mine, theirs in zip(gradients(*got), gradients(want_out, want_mass)):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_of_the_tiles(causal, monkeypatch):
    monkeypatch.setattr(blocked, "KEYS", 2)
    a, c, v = (torch.randn(2, h, 5, n, dtype=torch.float64, requires_grad=True) for h, n in ((4, 3), (2, 3), (2, 2)))
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True, True, True], [True] * 5])

    def function(a, c, w, v):
        return tuple(attend(a, c, w, v, causal=causal, key_mask=mask))

    assert torch.autograd.gradcheck(function, (a, c, w, v), fast_mode=False)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
def test_the_op_keeps_what_torch_asks_of_ops():
    a, c, v = (torch.randn(1, h, 5, n, requires_grad=True) for h, n in ((2, 3), (1, 3), (1, 2)))
    w, mask = torch.randn(2, 3, requires_grad=True), torch.rand(1, 5) > 0.2
    torch.library.opcheck(blocked.additive_forward, (a, c, w, v, mask, None, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 3.0])
@pytest.mark.parametrize("name", BUILDS)
def test_error_is_at_most_twice_that_of_the_plain_formula_in_the_same_precision(name, dtype, scale):
    torch.manual_seed(5)
    kind, options = BUILDS[name]
    fast = build(kind, Heads(2, 1, 16, 8), **options).to(dtype)
    exact = build(kind, Heads(2, 1, 16, 8), **options).double()
    exact.load_state_dict(fast.state_dict())
    truth = [
        (torch.randn(2, h, 97, n) * scale).to(dtype).double().requires_grad_() for h, n in ((2, 16), (1, 16), (1, 8))
    ]
    compared = 0

    def run(variant, backend, dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in truth]
        out = variant(*inputs, causal=True, backend=backend).out
        return [out, *torch.autograd.grad(out.double().square().sum(), inputs)]

    got, plain, want = run(fast, "torch", dtype), run(fast, "reference", dtype), run(exact, "reference", torch.float64)
    for n, (mine, theirs, right) in enumerate(zip(got, plain, want)):
        tiny = 1e-5 * max(1.0, scale) * (1 + right.abs().max())
        limit = (3 if n else 2) * (theirs.double() - right).abs().nan_to_num(nan=math.inf).max() + tiny
        assert (mine.double() - right).abs().max() <= limit
        assert mine.dtype == dtype
        compared += 1
    assert compared == 4


def test_no_tensor_of_pairs_and_hidden_units_is_kept():
    # 2 heads x 600 queries x 600 keys x 16 hidden units would be 46 MB; a tile is 1 MB.
    attention = Attention(32, 2, "additive", causal=True)
    biggest = 0

    def watch(tensor):
        nonlocal biggest
        biggest = max(biggest, tensor.numel())
        return tensor

    x = torch.randn(1, 600, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
        attention(x).sum().backward()
    assert 0 < biggest <= 600 * 32


def test_luong_dot_is_softmax_attention_of_scale_one_and_general_starts_as_dot():
    q, k, v = (torch.randn(2, 2, 9, 4) for _ in range(3))
    want = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    for score in ("dot", "general"):
        torch.testing.assert_close(build("luong", Heads(2, 2, 4, 4), score=score)(q, k, v).out, want)


def test_shifting_all_scores_shifts_only_the_mass():
    variant, (q, k, v) = variant_and_inputs("additive", (1, 2, 2, 5, 8))
    options = {"key_mask": torch.rand(1, 8) > 0.2}
    a, c, w = variant.score.queries(q), variant.score.keys(k), variant.score.weight
    first = attend(a, c, w, v, **options)
    # One more hidden unit, saturated: tanh(50) = 1 adds its weight to every score.
    more = [F.pad(x, (0, 1), value=y) for x, y in ((a, 50.0), (c, 0.0), (w, 0.7))]
    second = attend(*more, v, **options)
    torch.testing.assert_close(second.out, first.out)
    torch.testing.assert_close(second.log_mass, first.log_mass + 0.7)


def test_a_saturated_network_stays_finite():
    variant, (q, k, v) = variant_and_inputs("additive", (1, 2, 2, 70, 70), torch.float32)
    with torch.no_grad():
        variant.score.weight.mul_(1e3)
    out = variant(q * 1e4, k * 1e4, v, causal=True).out
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), [q, k, v, *variant.parameters()]))


def test_dropout_drops_weights_where_a_score_allows_it():
    attention = Attention(32, 2, "luong", score="dot", dropout=0.5)
    x = torch.randn(1, 20, 32)
    assert not torch.allclose(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("additive", {"hidden": 0}), "hidden must be a whole number of at least 1"),
        (("luong", {"score": "dots"}), r"unknown score 'dots' \(did you mean 'dot'\?\); known: dot, general, concat"),
        (("luong", {"score": "concat", "dropout": 0.1}), "cannot do 'dropout'"),
        (("additive", {"dropout": 0.1}), "cannot do 'dropout'"),
        (("luong", {"score": "concat", "positions": "rope"}), "does not compose with 'rope'"),
        (("additive", {"positions": "rope"}), "does not compose with 'rope'"),
    ],
)
def test_bad_options_say_what_is_valid(arguments, message):
    name, options = arguments
    with pytest.raises(ValueError, match=message):
        Attention(32, 4, name, **options)
