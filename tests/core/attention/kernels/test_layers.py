"""Layers that run on kernels read, learn and decode as they do on torch: padded, packed, in halves, compiled."""

import pytest
import torch

from core.attention import Attention
from core.attention.kernels import decay, delta, gated

VARIANTS = ["linear", "window", "hybrid", "retnet", "gla", "gated_delta", "mlstm"]
SLOW = ["kda", "lightning", "ssd", "rwkv6", "delta"]


@pytest.mark.parametrize("variant", [*VARIANTS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_layer_on_kernels_reads_learns_and_decodes_as_on_torch(variant, device):
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        layer = Attention(12, 2, variant, num_kv_heads=1, causal=True, backend=backend).to(device)
        x = torch.randn(2, 9, 12, device=device)
        y = layer(x)
        grads = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        with torch.no_grad():
            read, state = layer.prefill(x[:, :7], layer.init_state(2))
            steps = []
            for t in (7, 8):
                step, state = layer.step(x[:, t], state)
                steps.append(step)
        torch.testing.assert_close(torch.cat((read, torch.stack(steps, 1)), 1), y, rtol=1e-4, atol=1e-5)
        results.append((y, *grads))
    for got, want in zip(results[1], results[0]):
        torch.testing.assert_close(got, want, rtol=3e-4, atol=5e-5)  # gates' gradients are differences of large sums


@pytest.mark.parametrize("variant", ["rwkv6", "gated_delta", pytest.param("mlstm", marks=pytest.mark.slow)])
def test_a_half_precision_layer_gives_the_kernels_halves(variant, device, monkeypatch):
    layer = Attention(16, 2, variant, num_kv_heads=1, causal=True, backend="torch").to(device, torch.float16).eval()
    x, seen = torch.randn(2, 9, 16, device=device, dtype=torch.float16), []
    with torch.no_grad():
        want = layer(x)
        for module in (decay, delta, gated):
            whole = module.scan
            monkeypatch.setattr(module, "scan", lambda *a, whole=whole, **o: seen.append(a) or whole(*a, **o))
        layer.backend = "triton"
        torch.testing.assert_close(layer(x), want, rtol=1e-2, atol=1e-2)
        read, state = layer.prefill(x[:, :8], layer.init_state(2))
        step, _ = layer.step(x[:, 8], state)
        torch.testing.assert_close(torch.cat((read, step[:, None]), 1), want, rtol=1e-2, atol=1e-2)
    kinds = {tuple(str(part.dtype).removeprefix("torch.") for part in parts[:4]) for parts in seen}
    assert kinds == {("float16", "float16", "float16", "float32")}
    assert len(seen) == 3


@pytest.mark.parametrize("variant", ["gla", "gated_delta"])
def test_padding_and_packs_reach_the_kernels(variant, device):
    torch.manual_seed(0)
    x, mask = torch.randn(2, 20, 8, device=device), torch.arange(20, device=device) >= torch.tensor([[0], [7]])
    holed = torch.where(mask.to(device).unsqueeze(-1), x, torch.nan)
    pack, ends = x.reshape(1, 40, 8), torch.tensor([0, 3, 20, 40])
    layer = Attention(8, 2, variant, num_kv_heads=1, causal=True, backend="torch").to(device).eval()
    with torch.no_grad():
        want = layer(x, key_mask=mask.to(device)), layer(pack, cu_seqlens=ends)
        layer.backend = "triton"
        got = layer(holed, key_mask=mask.to(device)), layer(pack, cu_seqlens=ends)
    real = mask.to(device).unsqueeze(-1)
    torch.testing.assert_close(torch.where(real, got[0], 0.0), torch.where(real, want[0], 0.0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["hybrid", "gla", "gated_delta", "mlstm"])
def test_autocast_reaches_the_kernels(variant, device):
    layer = Attention(16, 2, variant, num_kv_heads=1, causal=True, backend="torch").to(device)
    x = torch.randn(2, 40, 16, device=device)
    grads = []
    for backend in ("torch", "triton"):
        layer.backend = backend
        with torch.autocast(x.device.type, torch.float16):
            y = layer(x)
        grads.append((y, *torch.autograd.grad(y.float().square().sum(), list(layer.parameters()))))
    for got, want in zip(grads[1], grads[0]):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * (1 + want.abs().max().item()))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gla", "gated_delta", "kda"])
def test_a_layer_compiles_into_one_graph_for_any_length(variant, device):
    layer = Attention(8, 2, variant, num_kv_heads=1, causal=True, backend="triton").to(device)
    whole = torch.compile(layer, fullgraph=True, dynamic=True)
    for length in (20, 37):
        x = torch.randn(1, length, 8, device=device)
        (got, *one), (want, *other) = (
            (y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))) for y in (whole(x), layer(x))
        )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        for a, b in zip(one, other):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
