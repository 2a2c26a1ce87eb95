"""What has to pass before anything is timed: values and gradients, the same bits twice, compute-sanitizer."""

import shutil
import subprocess
import sys

import torch

from benchmarks.gpu.contenders import REFERENCES, RINGS, Contender, recurrence, ringed
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.timing import inputs, steps
from core.attention import linear_attention

NAMES = ("out", "dq", "dk", "dv")


def results(one, tensors) -> list[torch.Tensor]:
    """Output and gradients of the sum of its squares."""
    out = one(*tensors)
    wide = out.to(torch.promote_types(out.dtype, torch.float32))
    return [out.detach(), *torch.autograd.grad(wide.square().sum(), tensors)]


def fault(scale: Scale, one: Contender, width: int) -> str:
    """Why this contender may not be timed; "" if its output and gradients are right.

    The bound is twice the error of the plain formula in the same precision, or 2e-2 of the largest number (1e-4 dry).
    """
    near = inputs(scale, 2, scale.checked, width, tokens=scale.checked, grad=True)
    try:
        found = results(one, near)
    except Exception as error:  # a peer may fail in any way; that is a result, and is printed
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}" if str(error) else type(error).__name__
    if not one.exact:
        return ""
    wide = [x.detach().double().requires_grad_() for x in near]
    truth, rough = (results(REFERENCES[one.exact], x) for x in (wide, near))
    for name, got, exact, plain in zip(NAMES, found, truth, rough):
        error = (got.double() - exact).abs().max().item()
        share = (1e-4 if scale.dry else 2e-2) * exact.abs().max().item()
        allowed = max(2 * (plain.double() - exact).abs().max().item(), share)
        if not error <= allowed:
            return f"{name} is off by {error:.1e}, allowed {allowed:.1e}"
    return ""


def scatter(scale: Scale, one: Contender, width: int, times: int = 3) -> str:
    """Which result differs when the same input comes again, a race; "" if none does."""
    tensors = inputs(scale, 4, scale.repeated, width, tokens=scale.repeated, grad=True)
    first = results(one, tensors)
    for _ in range(1 if scale.dry else times):
        for name, a, b in zip(NAMES, first, results(one, tensors)):
            if not torch.equal(a, b):
                return f"{name} has other bits in another run"
    return ""


def step_faults(scale: Scale, heads: int, width: int, only: str = "") -> dict[str, str]:
    """Decoding steps after a context against the float64 sweep over all of it."""
    after = scale.contexts[0]
    q, k, v = (x.double() for x in inputs(scale, heads, after, width, tokens=after))
    found = {}
    with torch.no_grad():
        for group, run in steps(scale, heads, width, after, 1, only).items():
            if group == "softmax sdpa":
                continue
            again = [torch.cat((x, x[:, :, -1:]), 2) for x in (q, k, v)]
            if group == "linear":
                exact = linear_attention(*again, causal=True, backend="reference")
            elif group in RINGS:
                variant, rotary = ringed(group, q, torch.arange(after + 1, device=q.device))
                exact = variant(*again, causal=True, rotary=rotary, backend="reference").out
            else:
                exact = recurrence(*again, group=group, backend="reference")[0]
            exact, got = exact[:, :, -1:], run()[0]
            error, allowed = (got.double() - exact).abs().max().item(), 2e-2 * exact.abs().max().item()
            found[group] = "" if error <= allowed else f"out is off by {error:.1e}, allowed {allowed:.1e}"
    return found


def sanitize(only: str, limit_s: int = 240) -> list[str]:
    """What compute-sanitizer says of one launch of every kernel: of memory, and of races in shared memory."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return ["compute-sanitizer: not found, skipped (it comes with the CUDA toolkit)"]
    said = []
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "3", sys.executable, "-m", "benchmarks.gpu", "--once"]
        try:
            ran = subprocess.run([*command, "--only", only], capture_output=True, text=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            said.append(f"compute-sanitizer {kind}: stopped after {limit_s} s, nothing said")
            continue
        lines = [line for line in ran.stdout.splitlines() if line.startswith("=========")]
        said.append(f"compute-sanitizer {kind}: {'wrong' if ran.returncode else 'clean'}")
        said += lines[-12:] if ran.returncode else []
    return said
