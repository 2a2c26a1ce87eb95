"""Every operator is registered in full: its shapes, its gradient, what it refuses; torch.library says so itself."""

import importlib
import pkgutil

import pytest
import torch

from core.attention import (
    blocked,
    hybrid_attention,
    kernels,
    linear_attention,
    sliding_window_attention,
    softmax_attention,
)

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own

TESTS = ("test_schema", "test_autograd_registration", "test_faketensor")


def operators():
    """name -> operator, of the blocked forms, of the kernels and of the random features."""
    packages = (blocked, kernels)
    names = [m.name for p in packages for m in pkgutil.iter_modules(p.__path__, p.__name__ + ".")]
    modules = (importlib.import_module(name) for name in (*names, "core.attention.random_features"))
    every = (x for module in modules for x in vars(module).values() if isinstance(x, torch.library.CustomOpDef))
    return {x._qualname.removeprefix("longspan::"): x for x in every}


def given(device):
    """name -> arguments, of every operator that is called from outside; backwards are reached through them."""
    torch.manual_seed(0)

    def made(*shape, grad=True):
        return torch.randn(shape, device=device).requires_grad_(grad)

    q, k, v = made(1, 2, 9, 4), made(1, 1, 9, 4), made(1, 1, 9, 3)
    mask, slopes = torch.ones(1, 9, dtype=torch.bool, device=device), torch.ones(2, device=device)
    plain = made(1, 2, 9, 4), made(1, 2, 9, 4), made(1, 2, 9, 3)
    g, gates = (-torch.rand(shape, device=device) for shape in ((1, 1, 9), (1, 1, 9, 4)))
    g, gates = g.requires_grad_(), gates.requires_grad_()
    beta, state = torch.rand(1, 1, 9, device=device).requires_grad_(), made(1, 1, 4, 3)
    one = [x.detach()[:, :, :1] for x in (q, k, v)]
    sums = torch.rand(1, 1, 4, 4, device=device)
    ring, at = (
        (made(1, 1, 3, 4, grad=False), made(1, 1, 3, 3, grad=False), mask[:, :3]),
        torch.tensor([5], device=device),
    )
    tail = *one[:2], None, made(2, grad=False), None, None, *ring, sums, torch.ones(1, device=device), at, at
    past = (None, None, None, None, "elu", "past", 0, True)
    grouped = [made(1, 1, 2, 9, 4), made(1, 1, 1, 9, 4), made(1, 1, 1, 9, 3)]
    a, c, values = made(1, 2, 12, 4), made(1, 2, 12, 4), made(1, 2, 12, 3)
    hard = (q, k, v, mask, None, None, torch.ones((), device=device), True, 0.5, True, True)
    return {
        "softmax_forward": (q, k, v, mask, None, slopes, True, 0.5),
        "window_forward": (q, k, v, mask, slopes, 3, True, 0.5),
        "window_top": (q.detach(), k.detach(), mask, 3, True, 0.5),
        "linear_forward": (q, k, v, *past),
        "additive_forward": (*plain[:2], made(2, 4), plain[2], mask, None, True),
        "hard_forward": hard,
        "pattern_forward": (q, k, v, mask, None, "dilated", 3, 2, True, 0.5),
        "scan_forward": ("delta", [*grouped, *(x[:, :, None, :, None] for x in (g, beta))], state[:, :, None], True),
        "memory_forward": (*grouped, made(1, 1, 1, 4, 4), 4, True, True),
        "tiles_near": (a, c, values, None, 3, 4, 2, 0.5),
        "tiles_outside": (a, c, values, 3, 4, 2),
        "favor_redraw": (made(1, 4, 4, grad=False), torch.tensor([0, 0, 0], device=device), 2),
        "linear_kernel_forward": (q, k, v, *past),
        "window_kernel_forward": (q, k, v, mask, slopes, 3, True, 0.5),
        "window2d_kernel_forward": (q, k, v, mask, 2, 4, 2, 0.5),
        "decay_kernel_forward": (q, k, v, g, state),
        "gated_kernel_forward": (q, k, v, gates, None),
        "delta_kernel_forward": (q, k, v, g, beta, state),
        "hybrid_kernel_forward": (
            q, k, v, None, None, None, None, mask, made(1, 2, 9), None, "elu", 3, True, 0.5, False,
        ),
        "linear_kernel_step": (*one, None, None, sums, None, "elu", True),
        "decay_kernel_step": (*one, g.detach()[:, :, :1], state.detach()),
        "hybrid_kernel_step": (*one, *tail, "elu", 0.5, 1e4, False, True),
        "window_kernel_step": (*one, None, None, *ring, 0.5),
        "delta_kernel_step": (*one, g.detach()[:, :, :1], beta.detach()[:, :, :1], state.detach()),
    }  # fmt: skip


ELSEWHERE = {"table_forward", "bucket_forward"}
"""Checked with the variants that make their tables: test_sparse, test_reformer."""


def test_every_operator_has_a_case(device):
    names = {name for name in operators() if "backward" not in name}
    assert names == set(given(device)) | ELSEWHERE


SLOW = {"delta_kernel_forward", "hybrid_kernel_forward", "gated_kernel_forward", "decay_kernel_forward"}
NAMES = sorted(given("cpu"))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NAMES])
def test_operator_is_what_it_says(name, device):
    torch.library.opcheck(operators()[name], given(device)[name], test_utils=TESTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_operator_traces_with_its_gradient(name, device):
    torch.library.opcheck(operators()[name], given(device)[name], test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", NAMES)
def test_what_an_operator_cannot_do_is_one_clear_line(name):
    """torch.vmap, and a second derivative where there is a first one; on meta tensors, for nothing has to run."""
    operator, words = operators()[name], given("cpu")[name]
    at = next(n for n, x in enumerate(words) if isinstance(x, torch.Tensor | list))
    first = words[at] if isinstance(words[at], torch.Tensor) else words[at][0]

    def mapped(x):
        x = x if isinstance(words[at], torch.Tensor) else [x, *words[at][1:]]
        return operator(*words[:at], x, *words[at + 1 :])

    with pytest.raises(NotImplementedError, match=f"longspan::{name} cannot run under torch.vmap"):
        torch.vmap(mapped)(first.detach().unsqueeze(0))


@pytest.mark.parametrize("name", ["softmax_forward", "linear_forward", "window_forward", "tiles_near", "scan_forward"])
def test_a_second_derivative_is_one_clear_line(name):
    operator, words = operators()[name], given("cpu")[name]
    first = next(x for part in words for x in (part if isinstance(part, list) else [part]) if torch.is_tensor(x))
    (slope,) = torch.autograd.grad(operator(*words)[0].square().sum(), first, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"longspan::{name} has no second derivative"):
        torch.autograd.grad(slope.sum(), first)


FUNCTIONS = {
    "softmax": softmax_attention,
    "window": lambda *x, **o: sliding_window_attention(*x, window=3, **o),
    "linear": linear_attention,
    "hybrid": lambda *x, **o: hybrid_attention(*x, window=3, **o),
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_gives_the_dtypes_of_torchs_own_attention(name, backend):
    q, k, v = (torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3))
    attend, options = FUNCTIONS[name], {"causal": True, "backend": backend}
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            out, mass = attend(q, k, v, return_mass=True, **options)
            double = attend(q.double(), k.double(), v.double(), **options)
        assert out.dtype == theirs.dtype == dtype
        if backend == "torch":  # the definition is written in plain products, which autocast narrows
            assert mass.dtype == torch.float32
            assert double.dtype == torch.float64
        (slope,) = torch.autograd.grad(out.float().square().sum(), q)
        assert slope.dtype == torch.float32
    if name in ("linear", "hybrid") and backend == "torch":
        with torch.autocast("cpu", torch.bfloat16):
            _, state = attend(q, k, v, return_state=True, **options)
        assert state["sum"].dtype == torch.float32


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_definition_can_do_what_operators_refuse(name):
    q, k, v = (torch.randn(2, 1, 2, 9, 4, requires_grad=True) for _ in range(3))

    def attend(*tensors):
        return FUNCTIONS[name](*tensors, causal=True, backend="reference")

    torch.testing.assert_close(torch.vmap(attend)(q, k, v)[1], attend(q[1], k[1], v[1]))
    (slope,) = torch.autograd.grad(attend(q[0], k[0], v[0]).square().sum(), q, create_graph=True)
    assert torch.isfinite(torch.autograd.grad(slope.sum(), q)[0]).all()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_compiles_into_one_graph(name, backend):
    def run(q, k, v):
        return FUNCTIONS[name](q, k, v, causal=True, backend="torch", return_mass=True)

    torch.compiler.reset()
    whole = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    for length in (9, 20):
        tensors = [torch.randn(1, 2, length, 4, requires_grad=True) for _ in range(3)]
        results = []
        for one in (whole, run):
            out, mass = one(*tensors)
            results.append((out, mass, *torch.autograd.grad(out.square().sum() + mass.sum(), tensors)))
        for got, want in zip(*results):
            torch.testing.assert_close(got, want)
