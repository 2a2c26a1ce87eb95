"""Corners that were wrong once, each with the case that showed it."""

import pickle

import pytest
import torch

from core.attention import (
    Attended,
    Attention,
    hybrid_attention,
    linear_attention,
    merge,
    sliding_window_attention,
    softmax_attention,
)
from core.attention.contract import Inputs
from core.attention.positions import Rotation
from core.attention.registry import available, register, variant_class
from core.attention.variants.linear import sums
from core.backbone import Decoder, Encoder
from core.layout import expand_layout


def r(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def test_asking_for_a_state_changes_nothing_with_more_keys_than_queries():
    q, k, v = r(1, 2, 4, 8), r(1, 2, 20, 8), r(1, 2, 20, 8)
    options = {"window": 4, "causal": True}
    want = hybrid_attention(q, k, v, **options)
    got, state = hybrid_attention(q, k, v, return_state=True, **options)
    torch.testing.assert_close(got, want)
    assert state["count"].tolist() == [16]


def test_more_queries_than_new_keys_after_a_state_is_an_error():
    q, k = r(1, 1, 3, 4), r(1, 1, 1, 4)
    _, state = linear_attention(k, k, k, causal=True, return_state=True)
    with pytest.raises(ValueError, match="where would the first 2 stand"):
        linear_attention(q, k, k, causal=True, state=state)
    with pytest.raises(ValueError, match="where would the first 2 stand"):
        hybrid_attention(q, k, k, window=2, causal=True, return_state=True)


def test_elu_features_keep_their_digits_far_below_zero():
    q, k, v = r(1, 2, 64, 16) - 20, r(1, 2, 64, 16), r(1, 2, 64, 4)
    weights = torch.exp(q.clamp(max=0)) @ (torch.where(k > 0, k + 1, k.exp())).transpose(-1, -2)
    want = weights @ v / weights.sum(-1, keepdim=True)
    got = linear_attention(q.float(), k.float(), v.float())
    assert (got - want).abs().max() < 1e-5


def test_rotated_elu_in_bfloat16_is_as_good_as_its_inputs():
    q, k, v = (r(1, 2, 64, 16) - 7).bfloat16(), r(1, 2, 64, 16).bfloat16(), r(1, 2, 64, 4).bfloat16()
    layer = Attention(32, 2, "linear", positions="rope")
    rotation = Rotation(torch.arange(64))
    got = layer.variant(q, k, v, rotary=(rotation, rotation)).out.double()
    want = layer.variant(q.double(), k.double(), v.double(), rotary=(rotation, rotation)).out
    assert (got - want).square().mean().sqrt() < 0.005 * want.square().mean().sqrt()


def test_rotating_by_nothing_keeps_the_floor():
    q, k, v = r(1, 1, 40, 4) * 1e-5, r(1, 1, 40, 4) * 1e-5, r(1, 1, 40, 4)
    still = Rotation(torch.zeros(40))
    phi = Attention(4, 1, "linear", feature_map="relu").variant.map
    for direction in ("both", "past"):
        plain, _ = sums(q, k, v, phi, direction, 0)
        turned, _ = sums(q, k, v, phi, direction, 0, rotary=(still, still))
        torch.testing.assert_close(turned.out, plain.out, rtol=1e-6, atol=0)


def test_signed_maps_are_not_divided():
    q = r(1, 1, 5, 4)
    with pytest.raises(ValueError, match="use normalize=False"):
        linear_attention(q, q, q, feature_map="identity")
    want = (q @ q.transpose(-1, -2)).tril() @ q
    torch.testing.assert_close(linear_attention(q, q, q, feature_map="identity", normalize=False, causal=True), want)


def test_slopes_are_constants_one_per_head():
    q = r(1, 2, 5, 4)
    functions = [softmax_attention, linear_attention, lambda *x, **y: sliding_window_attention(*x, window=2, **y)]
    for function in [*functions, lambda *x, **y: hybrid_attention(*x, window=2, **y)]:
        with pytest.raises(ValueError, match=r"slopes must be \[2\] constants, one per head, got \[1\]"):
            function(q, q, q, slopes=torch.ones(1))
        with pytest.raises(ValueError, match="require a gradient"):
            function(q, q, q, slopes=torch.ones(2, requires_grad=True))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.006), (torch.float16, 0.001)])
def test_the_gradient_of_a_mass_survives_half_precision(dtype, limit):
    exact = [(r(1, 2, 300, 4) * 4).to(dtype).double() for _ in range(2)]
    masses = [r(1, 2, 300) for _ in range(2)]

    def gradients(kind):
        leaves = [mass.to(torch.float32 if kind == dtype else kind).requires_grad_() for mass in masses]
        merged = merge(*(Attended(out.to(kind), mass) for out, mass in zip(exact, leaves)))
        return torch.autograd.grad((merged.out * 2e4 / 300).sum(), leaves)

    for got, want in zip(gradients(dtype), gradients(torch.float64)):
        assert torch.isfinite(got).all()
        assert (got - want).abs().max() < limit * want.abs().max()


@pytest.mark.parametrize("name", ["softmax", "window", "linear", "hybrid"])
def test_nothing_in_nothing_out(name):
    layer = Attention(16, 2, name, causal=True, positions="rope")
    assert layer(torch.zeros(2, 0, 16)).shape == (2, 0, 16)
    assert layer(torch.zeros(0, 3, 16)).shape == (0, 3, 16)
    assert layer(torch.zeros(1, 0, 16), cu_seqlens=torch.tensor([0, 0])).shape == (1, 0, 16)
    y, state = layer.prefill(torch.zeros(2, 0, 16), layer.init_state(2))
    assert y.shape == (2, 0, 16)
    assert layer.prefill(torch.zeros(2, 3, 16), state)[0].shape == (2, 3, 16)
    nothing = torch.zeros(1, 2, 0, 8, requires_grad=True)
    if name in ("window", "hybrid"):
        function = sliding_window_attention if name == "window" else hybrid_attention
        out, mass = function(torch.zeros(1, 2, 3, 8), nothing, nothing, window=2, causal=True, return_mass=True)
        assert (out == 0).all()
        assert (mass == -torch.inf).all()
        out.sum().backward()


def test_longformer_and_convolutions_of_nothing():
    for layer in (Attention(16, 2, "longformer"), Attention(16, 2, "linear", causal=True, short_conv=4)):
        assert layer(torch.zeros(2, 0, 16)).shape == (2, 0, 16)
    encoder = Encoder(16, 1, 2, {"variant": "softmax"}, causal=True, positions="learned", max_length=8)
    assert encoder.prefill(torch.zeros(0, 3, 16), encoder.init_state(0))[0].shape == (0, 3, 16)


@pytest.mark.parametrize("name", [name for name in available() if "bidirectional" in variant_class(name).can])
def test_what_is_masked_reaches_no_output_and_no_gradient(name):
    """By the mechanism itself: the projections of a layer read padding as queries too."""
    torch.manual_seed(0)
    layer = Attention(16, 2, name).eval()  # hard attention draws anew in training
    mask = torch.tensor([[True, True, True, False, False, False], [False] * 6])

    def run(rubbish):
        given = [torch.randn(2, 2, 6, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        inputs = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(3))
        for one in given[1:]:
            one.masked_fill_(~mask[:, None, :, None], rubbish)
        leaves = [one.requires_grad_() for one in given]
        out = layer.variant(*leaves, key_mask=mask, inputs=Inputs(inputs)).out
        wanted = [*leaves, *(one for one in layer.variant.parameters() if one.requires_grad)]
        return out, torch.autograd.grad(out[0, :, :3].sum(), wanted, allow_unused=True)

    (clean, wants), (got, grads) = run(0.0), run(torch.nan)
    torch.testing.assert_close(got[0, :, :3], clean[0, :, :3])
    assert (got[1] == 0).all(), "a query that sees no key gives 0"
    for mine, theirs in zip(grads, wants):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["softmax", "linear"])
def test_rubbish_in_a_masked_context_reaches_no_weight(name):
    layer, mask = Attention(16, 2, name), torch.tensor([[True, True, False]])
    x, context = torch.randn(1, 4, 16), torch.randn(1, 3, 16)
    rubbish = context.masked_fill(~mask.unsqueeze(-1), torch.nan)

    def gradients(context):
        y = layer(x, context, key_mask=mask) + layer.recall(x, layer.remember(context, key_mask=mask))
        return torch.autograd.grad(y.sum(), list(layer.parameters()))

    for mine, theirs in zip(gradients(rubbish), gradients(context)):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, at its first dual number
@pytest.mark.parametrize("name", ["softmax", "window", "linear", "hybrid", "gla"])
def test_forward_mode_is_right_or_refused(name):
    torch.manual_seed(0)
    layer = Attention(8, 2, name, causal=True, backend="torch").double()
    x, along = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative: backend='reference' has one"):
        torch.func.jvp(layer, (x,), (along,))
    layer.backend = "reference"
    _, got = torch.func.jvp(layer, (x,), (along,))
    want = (layer(x + 1e-6 * along) - layer(x - 1e-6 * along)) / 2e-6
    torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", ["softmax", "linear", "window"])
def test_functional_gradients_by_the_reference(name):
    layer = Attention(8, 2, name, causal=True, backend="reference").double()
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    got = torch.func.grad(lambda x: layer(x).sin().sum())(x)
    (want,) = torch.autograd.grad(layer(x).sin().sum(), x)
    torch.testing.assert_close(got, want)


def test_a_bias_that_hides_every_key_gives_zero_everywhere():
    q = torch.randn(1, 2, 3, 4)
    bias = torch.zeros(1, 1, 3, 3)
    bias[0, 0, 1] = -torch.inf
    outs = [softmax_attention(q, q, q, bias=bias, backend=backend) for backend in ("reference", "torch", "sdpa")]
    for out in outs:
        assert (out[:, :, 1] == 0).all()
        torch.testing.assert_close(out, outs[0])


@pytest.mark.parametrize("name", ["softmax", "window", "linear", "hybrid"])
def test_layers_can_be_pickled(name):
    layer = Attention(16, 2, name)
    again = pickle.loads(pickle.dumps(layer))
    x = torch.randn(1, 9, 16)
    assert torch.equal(again(x), layer(x))


def test_learned_positions_count_the_longest_sequence_not_the_pack():
    encoder = Encoder(16, 1, 2, {"variant": "softmax"}, positions="learned", max_length=8)
    x = torch.randn(1, 12, 16)
    got = encoder(x, cu_seqlens=torch.tensor([0, 4, 8, 12]))
    torch.testing.assert_close(got[:, 8:], encoder(x[:, 8:]))
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[:, 7:] = True
    torch.testing.assert_close(encoder(x, key_mask=mask)[:, 7:], encoder(x[:, 7:]))


def test_opcheck_of_every_operation():
    from core.attention.blocked.linear import linear_forward
    from core.attention.blocked.softmax import softmax_forward
    from core.attention.blocked.window import window_forward

    def leaves():
        return [torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3)]

    mask, slopes = torch.ones(1, 9, dtype=torch.bool), torch.ones(2)
    state = torch.rand(1, 2, 5, 4).transpose(-1, -2).requires_grad_()
    calls = [
        (softmax_forward, (*leaves(), mask, None, slopes, True, 0.5)),
        (softmax_forward, (*leaves(), None, torch.randn(1, 1, 9, 9, requires_grad=True), None, False, 0.5)),
        (window_forward, (*leaves(), mask, slopes, 3, True, 0.5)),
        (linear_forward, (*leaves(), mask, slopes, None, None, "elu", "past", -2, True)),
        (linear_forward, (*leaves(), None, None, state, torch.ones(1), "relu", "past", 0, True)),
        (linear_forward, (*leaves(), None, None, None, None, "taylor", "both", 0, True)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(
            op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )


def test_what_would_be_ignored_is_refused():
    q = r(1, 2, 4, 4)
    for backend in ("auto", "torch"):
        with pytest.raises(ValueError, match=r"bias must broadcast to the scores \[1, 2, 4, 4\]"):
            softmax_attention(q, q, q, bias=r(9, 11), backend=backend)
    x = torch.zeros(1, 5, 16)
    with pytest.raises(ValueError, match="coordinates belong to rotary positions"):
        Attention(16, 2)(x, coordinates=torch.zeros(5))
    with pytest.raises(ValueError, match=r"coordinates must be \[5, 2\] or \[1, 5, 2\], got \[5\]"):
        Attention(16, 2, positions="rope2d")(x, coordinates=torch.zeros(5))
    with pytest.raises(ValueError, match="head widths divisible by 2, got 3"):
        Attention(12, 4, positions="rope")
    with pytest.raises(ValueError, match="head widths divisible by 2, got 5"):
        Attention(32, 4, "linear", positions="rope", feature_dim=5)
    layer = Attention(16, 2, causal=True)
    with pytest.raises(ValueError, match="a step takes one token"):
        layer.step(x, layer.init_state(1))
    decoder = Decoder(16, 1, 2, {"variant": "softmax"}, num_kv_heads=1, qk_norm=True)
    assert decoder.blocks[0].cross.num_kv_heads == 1
    assert decoder.blocks[0].cross.query_norm is not None


def test_letters_take_their_meaning_and_add_options():
    assert expand_layout({"l": {"feature_map": "relu"}}, "l", 1) == [{"variant": "linear", "feature_map": "relu"}]


def test_a_shipped_name_cannot_be_taken():
    with pytest.raises(ValueError, match=r"'hybrid' is already registered by core\.attention\.variants\.hybrid"):
        register("hybrid", summary="", source="")(type("Mine", (), {"__module__": "elsewhere"}))


def test_float64_states_cost_what_they_hold():
    from core.attention.contract import state_bytes

    for name in ("linear", "hybrid"):
        layer = Attention(16, 2, name, causal=True).double()
        assert layer.cost(1, 10).state_bytes == state_bytes(layer.init_state(1))


def test_an_explicit_backend_reaches_every_part(monkeypatch):
    from core.attention import backends, set_backend

    monkeypatch.setattr(backends, "_forced", {})
    q = r(1, 2, 9, 4)
    want = hybrid_attention(q, q, q, window=2, backend="torch")
    set_backend("reference")
    assert torch.equal(hybrid_attention(q, q, q, window=2, backend="torch"), want)
    with pytest.raises(ValueError, match="backend 'reference' of hybrid attention does not serve state; torch does"):
        hybrid_attention(q, q, q, window=2, causal=True, return_state=True, backend="reference")
