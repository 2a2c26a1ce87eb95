"""The linear kernels against the blocked implementation in float64: every direction, map, state, mask and decay."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from core.attention import Attention, explain_backend, kernels, linear_attention
from core.attention.blocked import linear as blocked
from core.attention.contract import Heads
from core.attention.feature_maps import FEATURE_MAPS
from core.attention.kernels import linear as fused
from core.attention.kernels.features import MAPS as PLAIN
from core.attention.kernels.launch import segments
from core.attention.learned_maps import Focused

# (batch, heads, key heads, queries, keys, width, values), direction, offset
SPANS = {
    "square": ((2, 2, 1, 37, 37, 8, 5), "past", 0),
    "segments": ((1, 2, 2, 70, 70, 6, 20), "past", 0),
    "delayed": ((1, 2, 2, 25, 25, 6, 5), "past", -7),
    "context": ((1, 2, 2, 20, 50, 6, 5), "past", 30),
    "more queries": ((1, 1, 1, 50, 20, 6, 5), "past", -30),
    "nothing": ((1, 2, 2, 6, 6, 6, 2), "past", -6),
    "future": ((1, 2, 2, 70, 70, 6, 5), "future", 5),
    "all": ((1, 4, 2, 33, 70, 8, 5), "both", 0),
    "one": ((1, 1, 1, 1, 1, 1, 1), "past", 0),
    "no keys": ((1, 2, 2, 5, 0, 6, 3), "both", 0),
    "no queries": ((1, 2, 2, 0, 9, 6, 3), "both", 0),
    "only mass": ((1, 2, 2, 9, 9, 6, 0), "past", 0),
}
WIDE = [
    ("square", {"mask", "state"}),
    ("segments", {"decay", "state"}),
    ("all", {"mask", "state"}),
    ("future", {"decay"}),
]


def run(span, phi, options, normalize, dtype, device, compare):
    (b, h, kh, length, keys, width, values), direction, offset = SPANS[span]
    h = kh if "decay" in options else h
    q, k, v = torch.randn(b, h, length, width), torch.randn(b, kh, keys, width), torch.randn(b, kh, keys, values)
    state = torch.rand(b, kh, FEATURE_MAPS[phi].width(width), values + 1) if "state" in options else None
    if state is not None and phi == "taylor":
        state[:, :, 0] += 100  # the constant feature; a state that no keys have made may have a negative denominator
    mask = torch.rand(b, keys) > 0.3 if "mask" in options else None
    decay = torch.linspace(0.05, 0.7, h) if "decay" in options else None
    count = torch.full((b,), 3.0) if "state" in options else None

    def call(forward, where, q, k, v, state):
        extra = [None if x is None else x.to(where) for x in (mask, decay)]
        seen = None if count is None else count.to(where, torch.promote_types(torch.float32, q.dtype))
        out, mass, _, end = forward(q, k, v, *extra, state, seen, phi, direction, offset, normalize)
        return (out, mass, end) if normalize else (out, end)

    compare(
        lambda *x: call(fused.linear_forward, device, *x),
        lambda *x: call(blocked.linear_forward, "cpu", *x),
        [q, k, v, state],
        dtype,
        device,
    )


@pytest.mark.parametrize("span", SPANS)
def test_every_span(span, dtype, device, compare):
    run(span, "elu", {"state"}, True, dtype, device, compare)


@pytest.mark.parametrize("dtype", kernels.DTYPES[1:])
@pytest.mark.parametrize(("span", "options"), [("square", {"mask", "state"}), ("all", {"mask"})])
def test_half_precision(span, options, dtype, device, compare):
    run(span, "elu", options, True, dtype, device, compare)


@pytest.mark.parametrize("phi", PLAIN)
def test_every_map(phi, device, compare):
    run(
        "square",
        phi,
        {"mask"},
        FEATURE_MAPS[phi].positive and not phi.startswith("given"),
        torch.float32,
        device,
        compare,
    )


@pytest.mark.parametrize("span", ["square", pytest.param("all", marks=pytest.mark.slow)])
def test_the_map_focused_and_the_gradient_at_its_scale(span, compare, device):
    (b, h, kh, length, keys, width, values), direction, offset = SPANS[span]
    q, k, v = torch.randn(b, h, length, width), torch.randn(b, kh, keys, width), torch.randn(b, kh, keys, values)
    q[0, 0, 3] = -1.0  # a row of which nothing is left but the smallest numbers
    scale, mask = torch.randn(1, kh, 1, width), torch.rand(b, keys) > 0.3
    phi = Focused(Heads(h, kh, width, values), width)

    def slow(q, k, v, scale):
        features = phi._one(q, scale[0].repeat_interleave(h // kh, 0)), phi._one(k, scale[0])
        given = (*features, v, mask, None, None, None, "given_floored", direction, offset, True)
        return blocked.linear_forward(*given)[:2]

    def fast(q, k, v, scale):
        factor = 1 / torch.nn.functional.softplus(scale[0, :, 0].float())
        given = (q, k, v, mask.to(device), None, None, None, "focused", direction, offset, True, factor)
        return fused.linear_forward(*given)[:2]

    compare(fast, slow, [q, k, v, scale], torch.float32, device)


def test_a_layer_computes_focused_in_the_kernel_and_steps_by_its_features(device, monkeypatch):
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        options = {"feature_map": "focused", "num_kv_heads": 1, "positions": "alibi", "backend": backend}
        layer = Attention(12, 2, "linear", causal=True, **options).to(device)
        x = torch.randn(2, 9, 12, device=device)
        with torch.no_grad():
            read, state = layer.prefill(x[:, :8], layer.init_state(2))
            step, _ = layer.step(x[:, 8], state)
        if backend == "triton":
            monkeypatch.setattr(Focused, "_features", None)
        y = layer(x)
        torch.testing.assert_close(torch.cat((read, step[:, None]), 1), y, rtol=1e-4, atol=1e-5)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))))
    for got, want in zip(*results):
        # Gradients at keys are differences of large numbers: both backends are as far from float64.
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * (1 + want.abs().max().item()))


@pytest.mark.parametrize(("span", "options"), WIDE)
def test_masks_states_and_decay(span, options, device, compare):
    run(span, "relu" if "mask" in options else "elu", options, True, torch.float32, device, compare)


def test_taylor_features_of_width_16(device, compare):
    SPANS["taylor"] = (1, 1, 1, 35, 35, 16, 20), "past", 0
    run("taylor", "taylor", {"state"}, True, torch.float32, device, compare)


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("phi", ["elu", "relu", "taylor", "silu"])
def test_everything_together(span, phi, normalize, dtype, device, compare):
    if phi == "silu" and normalize:
        return
    for mask, decay, state in itertools.product((False, True), repeat=3):
        (_, h, kh, *_), direction, _ = SPANS[span]
        if decay and (direction == "both" or h != kh):
            continue
        names = {name for name, on in (("mask", mask), ("decay", decay), ("state", state)) if on}
        run(span, phi, names, normalize, dtype, device, compare)


def test_padding_may_hold_nan_and_inputs_any_strides(device):
    q, k, v = (torch.randn(2, 40, 3, n, device=device).transpose(1, 2) for n in (8, 8, 6))
    k, v = k[:, :1].expand(-1, 3, -1, -1), v.mT.contiguous().mT
    mask = torch.rand(2, 40, device=device) > 0.4
    hole = torch.where(mask[:, None, :, None], 0.0, torch.nan)
    options = {"causal": True, "key_mask": mask, "feature_map": "relu"}
    want = linear_attention(q, k, v, backend="torch", **options)
    torch.testing.assert_close(linear_attention(q, k + hole, v + hole, backend="triton", **options), want)


def test_the_same_input_gives_the_same_bits(device):
    def once():
        torch.manual_seed(1)
        q, k, v = (torch.randn(1, 1, 66, n, device=device, requires_grad=True) for n in (8, 8, 20))
        out = linear_attention(q, k, v, causal=True, backend="triton")
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


def test_other_maps_and_rotation_go_through_the_kernel(device):
    q, k, v = (torch.randn(1, 2, 20, 6, device=device) for _ in range(3))
    for name in ("cosine", "dpfp"):
        want = linear_attention(q, k, v, feature_map=name, causal=True, backend="torch")
        torch.testing.assert_close(linear_attention(q, k, v, feature_map=name, causal=True, backend="triton"), want)


def test_too_wide_features_are_left_to_torch(device):
    q = torch.randn(1, 1, 4, 257, device=device)
    with pytest.raises(ValueError, match="does not serve wide features; reference, torch does"):
        linear_attention(q, q, q, backend="triton")


def test_the_choice_lists_the_kernel():
    text = explain_backend("linear", device="cuda", dtype=torch.float32)
    assert "triton: serves" in text
    assert "torch: serves  <- runs" in text, "no kernel is chosen before a GPU has confirmed it"
    assert "triton: does not serve float64" in explain_backend("linear", device="cuda", dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own
def test_operators_are_what_they_say(device):
    q, k, v = (torch.randn(1, 2, 18, n, device=device, requires_grad=True) for n in (4, 4, 3))
    arguments = (q, k, v, None, None, None, None, "elu", "past", 0, True)
    torch.library.opcheck(fused.linear_forward, arguments)


def test_many_segments_are_cut_whole():
    pieces = SimpleNamespace(**dict(zip(("parts", "size"), segments(1000, 16, 1, torch.device("cpu")))))
    assert pieces.size % 16 == 0
    assert (pieces.parts - 1) * pieces.size < 1000 <= pieces.parts * pieces.size
