"""The delta rule by kernels against the blocked scan in float64: with no decay, one per head and one per feature."""

import pytest
import torch

from core.attention import kernels
from core.attention.blocked import scan as blocked
from core.attention.kernels import delta as fused

# (batch, heads, key heads, length, width, values), scale of the gates, whether a state comes before
SHAPES = {
    "grouped": ((2, 2, 1, 21, 6, 5), 1.0, True),
    "long": ((1, 1, 1, 70, 5, 18), 0.2, True),
    "strong": ((1, 2, 2, 20, 6, 5), 50.0, False),
    "one": ((1, 1, 1, 1, 3, 2), 0.0, True),
}


def run(kind, name, dtype, device, compare):
    (b, h, kh, length, width, values), scale, stated = SHAPES[name]
    q, k, v = torch.randn(b, h, length, width), torch.randn(b, kh, length, width), torch.randn(b, kh, length, values)
    k = torch.nn.functional.normalize(k, dim=-1)
    g = -scale * torch.rand(b, kh, length, *((width,) if kind == "vector_delta" else ()))
    beta = torch.rand(b, kh, length) * 1.9 * (torch.rand(b, kh, length) > 0.2)  # up to 2, and 0 as at a masked key
    state = torch.randn(b, kh, width, values) if stated else None
    compare(
        lambda q, k, v, g, beta, state: fused.scan(q, k, v, g, beta, state=state),
        lambda q, k, v, g, beta, state: blocked.scan(kind, q, k, v, g, beta, state=state),
        [q, k, v, g, beta, state],
        dtype,
        device,
        {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype],
    )


QUICK = {("delta", "grouped"), ("delta", "strong"), ("delta", "one"), ("vector_delta", "grouped")}
CASES = [
    pytest.param(kind, name, marks=[pytest.mark.slow] * ((kind, name) not in QUICK))
    for kind in ("delta", "vector_delta")
    for name in SHAPES
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_equals_the_blocked_scan(kind, name, dtype, device, compare):
    run(kind, name, dtype, device, compare)


@pytest.mark.parametrize("dtype", kernels.DTYPES[1:])
def test_half_precision(dtype, device, compare):
    run("delta", "strong", dtype, device, compare)


def test_a_key_that_is_written_again_and_again_keeps_its_last_value(device):
    """Equal keys and beta = 1: powers of the coupling reach 10^18 here, their sum is 1."""
    k = torch.ones(1, 1, 70, 4, device=device) / 2
    v = torch.randn(1, 1, 70, 3, device=device)
    g, beta = torch.zeros(1, 1, 70, device=device), torch.ones(1, 1, 70, device=device)
    torch.testing.assert_close(fused.scan(k, k, v, g, beta)[0], v)


def test_any_strides_and_the_same_bits(device):
    def once(dense):
        torch.manual_seed(1)
        q, k, v, g = (torch.randn(1, 20, 2, n, device=device).transpose(1, 2) for n in (5, 5, 3, 1))
        k, v, g = k[:, :1].expand(-1, 2, -1, -1), v.mT.contiguous().mT, -g[..., 0].square()
        tensors = [(x.contiguous() if dense else x).requires_grad_() for x in (q, k, v, g, torch.sigmoid(g.detach()))]
        out, end = fused.scan(*tensors)
        return out, end, *torch.autograd.grad(out.square().sum() + end.sum(), tensors)

    assert all(torch.equal(one, other) for one, other in zip(once(True), once(False)))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own
def test_operator_is_what_it_says(device):
    q, k, v = (torch.randn(1, 2, 18, n, device=device, requires_grad=True) for n in (4, 4, 3))
    g, beta = -torch.rand(1, 2, 18, device=device), torch.rand(1, 2, 18, device=device)
    torch.library.opcheck(fused.delta_forward, (q, k, v, g.requires_grad_(), beta.requires_grad_(), None))


def test_nothing_to_read_leaves_the_state(device):
    q, g = torch.randn(2, 1, 0, 4, device=device, requires_grad=True), torch.zeros(2, 1, 0, device=device)
    state = torch.randn(2, 1, 4, 4, device=device, requires_grad=True)
    out, end = fused.scan(q, q, q, g, g, state=state)
    assert out.shape == q.shape
    assert torch.equal(end, state)
    assert torch.equal(torch.autograd.grad(end.sum(), state)[0], torch.ones_like(state))
