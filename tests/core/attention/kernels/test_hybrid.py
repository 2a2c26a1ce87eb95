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


@pytest.mark.parametrize("variant", ["linear", "window", "hybrid", "retnet", "ssd"])
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
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


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
