"""Kernels run under Triton's interpreter on a CPU, and on a GPU where there is one (pytest -m gpu)."""

import os

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from core.attention import kernels

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns while it is unset
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collection_modifyitems(items):
    for item in items:
        if "attention/kernels" in str(item.path) and DEVICE == "cuda":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fresh buffers hold NaN, so that a number which a kernel forgets to write is seen."""

    def poison(make):
        def made(*args, **options):
            x = make(*args, **options)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels, as they are launched."""
    names = []

    def noted(run, name):
        def launch(self, *args, **options):
            names.append(name(self))
            with _disable_current_modes():  # what the interpreter copies is no launch
                return run(self, *args, **options)

        return launch

    if kernels.INTERPRETED:
        from triton.runtime.interpreter import GridExecutor

        run = noted(GridExecutor.__call__, lambda self: self.fn.__name__)
        monkeypatch.setattr(GridExecutor, "__call__", run)
    else:
        from triton.runtime.jit import JITFunction

        monkeypatch.setattr(JITFunction, "run", noted(JITFunction.run, lambda self: self.__name__))
    return names


@pytest.fixture(scope="session")
def device():
    return DEVICE


@pytest.fixture(
    scope="session",
    params=[pytest.param(dtype, marks=[pytest.mark.slow] * (dtype != torch.float32)) for dtype in kernels.DTYPES],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def dtype(request):
    """All that kernels take; in the quick run float32, and float16 in a test of its own per kernel."""
    return request.param


def compare(fast, slow, tensors, dtype, device, tolerance=None):
    """Outputs and gradients of `fast` in `dtype` against those of `slow` in float64, both given the same numbers.

    fast, slow: from tensors (None where absent) to a tuple of outputs; -inf must stand in the same places. Where a
    bound is passed, `slow` is asked in `dtype`, too: near a denominator of 0 half precision is that far off for anyone.
    """
    tolerance = tolerance or {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    rounded = [None if x is None else x.to(dtype) for x in tensors]

    def outputs_and_gradients(function, kind, where):
        inputs = [None if x is None else x.detach().to(where, kind).requires_grad_() for x in rounded]
        outputs = function(*inputs)
        loss = 0.0
        for n, out in enumerate(outputs):
            direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
            finite = torch.where(torch.isfinite(out), out, 0.0)
            loss = loss + (finite.double() * direction.to(where)).sum()
        given = [x for x in inputs if x is not None]
        grads = torch.autograd.grad(loss, given, allow_unused=True)
        grads = [torch.zeros_like(x) if g is None else g for x, g in zip(given, grads)]
        return [x.detach().double().cpu() for x in (*outputs, *grads)]

    results = outputs_and_gradients(slow, torch.float64, "cpu"), outputs_and_gradients(fast, dtype, device)
    for n, (want, got) in enumerate(zip(*results)):
        assert torch.equal(torch.isneginf(want), torch.isneginf(got)), f"result {n}: -inf in other places"
        want, got = (torch.where(torch.isneginf(x), 0.0, x) for x in (want, got))
        error, limit = (got - want).abs().max() if want.numel() else 0.0, 0.0
        limit = tolerance * (1 + want.abs().max()) if want.numel() else 1.0
        if error > limit and dtype != torch.float32:
            other = outputs_and_gradients(slow, dtype, "cpu")[n]
            other = torch.where(torch.isneginf(other), 0.0, other)
            limit = max(limit, 1.5 * (other - want).abs().max())
        assert error <= limit, f"result {n}: error {error:.2e}, bound {limit:.2e}"


@pytest.fixture(scope="session", name="compare")
def _compare():
    return compare
