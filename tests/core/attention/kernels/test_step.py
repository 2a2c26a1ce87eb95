"""A fused decoding step equals the sweep over the whole sequence, token by token."""

import pytest
import torch

from core.attention import linear_attention
from core.attention.blocked.linear import linear_forward
from core.attention.blocked.scan import scan
from core.attention.feature_maps import feature_map
from core.attention.kernels.step import decay_step, delta_step, is_step, linear_step


@pytest.mark.parametrize("phi", ["elu", "relu", "taylor"])
@pytest.mark.parametrize("case", ["plain", "masked", "decay"])
def test_equals_the_blocked_form(phi, case, dtype, device):
    heads, kept = (4, 4) if case == "decay" else (4, 2)
    q, k, v = (torch.randn(3, n, 1, d).to(device, dtype) for n, d in ((heads, 6), (kept, 6), (kept, 37)))
    state = torch.rand(3, kept, feature_map(phi).width(6), 38, device=device)
    mask = torch.tensor([[True], [False], [True]], device=device) if case == "masked" else None
    if mask is not None:
        k, v = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v))
    decay = torch.linspace(0.1, 0.6, heads, device=device) if case == "decay" else None
    count = torch.full((3,), 5.0, device=device)
    out, mass, end = linear_step(q, k, v, mask, decay, state, count, phi, True)
    cleaned = (x.nan_to_num().double() for x in (q, k, v))
    wide = (None if decay is None else decay.double(), state.double(), count.double())
    want = linear_forward(*cleaned, mask, *wide, phi, "past", 0, True)
    limit = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(out, want[0].to(dtype), **limit)
    torch.testing.assert_close(mass, want[1].float())
    torch.testing.assert_close(end, want[3].float())


@pytest.mark.parametrize("kind", ["decay", "vector_decay", "delta", "vector_delta"])
def test_a_gated_step_equals_the_scan(kind, device):
    q, k, v = (torch.randn(2, n, 1, d, device=device) for n, d in ((4, 6), (2, 6), (2, 37)))
    gates = [-torch.rand(2, 2, 1, *((6,) if "vector" in kind else ()), device=device)]
    if "delta" in kind:
        gates.append(torch.rand(2, 2, 1, device=device))
    state = torch.randn(2, 2, 6, 37, device=device)
    step = delta_step if "delta" in kind else decay_step
    for got, want in zip(step(q, k, v, *gates, state), scan(kind, q, k, v, *gates, state=state)):
        torch.testing.assert_close(got, want)


def test_decoding_by_steps_equals_the_whole(device):
    q, k, v = (torch.randn(1, 2, 6, n, device=device) for n in (4, 4, 3))
    options = {"causal": True, "backend": "triton", "feature_map": "relu"}
    whole, last = linear_attention(q, k, v, return_state=True, **options)
    out, state = linear_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], return_state=True, **options)
    outs = [out]
    for t in range(1, 6):
        one = (x[:, :, t : t + 1] for x in (q, k, v))
        out, state = linear_attention(*one, state=state, return_state=True, **options)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole)
    torch.testing.assert_close(state["sum"], last["sum"])


def test_a_gradient_is_never_lost_to_the_step(device):
    q = torch.randn(1, 1, 1, 2, device=device, requires_grad=True)
    state = torch.rand(1, 1, 2, 3, device=device)
    assert not is_step(q, q, q, state)
    with torch.no_grad():
        assert is_step(q, q, q, state)
    assert not is_step(q.detach(), q.detach(), q.detach(), None)
