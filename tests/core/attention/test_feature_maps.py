"""Feature maps: each against its formula, vector by vector; what FAVOR+ promises; the convolution of the values."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from core.attention import Attention, hybrid_attention, linear_attention
from core.attention.contract import Heads, Inputs
from core.attention.feature_maps import FEATURE_MAPS
from core.attention.learned_maps import LEARNED_MAPS
from core.attention.random_features import Favor, draw
from core.attention.registry import build
from core.attention.variants.linear import attend

MAPS = ("cosine", "dpfp", "dpfp-2", "dpfp-3", *LEARNED_MAPS)
DRAWN = ("favor", "favor_relu")


def r(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def by_letter(name, x, learned, side, head, group):
    """phi of one vector [D]; learned: the map's tensors by name; head: query head for queries, key head for keys."""
    d = len(x)
    key_head = head // group if side == "query" else head
    if name == "cosine":
        return torch.cat((torch.ones(1), x / x.norm()))
    if name.startswith("dpfp"):
        r = [max(float(one), 0.0) for one in (*x, *-x)]
        return torch.tensor(
            [r[i] * r[(i - n) % (2 * d)] for n in range(1, _nu(name) + 1) for i in range(2 * d)]
        ).double()
    if name in DRAWN:
        x = x / x.square().mean().sqrt() / d**0.25
        omega = learned["omega"][key_head]
        if name == "favor_relu":
            return (omega @ x).clamp(min=0) / math.sqrt(len(omega)) + 1e-3
        return torch.exp(omega @ x - x.dot(x) / 2) / math.sqrt(len(omega))
    if name == "focused":
        one = (x.clamp(min=0) + 1e-6) / torch.log1p(learned["scale"][key_head].exp())
        return one.norm() / (one**3).norm() * one**3
    y = learned[side][head] @ x
    if name == "t2r":
        return (y + learned[f"{side}_bias"][head]).clamp(min=0)
    return torch.cat((y.exp() / y.exp().sum(), (-y).exp() / (-y).exp().sum()))


def _nu(name):
    return int(name[-1]) if "-" in name else 1


def jittered(variant):
    """Parameters away from their special start."""
    with torch.no_grad():
        for parameter in variant.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return variant


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_linear_attention_follows_the_formula_of_the_map(name, causal):
    more = {"features": 7} if name in (*DRAWN, "t2r") else {}
    variant = jittered(build("linear", Heads(4, 2, 5, 3), feature_map=name, feature_dim=5, **more).double())
    q, k, v = r(2, 4, 9, 5), r(2, 2, 9, 5), r(2, 2, 9, 3)
    mask = torch.rand(2, 9) > 0.3
    got = variant(q, k, v, causal=causal, key_mask=mask)
    learned = dict(variant.project.map.state_dict()) if name in LEARNED_MAPS else {}
    for b, h, i in ((0, 0, 8), (0, 3, 4), (1, 1, 6), (1, 2, 8)):
        fq = by_letter(name, q[b, h, i], learned, "query", h, 2)
        visible = [j for j in range(9) if mask[b, j] and (j <= i or not causal)]
        weights = [fq.dot(by_letter(name, k[b, h // 2, j], learned, "key", h // 2, 2)) for j in visible]
        total = sum(weights)
        mean = sum(w * v[b, h // 2, j] for w, j in zip(weights, visible))
        want = mean / total if total > 0 else torch.zeros(3).double()
        torch.testing.assert_close(got.out[b, h, i], want, rtol=1e-6, atol=1e-8)  # rms_norm's epsilon
        torch.testing.assert_close(got.log_mass[b, h, i], total.log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in FEATURE_MAPS if not name.startswith("given")])
def test_gradients_by_hand_are_those_of_autograd(name):
    phi = FEATURE_MAPS[name]
    x = r(20, 4)
    x[0] = 0.05
    x.requires_grad_()
    features = phi.features(x)
    d = torch.randn_like(features)
    assert features.shape[-1] == phi.width(4)
    (want,) = torch.autograd.grad(features, x, d)
    torch.testing.assert_close(phi.gradient(x.detach(), features.detach(), d), want)


@pytest.mark.parametrize("name", ["cosine", "dpfp-2", "silu"])
def test_gradcheck_through_chunks(name, monkeypatch):
    from core.attention.blocked import linear as blocked

    monkeypatch.setattr(blocked, "CHUNK", {"both": 4, "past": 3, "future": 3})
    inputs = [r(1, 2, 7, 3).requires_grad_(), r(1, 1, 7, 3).requires_grad_(), r(1, 1, 7, 2).requires_grad_()]
    for causal in (False, True):
        options = {"feature_map": name, "causal": causal, "normalize": name != "silu"}
        assert torch.autograd.gradcheck(lambda *x, o=options: linear_attention(*x, **o), inputs, atol=1e-6)


def test_opposite_vectors_have_no_cosine_mass_rather_than_nan():
    k = r(1, 1, 40, 8, dtype=torch.float32)
    for i in range(40):
        out, mass = linear_attention(-k, k[:, :, i : i + 1], k[:, :, :1], feature_map="cosine", return_mass=True)
        assert torch.isfinite(out).all()
        assert not mass.isnan().any()
        assert mass[0, 0, i] < -12


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["linear", "hybrid"])
def test_error_is_at_most_twice_that_of_the_plain_formula_in_the_same_precision(name, dtype, variant):
    module = build(variant, Heads(2, 1, 16, 8), feature_map=name).double()
    exact = [(r(2, 2, 97, 16)), r(2, 1, 97, 16), r(2, 1, 97, 8)]
    exact = [x.to(dtype).double().requires_grad_() for x in exact]

    def run(kind, backend):
        leaves = [x.detach().to(kind).requires_grad_() for x in exact]
        module.to(kind if kind == torch.float64 else torch.float32)
        out = module(*leaves, causal=True, backend=backend).out
        assert out.dtype == kind
        return [out, *torch.autograd.grad(out.double().square().sum(), leaves)]

    truth, plain, ours = run(torch.float64, "reference"), run(dtype, "reference"), run(dtype, "torch")
    for factor, want, theirs, mine in zip((2, 3, 3, 3), truth, plain, ours):
        tiny = (1e-6 if dtype == torch.float32 else 1e-5) * (1 + want.abs().max())
        assert (mine.double() - want).abs().max() <= factor * (theirs.double() - want).abs().max() + tiny


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1500, pytest.param(65536, marks=pytest.mark.slow)])
def test_large_inputs_stay_finite(name, dtype, length):
    q, k, v = ((10 * torch.randn(1, 1, length, 32)).to(dtype).requires_grad_() for _ in range(3))
    for variant in ("linear", "hybrid"):
        module = build(variant, Heads(1, 1, 32, 32), feature_map=name).to(dtype)
        for causal in (False, True):
            out, mass = module(q, k, v, causal=causal)
            assert torch.isfinite(out).all()
            for gradient in torch.autograd.grad(out.float().sum() + mass[mass.isfinite()].sum(), (q, k, v)):
                assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", LEARNED_MAPS)
def test_layers_compile_whole_with_learned_maps_and_in_training(name):
    more = {"redraw_every": 2} if name in DRAWN else {}
    layer = Attention(32, 2, "linear", feature_map=name, causal=True, **more)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (20, 9, 31):
        x = torch.randn(2, length, 32)
        state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
        got = compiled(x)
        got.sum().backward()
        after = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
        layer.load_state_dict(state)
        torch.testing.assert_close(got, layer(x), rtol=1e-4, atol=1e-5)
        assert all(torch.equal(after[key], tensor) for key, tensor in layer.state_dict().items())


def test_favor_is_unbiased_and_orthogonal_rows_are_orthogonal():
    q, k = 0.7 * r(16), 0.7 * r(16)
    rows = draw(4000, 16, 16, 5)
    y = torch.stack((q, k)) / 2
    phi = torch.exp(torch.einsum("hmd,nd->nhm", rows, y) - y.square().sum(-1).view(2, 1, 1) / 2) / 4
    estimates = (phi[0] * phi[1]).sum(-1)
    want = math.exp(q.dot(k) / 4)
    assert abs(estimates.mean() - want) < 4 * estimates.std() / math.sqrt(4000)
    gram = rows @ rows.mT
    lengths = gram.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(gram, torch.diag_embed(lengths), rtol=0, atol=1e-10)
    assert abs(lengths.mean() - 16) < 0.2  # chi squared with 16 degrees of freedom
    assert abs(lengths.var() - 32) < 2
    directions = (rows / lengths.sqrt().unsqueeze(-1)).flatten(0, 1)
    assert directions.mean(0).abs().max() < 0.01
    assert len({tuple(draw(1, 3, 4, seed, count).flatten().tolist()) for seed in range(3) for count in range(3)}) == 9


@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_favor_keeps_its_digits_in_float32_whatever_the_vectors(width, causal):
    phi = Favor(Heads(1, 1, width, width), width, None, 3, 0)
    rows = phi.omega[0]
    x = torch.nn.functional.rms_norm(torch.cat((rows[:20], -rows[:20], torch.randn(40, width))), (width,))
    q, k, v = x[torch.randperm(80)][None, None], x[None, None], torch.randn(1, 1, 80, 4)
    got, _ = attend(q, k, v, phi, causal=causal)
    logs = [(x.double() @ rows.double().T) * width**-0.25 - width**0.5 / 2 for x in (q[0, 0], k[0, 0])]
    scores = torch.logsumexp(logs[0][:, None] + logs[1][None], -1) - math.log(phi.features)
    scores = scores.masked_fill(torch.ones(80, 80).triu(1).bool(), -math.inf) if causal else scores
    torch.testing.assert_close(got.log_mass[0, 0].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got.out[0, 0].double(), scores.softmax(-1) @ v[0, 0].double(), rtol=1e-3, atol=1e-4)


def favor_layer(**more):
    return Attention(16, 2, "linear", feature_map="favor", features=8, **more)


def test_features_change_when_told_and_only_in_training():
    layer = favor_layer(seed=7, redraw_every=3)
    phi, x = layer.variant.map, torch.randn(1, 5, 16)
    first = phi.omega.clone()
    layer.eval()
    for _ in range(4):
        layer(x)
    assert torch.equal(phi.omega, first)
    layer.train()
    drawn = []
    for _ in range(6):
        y = layer(x)
        drawn.append(phi.omega.clone())
        y.sum().backward()  # saved for this backward is what the pass used
    assert all(torch.equal(one, first) for one in drawn[:2])
    assert torch.equal(drawn[2], drawn[4])
    assert not torch.equal(drawn[2], first)
    assert torch.equal(drawn[2], draw(2, 8, 8, 7, 1).float())
    assert torch.equal(drawn[5], draw(2, 8, 8, 7, 2).float())
    still = favor_layer(seed=7)
    still(x)
    assert torch.equal(still.variant.map.omega, first)
    still.variant.map.redraw()
    assert torch.equal(still.variant.map.omega, drawn[2])


def test_a_resumed_run_draws_what_an_uninterrupted_one_does():
    x = torch.randn(1, 5, 16)
    whole = favor_layer(seed=7, redraw_every=2)
    for _ in range(3):
        whole(x)
    resumed = favor_layer(seed=0, redraw_every=2)
    resumed.load_state_dict(whole.state_dict())
    assert torch.equal(whole(x), resumed(x))
    assert torch.equal(whole.variant.map.omega, draw(2, 8, 8, 7, 2).float())


def test_recomputation_in_the_backward_does_not_count():
    layer, x = favor_layer(redraw_every=2), torch.randn(1, 5, 16, requires_grad=True)
    plain = favor_layer(redraw_every=2)
    plain.load_state_dict(layer.state_dict())
    for _ in range(3):
        (want,) = torch.autograd.grad(plain(x).square().sum(), x)
        (got,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
        torch.testing.assert_close(got, want)
    assert layer.variant.map.counters.tolist() == plain.variant.map.counters.tolist() == [0, 1, 3]


def test_two_random_maps_are_the_same_wherever_they_are_built():
    one = favor_layer(seed=4)
    torch.manual_seed(999)
    assert torch.equal(one.variant.map.omega, favor_layer(seed=4).variant.map.omega)
    assert not torch.equal(one.variant.map.omega, favor_layer(seed=5).variant.map.omega)
    assert not torch.equal(*one.variant.map.omega)  # heads differ


def test_hedgehog_and_t2r_start_equal_in_a_group_and_learn():
    for name in ("hedgehog", "t2r"):
        layer = Attention(32, 4, "hybrid", num_kv_heads=2, window=2, feature_map=name)
        phi = layer.variant.map
        assert torch.equal(phi.query, phi.key.repeat_interleave(2, 0))
        layer(torch.randn(1, 9, 32)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (phi.query, phi.key))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": "hedgehgo"}, r"did you mean 'hedgehog'"),
        ({"feature_map": "given"}, "unknown feature map 'given'"),
        ({"feature_map": "silu"}, "signed"),
        (
            {"feature_map": "elu", "features": 4},
            "features is the width of favor, favor_relu and t2r; 'elu' has its own",
        ),
        ({"feature_map": "favor", "features": 0}, "features must be a whole number of at least 1, got 0"),
        ({"feature_map": "t2r", "seed": 1}, "seed and redraw_every belong to favor and favor_relu"),
        ({"feature_map": "favor", "redraw_every": -1}, "redraw_every must be a whole number from 0"),
        ({"conv": 4}, "conv must be an odd number of at least 1, got 4"),
        ({"feature_map": "t2r", "features": 5, "positions": "rope"}, "head widths divisible by 2, got 5"),
    ],
)
def test_bad_options_say_what_is_valid(options, message):
    for name in ("linear", "hybrid"):
        with pytest.raises(ValueError, match=message):
            Attention(32, 4, name, **options)


def test_functions_and_cross_attention_name_what_they_cannot_do():
    q = torch.randn(1, 2, 5, 4)
    for function in (linear_attention, lambda *x, **y: hybrid_attention(*x, window=2, **y)):
        with pytest.raises(ValueError, match=r"'favor' has parameters or buffers.*Attention\(\.\.\., 'linear'"):
            function(q, q, q, feature_map="favor")
    with pytest.raises(ValueError, match="cannot do 'cross'"):
        Attention(16, 2, "linear", conv=3)(torch.zeros(1, 4, 16), torch.zeros(1, 6, 16))
    with pytest.raises(ValueError, match="'linear' does not compose with 'rope'"):
        Attention(16, 2, "linear", feature_map="focused", positions="rope")


def convolved(v, weight, mask, *, causal, grid):
    """The convolution by the letter, one number at a time: v [L, E], weight [E, s, s]."""
    length, width, s = len(v), v.shape[1], weight.shape[-1]
    out = torch.zeros_like(v)
    rows, columns = (1, length) if grid is None or causal else grid
    first = length - rows * columns
    for i in range(first, length):
        row, column = divmod(i - first, columns)
        for a in range(s):
            for b in range(s):
                y, x = row + a - s // 2, column + (b - s + 1 if causal else b - s // 2)
                at = first + y * columns + x
                if 0 <= y < rows and 0 <= x < columns and mask[at]:
                    out[i] += torch.stack([weight[e, a, b] * v[at, e] for e in range(width)])
    return out


@pytest.mark.parametrize(("causal", "grid"), [(False, None), (False, (3, 4)), (True, None), (True, (3, 4))])
@pytest.mark.parametrize("name", ["linear", "hybrid"])
def test_a_convolution_of_the_values_is_added_to_the_output(name, causal, grid):
    heads = Heads(4, 2, 4, 3)
    plain, conv = build(name, heads).double(), build(name, heads, conv=3).double()
    conv.load_state_dict(plain.state_dict(), strict=False)
    q, k, v = r(2, 4, 14, 4), r(2, 2, 14, 4), r(2, 2, 14, 3)
    mask = torch.rand(2, 14) > 0.2
    options = {"causal": causal, "key_mask": mask, "inputs": Inputs(None, grid)}
    got, base = conv(q, k, v.masked_fill(~mask[:, None, :, None], math.nan), **options), plain(q, k, v, **options)
    assert torch.equal(got.log_mass, base.log_mass)
    for b, h in ((0, 0), (1, 3)):
        weight = conv.convolution.weight.detach()
        added = convolved(v[b, h // 2], weight, mask[b], causal=causal, grid=grid)
        torch.testing.assert_close(got.out[b, h] - base.out[b, h], added, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["linear", "hybrid"])
def test_a_convolution_of_the_values_decodes_packs_and_pads(name):
    layer = Attention(32, 4, name, num_kv_heads=2, conv=5, causal=True).double()
    x = r(2, 13, 32)
    want = layer(x)
    state, got = layer.init_state(2), []
    for a, b in ((0, 2), (2, 9), (9, 10), (10, 13)):
        y, state = layer.prefill(x[:, a:b], state)
        got.append(y)
    torch.testing.assert_close(torch.cat(got, 1), want)
    assert layer.cost(2, 13).state_bytes == sum(t.numel() * t.element_size() for t in state.values())
    two_sided = Attention(32, 4, name, conv=5).double()
    pack = two_sided(x[:1], cu_seqlens=torch.tensor([0, 4, 13]))
    torch.testing.assert_close(pack, torch.cat((two_sided(x[:1, :4]), two_sided(x[:1, 4:])), 1))
    for one in (layer, two_sided):
        cost = one.cost(1, 20)
        assert cost.parameters == sum(p.numel() for p in one.parameters())
        padded = torch.cat((torch.full((2, 3, 32), math.nan, dtype=x.dtype), x, x), 1)
        mask = torch.arange(29).expand(2, -1)
        mask = (mask >= 3) & (mask < 16)
        torch.testing.assert_close(one(padded, key_mask=mask)[:, 3:16], one(x))
