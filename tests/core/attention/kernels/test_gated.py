"""The scan with a decay per feature against the blocked one in float64."""

import pytest
import torch

from core.attention import kernels
from core.attention.blocked import scan as blocked
from core.attention.kernels import gated as fused

# (batch, heads, key heads, length, width, values), scale of the gates, whether a state comes before
SHAPES = {
    "grouped": ((2, 2, 1, 37, 8, 5), 1.0, True),
    "segments": ((1, 1, 1, 140, 5, 18), 0.2, True),
    "strong": ((1, 2, 2, 40, 6, 5), 50.0, False),
    "one": ((1, 1, 1, 1, 3, 2), 0.0, True),
}


def run(name, dtype, device, compare):
    (b, h, kh, length, width, values), scale, stated = SHAPES[name]
    q, k, v = torch.randn(b, h, length, width), torch.randn(b, kh, length, width), torch.randn(b, kh, length, values)
    g = -scale * torch.rand(b, kh, length, width)
    state = torch.randn(b, kh, width, values) if stated else None
    compare(
        lambda q, k, v, g, state: fused.scan(q, k, v, g, state=state),
        lambda q, k, v, g, state: blocked.scan("vector_decay", q, k, v, g, state=state),
        [q, k, v, g, state],
        dtype,
        device,
        {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype],
    )


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_blocked_scan(name, dtype, device, compare):
    run(name, dtype, device, compare)


@pytest.mark.parametrize("dtype", kernels.DTYPES[1:])
def test_half_precision(dtype, device, compare):
    run("strong", dtype, device, compare)


def test_any_strides_the_same_bits_and_no_overflow(device):
    """Gates of -50 over two chunks: e^{-b} would be e^3200."""

    def once(dense):
        torch.manual_seed(1)
        q, k, v, g = (torch.randn(1, 40, 2, n, device=device).transpose(1, 2) for n in (5, 5, 3, 5))
        k, v, g = k[:, :1].expand(-1, 2, -1, -1), v.mT.contiguous().mT, -50 * torch.sigmoid(g)
        tensors = [(x.contiguous() if dense else x).requires_grad_() for x in (q, k, v, g)]
        out, end = fused.scan(*tensors)
        return out, end, *torch.autograd.grad(out.square().sum() + end.sum(), tensors)

    for one, other in zip(once(True), once(False)):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own
def test_operator_is_what_it_says(device):
    q, k, v = (torch.randn(1, 2, 18, n, device=device, requires_grad=True) for n in (4, 4, 3))
    g = -torch.rand(1, 2, 18, 4, device=device)
    torch.library.opcheck(fused.gated_forward, (q, k, v, g.requires_grad_(), None))


def test_nothing_to_read_leaves_the_state(device):
    q, g = torch.randn(2, 1, 0, 4, device=device, requires_grad=True), torch.zeros(2, 1, 0, 4, device=device)
    state = torch.randn(2, 1, 4, 4, device=device, requires_grad=True)
    out, end = fused.scan(q, q, q, g, state=state)
    assert out.shape == q.shape
    assert torch.equal(end, state)
    assert torch.equal(torch.autograd.grad(end.sum(), state)[0], torch.ones_like(state))
