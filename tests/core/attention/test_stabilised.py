"""TransNormer, InLine and ReLU attention with neighbourhoods, against token loops that share nothing with the core."""

import math

import pytest
import torch

from core.attention import Attention, sliding_window_attention, softmax_attention
from core.attention.contract import Heads, Inputs
from core.attention.registry import build

HEADS = Heads(4, 2, 4, 3, 8)
PHI = {
    "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "identity": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def r(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def inputs(length=11, keys=11):
    return r(2, 4, length, 4), r(2, 2, keys, 4), r(2, 2, keys, 3), torch.rand(2, keys) > 0.3


def shaken(variant):
    with torch.no_grad():
        for parameter in variant.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return variant


def seen_by(i, mask, causal, queries):
    return [j for j in range(len(mask)) if mask[j] and (not causal or j <= i + len(mask) - queries)]


def norm_row(q, k, v, seen, phi, gain, causal):
    x = sum((phi(q).dot(phi(k[j])) * v[j] for j in seen), torch.zeros(3).double())
    x = x if causal else x / max(1, len(seen))
    return gain * x / math.sqrt(float((x * x).mean()) + 1e-6)


def inline_row(q, k, v, seen, phi, scale=0.5):
    if not seen:
        return torch.zeros(3).double()
    n = len(seen)
    mean = sum(phi(k[j]) for j in seen) / n
    weights = [scale / n * (phi(q).dot(phi(k[j])) - phi(q).dot(mean)) + 1 / n for j in seen]
    assert abs(sum(weights) - 1) < 1e-12
    return sum(w * v[j] for w, j in zip(weights, seen))


@pytest.mark.parametrize(
    ("length", "keys", "causal"), [(11, 11, False), (11, 11, True), (5, 9, False), (5, 9, True), (9, 5, True)]
)
@pytest.mark.parametrize("feature_map", PHI)
@pytest.mark.parametrize("name", ["norm", "inline"])
def test_norm_and_inline_follow_their_definitions(name, feature_map, length, keys, causal):
    variant = shaken(build(name, HEADS, feature_map=feature_map).double())
    q, k, v, mask = inputs(length, keys)
    mask[1, 3:] = False
    got = variant(q, k, v, causal=causal, key_mask=mask)
    assert got.log_mass is None
    for b in range(2):
        for h in range(4):
            for i in range(length):
                row = (q[b, h, i], k[b, h // 2], v[b, h // 2], seen_by(i, mask[b], causal, length), PHI[feature_map])
                want = norm_row(*row, variant.gain[h].detach(), causal) if name == "norm" else inline_row(*row)
                torch.testing.assert_close(got.out[b, h, i], want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["norm", "inline", "diagonal", "relu_conv"])
def test_gradcheck(name, causal):
    more = {"diagonal": {"block": 3}, "relu_conv": {"scales": (3,)}}.get(name, {})
    variant = build(name, Heads(2, 1, 2, 2, 4), **more).double()
    tensors = [r(1, h, 5, 2).requires_grad_() for h in (2, 1, 1)]
    mask = torch.tensor([[True, True, False, True, True]])
    names = [key for key, _ in variant.named_parameters()]

    def function(q, k, v, *parameters):
        given = {"causal": causal, "key_mask": mask}
        return torch.func.functional_call(variant, dict(zip(names, parameters)), (q, k, v), given).out

    parameters = [p.detach().clone().requires_grad_() for p in variant.parameters()]
    assert torch.autograd.gradcheck(function, (*tensors, *parameters), atol=1e-6)


@pytest.mark.parametrize("name", ["norm", "inline", "diagonal", "relu_conv"])
def test_a_query_without_keys_gives_zero_and_no_gradient(name):
    variant = build(name, HEADS).double()
    q, k, v, mask = inputs()
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    mask[0] = False
    for causal in (False, True):
        out = variant(q, k, v, causal=causal, key_mask=mask).out
        assert (out[0] == 0).all()
        for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
            assert torch.isfinite(gradient).all()
            assert (gradient[0] == 0).all()


def test_norm_has_unit_mean_square_without_gain():
    variant = build("norm", HEADS, feature_map="identity", gain=False)
    assert not list(variant.parameters())
    out = variant(*(10 * x.float() for x in inputs()[:3])).out
    torch.testing.assert_close(out.square().mean(-1), torch.ones(2, 4, 11))


def test_norm_decays_with_alibi_in_both_directions():
    variant = build("norm", HEADS, feature_map="silu", gain=False).double()
    q, k, v, _ = inputs()
    slopes = torch.tensor([0.5, 0.1, 1.0, 0.0])
    for causal in (False, True):
        got = variant(q, k, v, causal=causal, slopes=slopes).out
        at = torch.arange(11)
        decay = torch.exp(-slopes.double()[:, None, None] * (at[:, None] - at).abs())
        kk, vv = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        weights = PHI["silu"](q) @ PHI["silu"](kk).mT * decay
        x = (weights.tril() if causal else weights / 11) @ vv
        torch.testing.assert_close(got, x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


@pytest.mark.parametrize("causal", [False, True])
def test_diagonal_is_softmax_in_each_block_and_has_a_mass(causal):
    variant = build("diagonal", HEADS, block=4).double()
    q, k, v, mask = inputs()
    got = variant(q, k, v, causal=causal, key_mask=mask)
    for a in (0, 4, 8):
        cut = slice(a, a + 4)
        want = softmax_attention(
            q[:, :, cut], k[:, :, cut], v[:, :, cut], causal=causal, key_mask=mask[:, cut], return_mass=True
        )
        torch.testing.assert_close(got.out[:, :, cut], want.out)
        torch.testing.assert_close(got.log_mass[:, :, cut], want.log_mass)
    whole = build("diagonal", HEADS, block=64).double()(q, k, v, causal=causal).out
    torch.testing.assert_close(whole, softmax_attention(q, k, v, causal=causal))
    alone = build("diagonal", HEADS, block=1).double()(q, k, v, causal=causal).out
    torch.testing.assert_close(alone, sliding_window_attention(q, k, v, window=1, causal=causal))


@pytest.mark.parametrize(("length", "keys"), [(5, 9), (9, 5), (3, 11), (1, 8), (8, 1)])
def test_diagonal_aligns_the_last_query_with_the_last_key(length, keys):
    variant = build("diagonal", HEADS, block=4).double()
    q, k, v, _ = inputs(length, keys)
    got, want = (variant(q, k, v, causal=True, backend=backend) for backend in ("torch", "reference"))
    torch.testing.assert_close(got.out, want.out)
    torch.testing.assert_close(got.log_mass, want.log_mass)
    assert (got.log_mass[:, :, max(0, length - keys) :] > -math.inf).all()


@pytest.mark.parametrize("grid", [None, (3, 3)])
def test_the_residual_of_inline_is_predicted_from_the_mean_of_the_real_tokens(grid):
    plain, variant = build("inline", HEADS).double(), shaken(build("inline", HEADS, residual=True).double())
    q, k, v, mask = inputs()
    x = r(2, 11, 8)
    x[~mask] = math.nan
    got = variant(q, k, v, key_mask=mask, inputs=Inputs(x, grid)).out - plain(q, k, v, key_mask=mask).out
    net = variant.residual
    b, head, channel = 1, 3, 2
    mean = x[b][mask[b]].mean(0)[4:]  # the second key head's half
    hidden = torch.nn.functional.gelu(mean @ net.enter[1] + net.enter_bias[1])
    kernel = (hidden @ net.leave[1] + net.leave_bias[1])[channel * 9 :][:9].view(3, 3)
    rows, columns = grid or (1, 11)
    first = 11 - rows * columns
    want = torch.zeros(11).double()
    for i in range(first, 11):
        row, column = divmod(i - first, columns)
        for a in range(3):
            for c in range(3):
                y, z = row + a - 1, column + c - 1
                if 0 <= y < rows and 0 <= z < columns and mask[b, first + y * columns + z]:
                    want[i] += kernel[a, c] * v[b, 1, first + y * columns + z, channel]
    torch.testing.assert_close(got[b, head, :, channel], want, rtol=1e-9, atol=1e-11)


def test_the_residual_of_inline_learns_through_the_layer_and_packs():
    layer = Attention(32, 4, "inline", residual=True).double()
    x = r(1, 12, 32)
    pack = layer(x, cu_seqlens=torch.tensor([0, 5, 12]))
    torch.testing.assert_close(pack, torch.cat((layer(x[:, :5]), layer(x[:, 5:])), 1))
    assert not torch.allclose(layer(x, grid=(3, 4)), layer(x))
    layer(x, grid=(2, 5)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in layer.named_parameters() if name != "key.bias")
    assert layer.cost(1, 12).parameters == sum(p.numel() for p in layer.parameters())


def test_inline_needs_no_positive_weights_and_permutes_with_its_keys():
    variant = build("inline", HEADS).double()
    q, k, v, _ = inputs()
    order = torch.randperm(11)
    torch.testing.assert_close(variant(q, k, v).out, variant(q, k[:, :, order], v[:, :, order]).out)
    constant = variant(q, k, torch.full_like(v, 2.5)).out
    torch.testing.assert_close(constant, torch.full_like(constant, 2.5))
    same = variant(q, k[:, :, :1].expand_as(k), v).out  # equal keys: the mean
    torch.testing.assert_close(same, v.mean(2, keepdim=True).repeat_interleave(2, 1).expand_as(same))


def relu_by_hand(variant, q, k, v, mask, *, causal, grid):
    """[H, L, E] of one sample."""
    length = q.shape[1]
    rows, columns = (1, length) if grid is None or causal else grid
    first = length - rows * columns

    def around(x, module):
        heads = x.shape[0]
        s = module.kernel.shape[-1]
        y = torch.zeros_like(x)
        for i in range(first, length):
            row, column = divmod(i - first, columns)
            for a in range(s):
                for c in range(s):
                    up, left = row + a - s // 2, column + (c - s + 1 if causal else c - s // 2)
                    at = first + up * columns + left
                    if 0 <= up < rows and 0 <= left < columns and mask[at]:
                        y[:, i] += module.kernel[:, :, a, c] * x[:, at]
        return torch.stack([y[h] @ module.project[h] for h in range(heads)])

    total = torch.zeros(4, length, 3).double()
    for s, module in enumerate([None, *variant.around]):
        parts = (
            (q, k, v)
            if module is None
            else (around(x, module[n]) for x, n in zip((q, k, v), ("query", "key", "value")))
        )
        qs, ks, vs = parts
        for h in range(4):
            for i in range(length):
                seen = seen_by(i, mask, causal, length)
                weights = [PHI["relu"](qs[h, i]).dot(PHI["relu"](ks[h // 2, j])) for j in seen]
                den = max(float(sum(weights)) if seen else 0.0, 1e-6 * len(seen))
                if den:
                    total[h, i] += sum(w * vs[h // 2, j] for w, j in zip(weights, seen)) / den @ variant.mix[s, h]
    return total


@pytest.mark.parametrize(("causal", "grid"), [(False, None), (False, (3, 3)), (True, None)])
def test_relu_conv_follows_its_definition(causal, grid):
    variant = shaken(build("relu_conv", HEADS, scales=(3, 5)).double())
    q, k, v, mask = inputs()
    dirty = [x.masked_fill(~mask[:, None, :, None], math.nan) for x in (k, v)]
    got = variant(q, *dirty, causal=causal, key_mask=mask, inputs=Inputs(None, grid)).out
    with torch.no_grad():
        want = relu_by_hand(variant, q[1], k[1], v[1], mask[1], causal=causal, grid=grid)
    torch.testing.assert_close(got[1], want, rtol=1e-8, atol=1e-10)


def test_relu_conv_without_scales_is_linear_attention():
    variant, linear = build("relu_conv", HEADS, scales=()), build("linear", HEADS, feature_map="relu")
    q, k, v, _ = (x.float() for x in inputs())
    torch.testing.assert_close(variant(q, k, v).out, linear(q, k, v).out)
    assert not list(variant.parameters())


def test_relu_conv_decodes_with_scales_of_different_reach():
    layer = Attention(32, 4, "relu_conv", num_kv_heads=2, scales=[3, 7], causal=True).double()
    x = r(2, 15, 32)
    state, parts = layer.init_state(2), []
    for a, b in ((0, 1), (1, 4), (4, 5), (5, 15)):
        y, state = layer.prefill(x[:, a:b], state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1500, pytest.param(65536, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["norm", "inline", "diagonal", "relu_conv"])
def test_large_inputs_stay_finite_and_close(name, dtype, length):
    variant = build(name, Heads(1, 1, 16, 16, 16)).eval()
    exact = [(10 * torch.randn(1, 1, length, 16)).to(dtype) for _ in range(3)]
    for causal in (False, True):
        variant.to(dtype)
        leaves = [x.clone().requires_grad_() for x in exact]
        out = variant(*leaves, causal=causal).out
        assert out.dtype == dtype
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.float().sum(), leaves))
        want = variant.double()(*(x.double() for x in exact), causal=causal).out
        assert (out - want).square().mean().sqrt() < 0.02 * want.square().mean().sqrt()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("norm", {"feature_map": "taylor"}, "must be one of elu, identity, relu, silu, got 'taylor'"),
        ("inline", {"feature_map": "rleu"}, r"did you mean 'relu'"),
        ("inline", {"residual": True, "causal": True}, "cannot do 'causal'"),
        ("diagonal", {"block": 0}, "block must be a whole number of at least 1, got 0"),
        ("relu_conv", {"scales": (3, 4)}, "each of scales must be an odd number of at least 1, got 4"),
        ("relu_conv", {"scales": 5}, "scales must be a list of odd numbers, got 5"),
        ("relu_conv", {"positions": "rope"}, "does not compose with 'rope'"),
    ],
)
def test_bad_options_say_what_is_valid(name, options, message):
    with pytest.raises(ValueError, match=message):
        Attention(32, 4, name, **options)


def test_what_needs_the_layers_input_says_so():
    with pytest.raises(ValueError, match="build it by Attention"):
        build("inline", Heads(2, 2, 4, 4), residual=True)
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="needs the layer's input"):
        build("inline", HEADS, residual=True).double()(q, k, v)
    for name, message in (("diagonal", "blocks need as many"), ("relu_conv", "as many queries as keys")):
        with pytest.raises(ValueError, match=message):
            build(name, HEADS).double()(q[:, :, :5], k, v)
