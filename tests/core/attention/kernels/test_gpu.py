"""On a GPU, at sizes that fill it: the bound of the plain formula, the same bits twice, long sequences, CUDA graphs.

Our kernels, and flex-attention under the patterns of the sparse variants.
"""

from functools import partial

import pytest
import torch

from core.attention import Attention, hybrid_attention, linear_attention, sliding_window_attention
from core.attention.contract import Heads, Inputs
from core.attention.kernels import delta, gated, hybrid
from core.attention.positions import alibi_slopes
from core.attention.recurrence import reference
from core.attention.registry import build

pytestmark = pytest.mark.gpu

LENGTH = 1000


def image(q, k, v, *, name, backend, key_mask=None, slopes=None, window=5):
    """A 2-D variant on 31 rows, the tokens that do not fit standing before the grid; ALiBi has no meaning there."""
    variant = build(name, Heads(q.shape[1], k.shape[1], q.shape[3], v.shape[3]), window=window).bfloat16().to(q)
    return variant(q, k, v, key_mask=key_mask, backend=backend, inputs=Inputs(None, (31, q.shape[2] // 31))).out


MECHANISMS = {
    "elu": (linear_attention, {"causal": True}),
    "relu, both": (linear_attention, {"feature_map": "relu"}),
    "taylor": (linear_attention, {"causal": True, "feature_map": "taylor"}),
    "window": (sliding_window_attention, {"causal": True, "window": 100}),
    "window, both": (sliding_window_attention, {"window": 33}),
    "silu": (linear_attention, {"causal": True, "feature_map": "silu", "normalize": False}),
    "window2d": (partial(image, name="window2d"), {}),
    "hybrid": (hybrid_attention, {"causal": True, "window": 64}),
    "hybrid, both": (hybrid_attention, {"window": 64}),
    "hybrid2d": (partial(image, name="hybrid2d"), {}),
}


def sparse(q, k, v, *, name, backend, causal=True, key_mask=None, slopes=None, **options):
    """A sparse variant; its own weights and the layer's input are the same numbers in every dtype."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        variant = build(name, Heads(q.shape[1], k.shape[1], q.shape[3], v.shape[3], 32), **options).bfloat16().to(q)
        x = torch.randn(q.shape[0], q.shape[2], 32).bfloat16().to(q)
    given = {"slopes": slopes if "alibi" in variant.positions else None, "inputs": Inputs(x)}
    return variant(q, k, v, causal=causal, key_mask=key_mask, backend=backend, **given).out


PATTERNS = {
    "dilated": (partial(sparse, name="dilated"), {"window": 40, "dilation": 3}),
    "dilated, both": (partial(sparse, name="dilated"), {"window": 40, "dilation": 3, "causal": False}),
    "strided": (partial(sparse, name="strided"), {"stride": 90}),
    "fixed": (partial(sparse, name="fixed"), {"stride": 90}),
    "bigbird": (partial(sparse, name="bigbird"), {"block": 32}),
    "longformer": (partial(sparse, name="longformer"), {"window": 100, "global_tokens": 3}),
}
CASES = [(name, "triton") for name in MECHANISMS]
CASES += [(name, "flex") for name in ("window", "window, both", "window2d", *PATTERNS)]


def inputs(name, length, dtype, device, heads=8, kept=2, batch=2):
    width = 16 if name == "taylor" else 64
    generator = torch.Generator(device).manual_seed(0)
    sizes = (heads, width), (kept, width), (kept, 128)
    made = [torch.randn(batch, n, length, d, generator=generator, device=device, dtype=torch.float32) for n, d in sizes]
    return [x.to(dtype).requires_grad_() for x in made]


def results(name, backend, tensors, **extra):
    attention, options = {**MECHANISMS, **PATTERNS}[name]
    out = attention(*tensors, backend=backend, **options, **extra)
    return out, *torch.autograd.grad(out.to(torch.promote_types(out.dtype, torch.float32)).square().sum(), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("decayed", [False, True])
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_error_is_at_most_twice_that_of_the_plain_formula(name, backend, decayed, dtype, device):
    near = inputs(name, LENGTH, dtype, device)
    wide = [x.detach().double().requires_grad_() for x in near]
    mask = torch.rand(2, LENGTH, device=device) > 0.1
    mask[0, :5] = False  # causal, these queries see nothing
    extra = {"key_mask": mask, "slopes": alibi_slopes(8).to(device) if decayed else None}
    truth, plain = results(name, "reference", wide, **extra), results(name, "reference", near, **extra)
    got = results(name, backend, near, **extra)
    tiny = 1e-6 if dtype == torch.float32 else 1e-5
    for n, (mine, rough, exact) in enumerate(zip(got, plain, truth)):
        error, limit = ((x.double() - exact).abs().max().item() for x in (mine, rough))
        limit = (3 if n else 2) * limit + tiny * (1 + exact.abs().max().item())
        assert error <= limit, f"result {n}: error {error:.2e}, bound {limit:.2e}"


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_same_input_gives_the_same_bits(name, device):
    tensors = inputs(name, 8192, torch.bfloat16, device)
    first = results(name, "triton", tensors)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(results(name, "triton", tensors), first))


@pytest.mark.parametrize("name", ["elu", "relu, both", "window", "window2d"])
def test_more_numbers_than_32_bits_can_count(name, device):
    """Equal keys weigh alike, so the output is the mean of what is seen: 1 where only ones are, 0 where zeros are."""
    attention, options = MECHANISMS[name]
    length = (1 << 31) // (16 * 64) + 1000
    q = torch.ones(1, 16, length, 64, device=device, dtype=torch.bfloat16)
    v = torch.zeros_like(q)
    v[:, :, length // 2 :] = 1
    last = attention(q, q, v, backend="triton", **options)[:, :, -10:]
    want = torch.full_like(last, 1.0 if name.startswith("window") else 0.5)
    torch.testing.assert_close(last, want, rtol=1e-2, atol=1e-2)


def test_a_long_sequence_by_flex_keeps_no_square_tensor(device):
    """131,072 tokens: a mask of all pairs would take 16 GiB; every length after the second runs what is compiled."""
    for length in (1000, 3000, 131072):
        q = torch.ones(1, 2, length, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        out = sliding_window_attention(q, q, q, window=64, causal=True, backend="flex")
        out.sum().backward()
        torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-2, atol=1e-2)
    assert torch.cuda.max_memory_allocated() < 2**31


def test_runs_inside_a_cuda_graph(device):
    q, k, v = (x.detach() for x in inputs("hybrid", 512, torch.bfloat16, device))
    gates = [x.detach() for x in gated_inputs("delta", 512, torch.bfloat16, device)]
    recalled = delta.scan(*gates[:-1], state=gates[-1])[0]
    want = hybrid_attention(q, k, v, window=64, causal=True, backend="triton")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = hybrid_attention(q, k, v, window=64, causal=True, backend="triton")
        again = delta.scan(*gates[:-1], state=gates[-1])[0]
    graph.replay()
    assert torch.equal(got, want)
    assert torch.equal(again, recalled)


@pytest.mark.parametrize("name", ["hybrid", "window"])
def test_steps_replay_inside_a_cuda_graph(name, device):
    """A step reads positions and masks on the device: the graph that was recorded once serves every later token."""
    options = {"num_kv_heads": 2, "causal": True, "positions": "rope", "window": 64, "backend": "triton"}
    layer = Attention(512, 4, name, **options).to(device, torch.bfloat16)
    x = torch.randn(8, 200, 512, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        want = layer(x)
        _, state = layer.prefill(x[:, :190], layer.init_state(8))
        token, _ = x[:, 190].clone(), layer.step(x[:, 190], state)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, new = layer.step(token, state)
        for t in range(190, 200):
            token.copy_(x[:, t])
            graph.replay()
            torch.testing.assert_close(y, want[:, t], rtol=3e-2, atol=3e-2)
            for key, value in new.items():
                state[key].copy_(value)


def gated_inputs(kind, length, dtype, device, heads=4, kept=2, batch=2, width=64, values=128):
    """(q, k, v, gates..., first state) of a recurrence, with strong gates among mild ones."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    q, k = normal(batch, heads, length, width) * width**-0.5, normal(batch, kept, length, width)
    gate = normal(batch, kept, length, *((width,) if kind.startswith("vector") else ()))
    gates = [-torch.where(gate > 2, 30.0, 0.1) * gate.abs()]
    if kind.endswith("delta"):
        k = torch.nn.functional.normalize(k, dim=-1)
        gates.append(torch.sigmoid(normal(batch, kept, length)))
    halves = [x.to(dtype) for x in (q, k, normal(batch, kept, length, values))]
    return [x.requires_grad_() for x in (*halves, *gates, normal(batch, kept, width, values))]


def gated_results(run, tensors):
    *parts, state = tensors
    out, end = run(*parts, state=state)
    return out, end, *torch.autograd.grad(out.float().square().sum() + end.float().sum(), tensors)


SCANS = {"vector_decay": gated.scan, "delta": delta.scan, "vector_delta": delta.scan}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", SCANS)
def test_a_recurrence_equals_its_definition(kind, dtype, device):
    """Against the token loop in float64; bounds by the digits of the dtype, as sums of 300 rounded terms."""
    near = gated_inputs(kind, 300, dtype, device)
    wide = [x.detach().double().requires_grad_() for x in near]
    truth = gated_results(reference, wide)
    limit = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for n, (mine, exact) in enumerate(zip(gated_results(SCANS[kind], near), truth)):
        error = (mine.double() - exact).abs().max().item()
        assert error <= limit * (1 + exact.abs().max().item()), f"result {n}: error {error:.2e}"


@pytest.mark.parametrize("kind", SCANS)
def test_a_recurrence_gives_the_same_bits(kind, device):
    tensors = gated_inputs(kind, 8192, torch.bfloat16, device)
    first = gated_results(SCANS[kind], tensors)
    assert all(torch.isfinite(x).all() for x in first)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(gated_results(SCANS[kind], tensors), first))


WIDTHS = [(16, 16), (24, 40), (80, 64), (96, 160), (256, 256)]


@pytest.mark.parametrize(("width", "values"), WIDTHS)
@pytest.mark.parametrize("name", ["elu", "window", "window2d", "hybrid"])
def test_heads_of_any_width(name, width, values, device):
    sizes = (4, width), (2, width), (2, values)
    near = [torch.randn(1, n, 300, d, device=device).bfloat16().requires_grad_() for n, d in sizes]
    wide = [x.detach().double().requires_grad_() for x in near]
    plain, truth = results(name, "reference", near), results(name, "reference", wide)
    for n, (mine, rough, exact) in enumerate(zip(results(name, "triton", near), plain, truth)):
        error, limit = ((x.double() - exact).abs().max().item() for x in (mine, rough))
        assert error <= 3 * limit + 1e-5 * (1 + exact.abs().max().item()), f"result {n}: {error:.2e}, {limit:.2e}"


@pytest.mark.parametrize("name", ["elu", "window", "window2d", "hybrid", "hybrid2d"])
def test_compiles_into_one_graph_under_autocast(name, device):
    """float32 inputs, bfloat16 kernels: eager and compiled give the same, gradients float32."""
    attention, options = MECHANISMS[name]
    tensors = [x.detach().float().requires_grad_() for x in inputs(name, 500, torch.bfloat16, device)]

    def run(*tensors):
        with torch.autocast("cuda", torch.bfloat16):
            return attention(*tensors, backend="triton", **options)

    one = torch.compile(run, fullgraph=True, dynamic=True) if name not in ("window2d", "hybrid2d") else run
    got, want = one(*tensors), run(*tensors)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert all(d.dtype == torch.float32 for d in torch.autograd.grad(got.float().sum(), tensors))


@pytest.mark.parametrize("length", [129, 4096])
def test_one_hybrid_kernel_equals_two(length, device, monkeypatch):
    tensors = inputs("hybrid", length, torch.float32, device, batch=1)
    tensors = [x.detach()[..., :64].contiguous().requires_grad_() for x in tensors]
    one = results("hybrid", "triton", tensors)
    monkeypatch.setattr(hybrid, "prefers", lambda *_, **__: False)
    for n, (mine, other) in enumerate(zip(one, results("hybrid", "triton", tensors))):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4, msg=lambda text, n=n: f"result {n}: {text}")


@pytest.mark.parametrize("kind", ["vector_decay", "delta"])
def test_a_recurrence_longer_than_32_bits_can_count(kind, device):
    """Equal keys: without decay the state is the sum of all values, or under the delta rule the last of them."""
    length = (1 << 31) // (16 * 64) + 1000
    k = torch.full((1, 16, length, 64), 1 / 8, device=device, dtype=torch.bfloat16)
    v = torch.zeros_like(k)
    v[:, :, -100:] = 1
    g = torch.zeros((1, 16, length, *((64,) if kind == "vector_decay" else ())), device=device)
    beta = [] if kind == "vector_decay" else [torch.ones(1, 16, length, device=device)]
    with torch.no_grad():
        last = SCANS[kind](k, k, v, g, *beta)[0][:, :, -1]
    torch.testing.assert_close(last, torch.full_like(last, 1.0 if beta else 100.0), rtol=2e-2, atol=2e-2)
