"""The scan with a data-dependent decay against the blocked one in float64."""

import pytest
import torch

from core.attention import kernels
from core.attention.blocked import scan as blocked
from core.attention.kernels import decay as fused

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
