"""Rows that lie more than 2^31 numbers apart, in memory that is reserved and never filled: offsets are 64 bits wide."""

import pytest
import torch

from core.attention.kernels import decay, delta, gated, hybrid, linear, window

LENGTH, APART = 20, 1 << 27


def by_linear(direction, q, k, v):
    return linear.linear_forward(q, k, v, None, None, None, None, "elu", direction, 0, True)[:2]


def by_window(q, k, v):
    return window.window_forward(q, k, v, None, None, 5, True, 0.5)


def by_hybrid(causal, q, k, v):
    gate = torch.zeros(1, device=q.device).expand(1, 1, LENGTH)
    return hybrid.hybrid_forward(q, k, v, *[None] * 5, gate, None, "elu", 3, causal, 0.5, False)[:2]


def by_scan(scan, vector, q, k, v):
    g = torch.full((1, 1, LENGTH, *((4,) if vector else ())), -0.1, device=q.device)
    return scan(q, k, v, g, *([torch.full((1, 1, LENGTH), 0.3, device=q.device)] if scan is delta.scan else []))


CALLS = {
    "linear past": lambda *x: by_linear("past", *x),
    "linear both": lambda *x: by_linear("both", *x),
    "window": by_window,
    "hybrid causal": lambda *x: by_hybrid(True, *x),
    "hybrid two-sided": lambda *x: by_hybrid(False, *x),
    "decay": lambda *x: by_scan(decay.scan, False, *x),
    "vector decay": lambda *x: by_scan(gated.scan, True, *x),
    "delta": lambda *x: by_scan(delta.scan, False, *x),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_rows_far_apart_give_the_same_bits(name, device):
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 3 * (LENGTH - 1) * APART:
        pytest.skip("needs 7 GiB of memory on the GPU")
    ground = torch.empty_strided(((LENGTH - 1) * APART + 64,), (1,), dtype=torch.float16, device=device)
    near, far = [], []
    for n in range(3):
        x = torch.randn(1, 1, LENGTH, 4, device=device).half()
        spread = ground.as_strided(x.shape, (0, 0, APART, 1), 16 * n)
        spread.copy_(x)
        near.append(x.requires_grad_())
        far.append(spread.detach().requires_grad_())
    results = []
    for tensors in (near, far):
        outputs = CALLS[name](*tensors)
        results.append((*outputs, *torch.autograd.grad(outputs[0].float().square().sum(), tensors)))
    assert all(torch.equal(one, other) for one, other in zip(*results))
