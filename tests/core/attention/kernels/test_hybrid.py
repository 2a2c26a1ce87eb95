"""The hybrid by two kernels and a merge against the blocked form in float64, and layers that run on kernels."""

import pytest
import torch

from core.attention import Attention, hybrid_attention
from core.attention.positions import alibi_slopes


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


VARIANTS = ["linear", "window", "hybrid", "retnet", "gla", "gated_delta", "kda", "mlstm"]
SLOW = ["lightning", "ssd", "rwkv6", "delta"]


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
