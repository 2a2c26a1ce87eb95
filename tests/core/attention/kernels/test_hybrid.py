"""The hybrid by one kernel, and by two and a merge, against the blocked form in float64."""

import pytest
import torch

from core.attention import hybrid_attention, kernels
from core.attention.feature_maps import FEATURE_MAPS
from core.attention.kernels import hybrid as fused
from core.attention.positions import alibi_slopes
from core.attention.variants import hybrid

# batch, heads, key heads, queries, keys, width, width of the tail or None, values, window
SHAPES = {
    "grouped": (2, 2, 1, 37, 37, 6, None, 5, 7),
    "segments": (1, 1, 1, 140, 140, 5, None, 18, 20),
    "own tail": (1, 2, 1, 40, 40, 17, 6, 5, 3),
    "context": (1, 1, 1, 18, 50, 4, None, 3, 9),
    "long context": (1, 1, 1, 5, 150, 4, None, 3, 9),
    "empty rows": (1, 1, 1, 40, 20, 4, None, 3, 4),
    "no tail": (1, 1, 1, 18, 18, 4, None, 3, 30),
    "one": (1, 1, 1, 1, 1, 1, None, 1, 1),
    "no keys": (1, 1, 1, 3, 0, 2, None, 2, 2),
}
QUICK = {"grouped", "own tail", "context", "one", "no keys"}


def run(name, phi, dtype, device, compare):
    b, h, kh, length, keys, width, narrow, values, window = SHAPES[name]
    q, k, v = torch.randn(b, h, length, width), torch.randn(b, kh, keys, width), torch.randn(b, kh, keys, values)
    tails = (torch.randn(b, h, length, narrow), torch.randn(b, kh, keys, narrow)) if narrow else (None, None)
    tails = [x if x is None or phi != "given" else x.exp() for x in tails]
    mask = torch.rand(b, keys) > 0.3

    def two(q, k, v, tail_q, tail_k, gate):
        tails = (q, k) if tail_q is None else (tail_q, tail_k)
        options = {"causal": True, "key_mask": mask, "slopes": None, "scale": 0.7, "backend": "torch"}
        return tuple(hybrid.attend(q, k, v, *tails, window=window, phi=FEATURE_MAPS[phi], gate=gate, **options))

    def one(q, k, v, tail_q, tail_k, gate):
        return fused.hybrid_forward(q, k, v, tail_q, tail_k, mask.to(device), gate, phi, window, 0.7)

    compare(one, two, [q, k, v, *tails, torch.randn(h)], dtype, device)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in SHAPES])
def test_one_kernel_equals_the_blocked_form(name, dtype, device, compare):
    run(name, "elu", dtype, device, compare)


@pytest.mark.parametrize("dtype", kernels.DTYPES[1:])
def test_half_precision(dtype, device, compare):
    run("own tail", "given", dtype, device, compare)


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
    assert not used()
    assert not used(causal=True, feature_map="relu")
    assert not used(causal=True, slopes=alibi_slopes(1).to(device))
    assert not used(torch.randn(1, 1, 4, 65, device=device), causal=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own
@pytest.mark.parametrize("narrow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_operator_is_what_it_says(narrow, device):
    q, k, v, a, c = (torch.randn(1, 2, 18, n, device=device, requires_grad=True) for n in (4, 4, 3, 2, 2))
    tails = (a, c) if narrow else (None, None)
    gate = torch.randn(2, device=device, requires_grad=True)
    torch.library.opcheck(fused.hybrid_forward, (q, k, v, *tails, None, gate, "elu", 5, 0.5))


def test_one_kernel_takes_any_strides_and_gives_the_same_bits(device):
    mask = torch.rand(2, 30, device=device) > 0.4

    def once(dense):
        torch.manual_seed(1)
        q, k, v = (torch.randn(2, 30, 2, n, device=device).transpose(1, 2) for n in (6, 6, 5))
        k, v = k[:, :1].expand(-1, 2, -1, -1), v.mT.contiguous().mT
        k, v = (torch.where(mask[:, None, :, None], x, torch.nan) if dense else x for x in (k, v))
        tensors = [x.detach().requires_grad_() for x in (q, k, v)]
        out, mass = fused.hybrid_forward(*tensors, None, None, mask, torch.zeros(2, device=device), "elu", 5, 0.5)
        return out, mass, *torch.autograd.grad(out.square().sum(), tensors)

    assert all(torch.equal(one, other) for one, other in zip(once(True), once(False)))


@pytest.mark.parametrize(("causal", "phi"), [(True, "elu"), (True, "taylor"), (False, "elu"), (False, "relu")])
def test_equals_the_blocked_form(causal, phi, dtype, device, compare):
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
