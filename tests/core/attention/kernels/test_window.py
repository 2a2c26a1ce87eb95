"""The window kernel against the blocked implementation in float64."""

import itertools

import pytest
import torch

from core.attention import kernels, sliding_window_attention
from core.attention.blocked import window as blocked
from core.attention.kernels import window as fused
from core.attention.positions import alibi_slopes

# batch, heads, key heads, queries, keys, width, values, window
SHAPES = {
    "grouped": (2, 4, 2, 37, 37, 8, 5, 9),
    "wide": (1, 2, 2, 50, 50, 17, 20, 40),
    "all": (1, 1, 1, 20, 20, 4, 4, 99),
    "self": (1, 2, 1, 18, 18, 4, 3, 1),
    "context": (1, 2, 1, 5, 45, 6, 4, 20),
    "empty rows": (1, 2, 2, 45, 10, 6, 4, 4),
    "one": (1, 1, 1, 1, 1, 1, 1, 1),
    "no keys": (1, 1, 1, 3, 0, 2, 2, 2),
}


def run(name, causal, masked, alibi, dtype, device, compare):
    b, h, kh, length, keys, width, values, window = SHAPES[name]
    q, k, v = torch.randn(b, h, length, width), torch.randn(b, kh, keys, width), torch.randn(b, kh, keys, values)
    mask = torch.rand(b, keys) > 0.3 if masked else None
    slopes = alibi_slopes(h) if alibi else None

    def call(forward, where, q, k, v):
        extra = [None if x is None else x.to(where) for x in (mask, slopes)]
        return forward(q, k, v, *extra, window, causal, 0.7)

    compare(
        lambda *x: call(fused.window_forward, device, *x),
        lambda *x: call(blocked.window_forward, "cpu", *x),
        [q, k, v],
        dtype,
        device,
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(name, causal, dtype, device, compare):
    if not causal and SHAPES[name][3] != SHAPES[name][4]:
        causal = True
    run(name, causal, True, True, dtype, device, compare)


@pytest.mark.parametrize("dtype", kernels.DTYPES[1:])
def test_half_precision(dtype, device, compare):
    run("grouped", True, True, True, dtype, device, compare)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_everything_together(name, dtype, device, compare):
    for causal, masked, alibi in itertools.product((False, True), repeat=3):
        if causal or SHAPES[name][3] == SHAPES[name][4]:
            run(name, causal, masked, alibi, dtype, device, compare)


def test_padding_may_hold_nan_and_inputs_any_strides(device):
    q, k, v = (torch.randn(2, 40, 3, n, device=device).transpose(1, 2) for n in (8, 8, 6))
    k, v = k[:, :1].expand(-1, 3, -1, -1), v.mT.contiguous().mT
    mask = torch.rand(2, 40, device=device) > 0.4
    hole = torch.where(mask[:, None, :, None], 0.0, torch.nan)
    options = {"window": 7, "key_mask": mask, "return_mass": True}
    want = sliding_window_attention(q, k, v, backend="torch", **options)
    torch.testing.assert_close(sliding_window_attention(q, k + hole, v + hole, backend="triton", **options), want)


def test_the_same_input_gives_the_same_bits(device):
    def once():
        torch.manual_seed(1)
        q, k, v = (torch.randn(1, 2, 50, n, device=device, requires_grad=True) for n in (8, 8, 6))
        out = sliding_window_attention(q, k, v, window=20, backend="triton")
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own
def test_operator_is_what_it_says(device):
    q, k, v = (torch.randn(1, 2, 18, n, device=device, requires_grad=True) for n in (4, 4, 3))
    torch.library.opcheck(fused.window_forward, (q, k, v, None, None, 5, True, 0.5))
