"""The hybrid by one kernel, and by two and a merge, against the blocked form and the definition in float64."""

import pytest
import torch

from core.attention import Attention, hybrid_attention, kernels
from core.attention.feature_maps import FEATURE_MAPS
from core.attention.kernels import hybrid as fused
from core.attention.positions import Rotation, alibi_slopes
from core.attention.variants import hybrid

# batch, heads, key heads, queries, keys, width, width of the tail or None, values, window, map
SHAPES = {
    "grouped": (2, 2, 1, 37, 37, 6, None, 5, 7, "elu"),
    "segments": (1, 1, 1, 100, 100, 5, None, 18, 20, "elu"),
    "own tail": (1, 2, 1, 40, 40, 17, 6, 5, 3, "elu"),
    "taylor": (1, 2, 1, 70, 70, 8, 3, 5, 6, "taylor"),
    "taylor, same": (1, 1, 1, 40, 40, 4, None, 3, 5, "taylor"),
    "no tail": (1, 1, 1, 18, 18, 4, None, 3, 30, "elu"),
    "own keys alone": (1, 2, 2, 35, 35, 4, None, 17, 1, "elu"),
    "one": (1, 1, 1, 1, 1, 1, None, 1, 1, "elu"),
    "no keys": (1, 1, 1, 3, 0, 2, None, 2, 2, "elu"),
    "context": (1, 1, 1, 18, 50, 4, None, 3, 9, "elu"),
    "long context": (1, 1, 1, 5, 150, 4, None, 3, 9, "elu"),
    "empty rows": (1, 1, 1, 40, 20, 4, None, 3, 4, "elu"),
}
QUICK = {("grouped", False), ("segments", True), ("taylor", False), ("one", True), ("no keys", True), ("context", True)}
CASES = [
    pytest.param(name, causal, marks=[pytest.mark.slow] * ((name, causal) not in QUICK))
    for name, shape in SHAPES.items()
    for causal in (True, False)
    if causal or shape[3] == shape[4]
]


def run(name, causal, dtype, device, compare, rotary=False):
    b, h, kh, length, keys, width, narrow, values, window, phi = SHAPES[name]
    q, k, v = torch.randn(b, h, length, width), torch.randn(b, kh, keys, width), torch.randn(b, kh, keys, values)
    tails = (torch.randn(b, h, length, narrow), torch.randn(b, kh, keys, narrow)) if narrow else (None, None)
    mask = torch.rand(b, keys) > 0.3
    turns = [torch.arange(keys - length, keys), torch.arange(keys)]

    def by(backend, where, q, k, v, tail_q, tail_k, gate):
        tails = (q, k) if tail_q is None else (tail_q, tail_k)
        options = {"causal": causal, "key_mask": mask.to(where), "slopes": None, "scale": 0.7, "backend": backend}
        options["rotary"] = tuple(Rotation(at.to(where)) for at in turns) if rotary else None
        return tuple(hybrid.attend(q, k, v, *tails, window=window, phi=FEATURE_MAPS[phi], gate=gate, **options))

    compare(
        lambda *x: by("triton", device, *x),
        lambda *x: by("torch", "cpu", *x),
        [q, k, v, *tails, torch.randn(h)],
        dtype,
        device,
    )


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_one_kernel_equals_the_blocked_form(name, causal, dtype, device, compare):
    run(name, causal, dtype, device, compare)


@pytest.mark.parametrize(
    ("name", "causal"),
    [("taylor, same", False), *(pytest.param("grouped", one, marks=pytest.mark.slow) for one in (True, False))],
)
def test_rotary_positions(name, causal, dtype, device, compare):
    run(name, causal, dtype, device, compare, rotary=True)


def test_rotated_features_leave_the_normaliser_alone(device, compare):
    b, h, length, width = 1, 2, 40, 4
    q, k, v = (torch.randn(b, h, length, n) for n in (width, width, 3))
    x, y = torch.randn(b, h, length, width), torch.randn(b, h, length, width)

    def one(q, k, v, x, y, gate):
        return fused.hybrid_forward(q, k, v, None, None, x, y, None, gate, None, "elu", 5, True, 0.5, False)[:2]

    def dense(q, k, v, x, y, gate):
        behind = torch.arange(length)[:, None] - torch.arange(length)
        near = torch.exp(0.5 * q @ k.mT) * ((behind >= 0) & (behind < 5))
        far = gate.exp().unsqueeze(-1) * (behind >= 5)
        phi = [FEATURE_MAPS["elu"].features(x) for x in (q, k)]
        mass = near.sum(-1) + (far * (phi[0] @ phi[1].mT)).sum(-1)
        return (near + far * (x @ y.mT)) @ v / mass.unsqueeze(-1), mass.log()

    compare(one, dense, [q, k, v, x, y, torch.randn(b, h, length)], torch.float32, device)


@pytest.mark.parametrize("dtype", kernels.DTYPES[1:])
def test_half_precision(dtype, device, compare):
    run("own tail", True, dtype, device, compare)


def test_continues_from_a_state_and_leaves_one(device, compare):
    """The first of two halves gives the second what it would have seen; gradients pass through the state."""
    (b, h, kh, window), cut, length = (1, 2, 1, 4), 38, 75
    q, k, v = torch.randn(b, h, length, 5), torch.randn(b, kh, length, 5), torch.randn(b, kh, length, 3)

    def one(q, k, v, gate):
        weight, rest = gate[None, :, None].expand(b, h, length), ("elu", window, True, 0.5, True)
        early, late = slice(0, cut), slice(cut - window, None)
        none = None, None, None, None, None
        first, mass, state = fused.hybrid_forward(
            q[:, :, early], k[:, :, early], v[:, :, early], *none, weight[:, :, early], None, *rest
        )
        second, more, end = fused.hybrid_forward(
            q[:, :, cut:], k[:, :, late], v[:, :, late], *none, weight[:, :, cut:], state, *rest
        )
        return torch.cat((first, second), 2), torch.cat((mass, more), 2), end

    def whole(q, k, v, gate):
        options = {"causal": True, "gate": gate, "scale": 0.5, "backend": "torch"}
        attended = hybrid_attention(q, k, v, window=window, return_mass=True, **options)
        phi = FEATURE_MAPS["elu"].features(k[:, :, : length - window])
        ones = torch.cat((v, torch.ones_like(v[..., :1])), -1)[:, :, : length - window]
        return *attended, phi.mT @ ones

    compare(one, whole, [q, k, v, torch.randn(h)], torch.float32, device)


def test_one_kernel_runs_where_the_rule_says_so(device, monkeypatch):
    calls = []
    original = fused.hybrid_forward
    monkeypatch.setattr(fused, "hybrid_forward", lambda *x: calls.append(1) or original(*x))
    q = torch.randn(1, 1, 20, 6, device=device)

    def used(x=q, **options):
        calls.clear()
        got, want = (hybrid_attention(x, x, x, window=4, backend=name, **options) for name in ("triton", "torch"))
        torch.testing.assert_close(got, want)
        return bool(calls)

    assert used(causal=True)
    assert used()
    assert not used(causal=True, feature_map="relu")
    assert not used(causal=True, slopes=alibi_slopes(1).to(device))
    assert not used(torch.randn(1, 1, 4, 129, device=device), causal=True)


OTHER_MAPS = (("hedgehog", None), ("favor", None), ("taylor", "rope"))


@pytest.mark.parametrize(
    ("feature_map", "positions"), [("elu", "rope"), *(pytest.param(*x, marks=pytest.mark.slow) for x in OTHER_MAPS)]
)
def test_a_layer_trains_and_decodes_by_one_kernel(feature_map, positions, device, monkeypatch):
    calls, original = [], fused.hybrid_forward
    monkeypatch.setattr(fused, "hybrid_forward", lambda *x: calls.append(x) or original(*x))
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        options = {"window": 3, "feature_map": feature_map, "positions": positions, "num_kv_heads": 1}
        layer = Attention(8, 2, "hybrid", causal=True, backend=backend, **options).to(device)
        x = torch.randn(2, 13, 8, device=device)
        mask = torch.arange(13, device=device) >= torch.tensor([[0], [4]], device=device)
        y = torch.where(mask.unsqueeze(-1), layer(x, key_mask=mask), 0.0)
        grads = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        with torch.no_grad():
            read, state = layer.prefill(x[:, :6], layer.init_state(2))
            more, state = layer.prefill(x[:, 6:12], state)
            step, _ = layer.step(x[:, 12], state)
            whole = torch.cat((read, more, step[:, None]), 1)
            torch.testing.assert_close(whole, layer(x), rtol=1e-4, atol=1e-5)
        results.append((y, *grads))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=3e-4, atol=5e-5)
    assert len(calls) == 4


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_operator_is_what_it_says(whole, device):
    q, k, v, a, c, x, y = (torch.randn(1, 2, 18, n, device=device, requires_grad=True) for n in (4, 4, 3, 2, 2, 2, 2))
    given = (a, c, x, y) if whole else (None, None, None, None)
    gate = torch.randn(1, 2, 18, device=device, requires_grad=True)
    state = torch.rand(1, 2, 2, 4, device=device, requires_grad=True) if whole else None
    torch.library.opcheck(fused.hybrid_forward, (q, k, v, *given, None, gate, state, "elu", 5, True, 0.5, whole))


@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_kernel_takes_any_strides_and_gives_the_same_bits(causal, device):
    mask = torch.rand(2, 40, device=device) > 0.4

    def once(dense):
        torch.manual_seed(1)
        q, k, v = (torch.randn(2, 40, 2, n, device=device).transpose(1, 2) for n in (6, 6, 5))
        k, v = k[:, :1].expand(-1, 2, -1, -1), v.mT.contiguous().mT
        k, v = (torch.where(mask[:, None, :, None], x, torch.nan) if dense else x for x in (k, v))
        tensors = [x.detach().requires_grad_() for x in (q, k, v)]
        given = *[None] * 4, mask, torch.zeros(1, device=device).expand(2, 2, 40), None, "elu", 5, causal, 0.5, causal
        out, mass, end = fused.hybrid_forward(*tensors, *given)
        return out, mass, end, *torch.autograd.grad(out.square().sum(), tensors)

    assert all(torch.equal(one, other) for one, other in zip(once(True), once(False)))


@pytest.mark.parametrize(("causal", "phi"), [(True, "taylor"), (False, "elu"), (False, "relu")])
def test_two_kernels_and_a_merge_equal_the_blocked_form(causal, phi, dtype, device, compare):
    q, k, v = torch.randn(1, 2, 37, 4), torch.randn(1, 2, 37, 4), torch.randn(1, 2, 37, 5)
    mask = torch.rand(1, 37) > 0.2

    def call(backend, where, q, k, v, gate):
        options = {"key_mask": mask.to(where), "slopes": alibi_slopes(2).to(where), "backend": backend}
        return tuple(
            hybrid_attention(q, k, v, window=5, feature_map=phi, gate=gate, causal=causal, return_mass=True, **options)
        )

    compare(
        lambda *x: call("triton", device, *x),
        lambda *x: call("torch", "cpu", *x),
        [q, k, v, torch.randn(2)],
        dtype,
        device,
    )


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_compiles_into_one_graph_for_any_length(causal, device):
    def attend(q, k, v):
        return hybrid_attention(q, k, v, window=5, causal=causal, return_mass=True, backend="triton")

    whole = torch.compile(attend, fullgraph=True, dynamic=True)
    for length in (20, 37):
        q, k, v = (torch.randn(1, 2, length, n, device=device, requires_grad=True) for n in (4, 4, 3))
        got, want = whole(q, k, v), attend(q, k, v)
        for one, other in zip(got, want):
            torch.testing.assert_close(one, other)
        both = (torch.autograd.grad(x[0].square().sum() + x[1].sum(), (q, k, v)) for x in (got, want))
        for one, other in zip(*both):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
