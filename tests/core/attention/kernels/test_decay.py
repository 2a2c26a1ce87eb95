"""The scan with a data-dependent decay against the blocked one in float64."""

import pytest
import torch

from core.attention import kernels
from core.attention.blocked import scan as blocked
from core.attention.contract import Heads, Inputs
from core.attention.kernels import decay as fused
from core.attention.registry import build
from core.attention.variants import mlstm

SHAPES = [((2, 2, 1, 20, 8, 5), 1.0, True), ((1, 2, 2, 70, 6, 5), 50.0, False), ((1, 1, 1, 1, 3, 2), 0.0, True)]


def run(shape, scale, stated, dtype, device, compare):
    b, h, kh, length, width, values = shape
    q, k, v = torch.randn(b, h, length, width), torch.randn(b, kh, length, width), torch.randn(b, kh, length, values)
    g = -scale * torch.rand(b, kh, length)
    state = torch.randn(b, kh, width, values) if stated else None
    compare(
        lambda q, k, v, g, state: fused.scan(q, k, v, g, state=state),
        lambda q, k, v, g, state: blocked.scan("decay", q, k, v, g, state=state),
        [q, k, v, g, state],
        dtype,
        device,
        {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype],
    )


@pytest.mark.parametrize(("shape", "scale", "stated"), SHAPES)
def test_equals_the_blocked_scan(shape, scale, stated, dtype, device, compare):
    run(shape, scale, stated, dtype, device, compare)


@pytest.mark.parametrize("dtype", kernels.DTYPES[1:])
def test_half_precision(dtype, device, compare):
    run(*SHAPES[0], dtype, device, compare)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own
def test_operator_is_what_it_says(device):
    q, k, v = (torch.randn(1, 2, 18, n, device=device, requires_grad=True) for n in (4, 4, 3))
    g = -torch.rand(1, 2, 18, device=device)
    torch.library.opcheck(fused.decay_forward, (q, k, v, g.requires_grad_(), None))


def mlstm_by_definition(q, k, v, write, forget):
    """Token by token without a stabiliser, which float64 does not need: e^60 and its inverse are far from its ends."""
    b, h, length, width = q.shape
    memory, weight = torch.zeros(b, k.shape[1], width, v.shape[3]).to(v), torch.zeros(b, k.shape[1], width).to(v)
    out = []
    for t in range(length):
        keep, put = forget[..., t].sigmoid()[..., None], write[..., t].exp()[..., None] * k[:, :, t]
        memory = keep[..., None] * memory + put[..., None] * v[:, :, t, None, :]
        weight = keep * weight + put
        ask = q[:, :, t] * width**-0.5
        read, mass = ((x.repeat_interleave(h // k.shape[1], 1)) for x in (memory, weight))
        mass = (ask * mass).sum(-1, keepdim=True).abs().clamp(min=1.0)
        out.append((ask[..., None] * read).sum(2) / mass)
    return torch.stack(out, 2)


@pytest.mark.parametrize("widest", [5.0, 60.0])
def test_serves_mlstm_exactly_at_any_gate(widest, device, monkeypatch):
    """Log input gates up to +-60 and forget gates down to e^-30: by rescaled keys and gates, no kernel of its own."""
    monkeypatch.setattr(mlstm, "CAP", 1e9)
    b, h, length = 1, 2, 40
    variant = build("mlstm", Heads(h, 1, 6, 5, 2), norm=False, gate=False).to(device)
    with torch.no_grad():  # the gates are the layer's inputs
        variant.gates.weight.copy_(torch.eye(2))
        variant.gates.bias.zero_()
    q, k, v = torch.randn(b, h, length, 6), torch.randn(b, 1, length, 6), torch.randn(b, 1, length, 5)
    steps = torch.tensor([-1.0, -0.1, 0.0, 0.3, 1.0])
    x = torch.stack((widest * steps[torch.randint(5, (b, length))], 30 * steps[torch.randint(5, (b, length))]), -1)
    results = []
    for exact in (True, False):
        given = [y.to("cpu" if exact else device, torch.float64 if exact else torch.float32) for y in (q, k, v, x)]
        given = [y.requires_grad_() for y in given]
        if exact:
            out = mlstm_by_definition(*given[:3], given[3][..., 0][:, None], given[3][..., 1][:, None])
        else:
            out = variant(*given[:3], causal=True, backend="triton", inputs=Inputs(given[3])).out
        results.append([y.double().cpu() for y in (out, *torch.autograd.grad(out.sin().sum(), given))])
    for n, (want, got) in enumerate(zip(*results)):
        assert (got - want).abs().max() <= 1e-4 * (1 + want.abs().max()), f"result {n}"
    rows = results[0][0].abs().amax(-1)
    assert ((results[1][0] - results[0][0]).abs().amax(-1) <= 1e-4 * rows + 1e-30).all(), "a row of small numbers"
