"""Every mechanism against the token-by-token oracle: outputs, masses, gradients, precisions, empty rows."""

import itertools
import math

import pytest
import torch

from core.attention import hybrid_attention, linear_attention, sliding_window_attention, softmax_attention
from core.attention.blocked import linear as blocked_linear
from core.attention.blocked import window as blocked_window
from core.attention.positions import alibi_slopes

MECHANISMS = {
    "softmax": ("softmax", softmax_attention, {}),
    "window-1": ("window", sliding_window_attention, {"window": 1}),
    "window-3": ("window", sliding_window_attention, {"window": 3}),
    "elu": ("linear", linear_attention, {"feature_map": "elu"}),
    "relu": ("linear", linear_attention, {"feature_map": "relu"}),
    "taylor": ("linear", linear_attention, {"feature_map": "taylor"}),
    "hybrid-elu": ("hybrid", hybrid_attention, {"window": 2, "feature_map": "elu"}),
    "hybrid-taylor": ("hybrid", hybrid_attention, {"window": 3, "feature_map": "taylor"}),
    "hybrid-relu": ("hybrid", hybrid_attention, {"window": 1, "feature_map": "relu"}),
}
SHAPES = [
    (2, 4, 2, 6, 6, 4, 3),
    (1, 2, 2, 4, 7, 3, 5),
    (1, 2, 1, 7, 4, 4, 2),
    (1, 1, 1, 1, 5, 2, 2),
    (1, 2, 2, 1, 1, 1, 1),
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    # Small shapes must still cross block borders.
    monkeypatch.setattr(blocked_linear, "CHUNK", {"both": 4, "past": 3, "future": 3})
    monkeypatch.setattr(blocked_window, "ROWS", (2, 3))


def inputs(shape, dtype=torch.float64):
    batch, heads, key_heads, length, keys, width, values = shape
    sizes = (batch, heads, length, width), (batch, key_heads, keys, width), (batch, key_heads, keys, values)
    return [torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def fits(name, shape, causal) -> bool:
    return causal or MECHANISMS[name][0] not in ("window", "hybrid") or shape[3] == shape[4]


def oracle_options(options, heads):
    options = dict(options)
    if "feature_map" in options:
        options["phi"] = options.pop("feature_map")
    if "window" in options and "phi" in options:
        options["gate"] = torch.linspace(-0.5, 0.7, heads)
    return options


CASES = [
    (name, shape, causal, masked, alibi)
    for name, shape, causal, masked, alibi in itertools.product(
        MECHANISMS, SHAPES, (False, True), (False, True), (False, True)
    )
    if fits(name, shape, causal)
    and not (alibi and MECHANISMS[name][0] == "linear" and not causal and shape[3] != shape[4])
]


@pytest.mark.parametrize(("name", "shape", "causal", "masked", "alibi"), CASES)
def test_equals_the_definition_forward_and_backward(by_hand, name, shape, causal, masked, alibi):
    kind, attention, options = MECHANISMS[name]
    q, k, v = inputs(shape)
    mask = torch.rand(shape[0], shape[4]) > 0.4 if masked else None
    slopes = alibi_slopes(shape[1]).double() if alibi else None
    by_letter = oracle_options(options, shape[1])
    if "gate" in by_letter:
        options = {**options, "gate": by_letter["gate"]}
    out, mass = attention(q, k, v, causal=causal, key_mask=mask, slopes=slopes, return_mass=True, **options)
    want_out, want_mass = by_hand(kind, q, k, v, causal=causal, key_mask=mask, slopes=slopes, **by_letter)

    seen = torch.isfinite(want_mass)
    assert torch.equal(torch.isfinite(mass), seen)
    assert (mass[~seen] == -math.inf).all()
    assert (out[~seen] == 0).all()
    torch.testing.assert_close(out, want_out, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mass[seen], want_mass[seen], rtol=1e-10, atol=1e-12)

    if seen.any():

        def gradients(out, mass):
            return torch.autograd.grad(out.sin().sum() + mass[seen].cos().sum(), (q, k, v), allow_unused=True)

        for got, want in zip(gradients(out, mass), gradients(want_out, want_mass)):
            want = torch.zeros_like(got) if want is None else want
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(name, causal):
    _, attention, options = MECHANISMS[name]
    q, k, v = inputs((1, 2, 1, 7, 7, 3, 2))
    mask = torch.ones(1, 7, dtype=torch.bool)
    mask[0, 3] = False

    def function(q, k, v):
        out, mass = attention(q, k, v, causal=causal, key_mask=mask, return_mass=True, **options)
        return out, mass[torch.isfinite(mass)]  # window 1 leaves the query at the masked key without any

    # relu is not differentiable at 0; its random inputs stay further away than gradcheck's step
    assert torch.autograd.gradcheck(function, (q, k, v), fast_mode=False, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_of_the_gate_and_of_the_bias(causal):
    q, k, v = (x.detach() for x in inputs((1, 2, 2, 6, 6, 3, 2)))
    gate = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: hybrid_attention(q, k, v, window=2, gate=g, causal=causal), (gate,))
    for shape in ((1, 2, 6, 6), (6, 6), (1, 1, 1, 6), (2, 1, 6)):
        bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda b: tuple(softmax_attention(q, k, v, bias=b, causal=causal, return_mass=True)), (bias,)
        )


def test_gradcheck_through_the_initial_and_final_state():
    q, k, v = inputs((1, 2, 2, 5, 5, 3, 2))
    total = torch.rand(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def function(q, k, v, total):
        state = {"sum": total, "count": torch.ones(1, dtype=torch.float64)}
        attended, new = linear_attention(q, k, v, causal=True, state=state, return_state=True, return_mass=True)
        return *attended, new["sum"]

    assert torch.autograd.gradcheck(function, (q, k, v, total), fast_mode=False)


def test_a_second_derivative_is_an_error_not_a_wrong_number():
    q, k, v = inputs((1, 1, 1, 4, 4, 2, 2))
    (first,) = torch.autograd.grad(linear_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 8.0])
@pytest.mark.parametrize("name", [name for name in MECHANISMS if name != "window-1"])  # one key: the truth is exact
def test_error_is_at_most_twice_that_of_the_plain_formula_in_the_same_precision(name, dtype, scale, monkeypatch):
    monkeypatch.undo()  # real block sizes
    _, attention, options = MECHANISMS[name]
    shape = (2, 2, 1, 97, 97, 16, 8)
    exact = [(x.detach() * scale).to(dtype).double().requires_grad_() for x in inputs(shape)]
    rough = [x.detach().to(dtype).requires_grad_() for x in exact]
    ours = [x.detach().to(dtype).requires_grad_() for x in exact]
    tiny = {torch.float32: 1e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}[dtype] * max(1.0, scale)

    def run(tensors, backend):
        out = attention(*tensors, causal=True, backend=backend, **options)
        return out, torch.autograd.grad(out.to(torch.float64).square().sum(), tensors)

    want, want_grads = run(exact, "reference")
    plain, plain_grads = run(rough, "reference")
    got, got_grads = run(ours, "torch")
    compared = 0
    for mine, theirs, truth, factor in [
        (got, plain, want, 2),
        *((a, b, c, 3) for a, b, c in zip(got_grads, plain_grads, want_grads)),
    ]:
        limit = factor * (theirs.double() - truth).abs().nan_to_num(nan=math.inf).max() + tiny * (1 + truth.abs().max())
        error = (mine.double() - truth).abs().max()
        assert error <= limit, f"error {error:.2e}, the plain formula's bound is {limit:.2e}"
        assert mine.dtype == dtype
        compared += 1
    assert compared == 4


@pytest.mark.parametrize("name", MECHANISMS)
def test_padding_may_hold_anything_and_receives_no_gradient(name):
    _, attention, options = MECHANISMS[name]
    q, k, v = inputs((2, 2, 2, 9, 9, 4, 3))
    mask = torch.tensor([[True] * 6 + [False] * 3, [False] * 2 + [True] * 7])
    junk = torch.where(mask[:, None, :, None], 0.0, torch.nan)
    clean = attention(q, k, v, key_mask=mask, **options)
    dirty_k, dirty_v = (k + junk).detach().requires_grad_(), (v + junk).detach().requires_grad_()
    dirty = attention(q, dirty_k, dirty_v, key_mask=mask, **options)
    assert torch.equal(clean, dirty)
    for gradient in torch.autograd.grad(dirty.sum(), (dirty_k, dirty_v)):
        assert (gradient.transpose(1, 2)[~mask] == 0).all()
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_query_without_keys_gives_zero_and_no_gradient(name, causal):
    _, attention, options = MECHANISMS[name]
    q, k, v = inputs((2, 2, 2, 5, 5, 4, 3))
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3] = True
    out, mass = attention(q, k, v, key_mask=mask, causal=causal, return_mass=True, **options)
    assert (out[0] == 0).all()
    assert (mass[0] == -math.inf).all()
    for gradient in torch.autograd.grad(out.sum() + mass[torch.isfinite(mass)].sum(), (q, k, v)):
        assert torch.isfinite(gradient).all()
        assert (gradient[0] == 0).all()


def test_large_scores_do_not_overflow():
    q, k, v = (x.detach().float() * 30 for x in inputs((1, 2, 2, 40, 40, 8, 4)))
    for name, (_, attention, options) in MECHANISMS.items():
        out, mass = attention(q, k, v, causal=True, return_mass=True, **options)
        assert torch.isfinite(out).all(), name
        assert torch.isfinite(mass).all() or "relu" in name, name


def test_taylor_tracks_the_exponential_and_has_the_stated_width():
    from core.attention.feature_maps import feature_map

    phi = feature_map("taylor")
    assert phi.width(16) == 153
    q, k = torch.randn(50, 16, dtype=torch.float64), torch.randn(50, 16, dtype=torch.float64)
    s = (q * k).sum(-1) / 4
    got = (phi.features(q) * phi.features(k)).sum(-1)
    torch.testing.assert_close(got, 1 + s + s**2 / 2, rtol=1e-12, atol=1e-12)
    small = s.abs() < 0.3
    assert small.any()
    assert ((got - s.exp()).abs() / s.exp())[small].max() < 0.006  # the next term, 0.3^3 / 6


def test_bad_shapes_say_what_was_expected():
    q, k, v = (x.detach() for x in inputs((2, 4, 2, 6, 6, 4, 3)))
    with pytest.raises(ValueError, match=r"k must be \[2, heads dividing 4, length, 4\].*got \[2, 2, 6, 3\]"):
        softmax_attention(q, k[..., :3], v)
    with pytest.raises(ValueError, match=r"v must be \[2, 2, 6\]"):
        linear_attention(q, k, v[:, :, :5])
    with pytest.raises(ValueError, match="key_mask must be bool"):
        linear_attention(q, k, v, key_mask=torch.ones(2, 6))
    with pytest.raises(ValueError, match="window must be a whole number of at least 1"):
        sliding_window_attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="as many queries as keys"):
        sliding_window_attention(q[:, :, :3], k, v, window=2)
    with pytest.raises(ValueError, match=r"unknown feature map 'tailor' \(did you mean 'taylor'\?\)"):
        linear_attention(q, k, v, feature_map="tailor")
    with pytest.raises(ValueError, match="no mass without its normaliser"):
        linear_attention(q, k, v, normalize=False, return_mass=True)
    with pytest.raises(ValueError, match="signed"):
        hybrid_attention(q, k, v, window=2, feature_map="identity")
