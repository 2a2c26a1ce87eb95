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
