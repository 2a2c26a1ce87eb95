"""Attention on a CPU (Linux): speed against torch's SDPA, scaling with the length, cost of a decoding step.

    python -m benchmarks.attention_cpu                    # everything, about 10 minutes on 2 cores
    python -m benchmarks.attention_cpu --only forward     # or backward, slope, memory, step, crossover
    python -m benchmarks.attention_cpu --out benchmarks/results/attention-cpu.json

Everything is a ratio measured in one run on one machine: batch 1, 8 heads of width 64, float32, torch's own number of
threads. A figure is the best of several rounds, the two sides of a ratio taking turns, so that a disturbance has to hit
every round to show. Before anything is timed, outputs and gradients are compared with the float64 reference; without
that there is no speed. The bars are the project's own, from its plan; `ok` says whether this run reaches them.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

from core.attention import (
    Attention,
    hybrid_attention,
    linear_attention,
    sliding_window_attention,
)
from core.attention.measurement import processor

HEADS, WIDTH, WINDOW = 8, 64, 64
VARIANTS = {
    "linear": lambda q, k, v, **o: linear_attention(q, k, v, **o),
    "window": lambda q, k, v, **o: sliding_window_attention(q, k, v, window=WINDOW, **o),
    "hybrid": lambda q, k, v, **o: hybrid_attention(q, k, v, window=WINDOW, **o),
}
FORWARD_BARS = {
    ("linear", False): 40,
    ("linear", True): 12,
    ("window", False): 12,
    ("window", True): 8,
    ("hybrid", False): 6,
    ("hybrid", True): 4,
}
SLOPE_BAR, STEP_BAR = 1.15, 1.2
LENGTHS = (4096, 8192, 16384, 32768)


def sdpa(q, k, v, causal=False):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def inputs(length: int, *, grad=False):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, length, WIDTH, generator=generator).requires_grad_(grad) for _ in range(3)]


def milliseconds(function) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def rounds(functions: dict, number: int) -> dict[str, float]:
    """Best time of each function in ms, taking turns; one unmeasured call each first."""
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for _ in range(number):
        for name, function in functions.items():
            times[name].append(milliseconds(function))
    return {name: min(values) for name, values in times.items()}


def check() -> None:
    """No speed without truth: float32 against the float64 reference, forward and backward, odd length."""
    for name, function in VARIANTS.items():
        for causal in (False, True):
            exact = [x.double().detach().requires_grad_() for x in inputs(331)]
            mine = [x.float().detach().requires_grad_() for x in exact]
            want = function(*exact, causal=causal, backend="reference")
            got = function(*mine, causal=causal)
            pairs = [(got, want)]
            pairs += zip(torch.autograd.grad(got.square().sum(), mine), torch.autograd.grad(want.square().sum(), exact))
            worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
            if worst > 1e-4:
                raise SystemExit(
                    f"{name} causal={causal} is off by {worst:.1e}: no speed is measured for wrong numbers"
                )


def forward(length=16384) -> list[dict]:
    q, k, v = inputs(length)
    rows = []
    for causal in (False, True):
        table = {name: lambda f=f, c=causal: f(q, k, v, causal=c) for name, f in VARIANTS.items()}
        with torch.no_grad():
            ours = rounds(table, 5)
            theirs = rounds({"sdpa": lambda c=causal: sdpa(q, k, v, c)}, 2)["sdpa"]
        for name, ms in ours.items():
            bar = FORWARD_BARS[name, causal]
            rows.append(row("forward", name, causal, theirs / ms, f">= {bar}", theirs / ms >= bar, length=length))
    return rows


def backward(length=4096) -> list[dict]:
    q, k, v = inputs(length, grad=True)

    def both(function, causal):
        torch.autograd.grad(function(q, k, v, causal=causal).sum(), (q, k, v))

    rows = []
    for causal in (False, True):
        table = {name: lambda f=f, c=causal: both(f, c) for name, f in {"sdpa": sdpa, **VARIANTS}.items()}
        times = rounds(table, 4)
        for name in VARIANTS:
            ratio = times["sdpa"] / times[name]
            rows.append(row("forward + backward", name, causal, ratio, ">= 1", ratio >= 1, length=length))
    return rows


def exponent(lengths, values) -> float:
    """Slope of a least-squares line through (log length, log value)."""
    x, y = [math.log(n) for n in lengths], [math.log(n) for n in values]
    mx, my = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def slope() -> list[dict]:
    rows = []
    for name, function in VARIANTS.items():
        for causal in (False, True):
            tensors = {n: inputs(n, grad=True) for n in LENGTHS}

            def both(n, causal=causal, function=function, tensors=tensors):
                torch.autograd.grad(function(*tensors[n], causal=causal).sum(), tensors[n])

            times = rounds({str(n): lambda n=n: both(n) for n in LENGTHS}, 3)
            found = exponent(LENGTHS, [times[str(n)] for n in LENGTHS])
            rows.append(row("time slope 4k..32k", name, causal, found, f"<= {SLOPE_BAR}", found <= SLOPE_BAR))
    return rows


MEMORY_PROGRAM = """
import sys
from importlib import import_module
def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
module, length, *given = sys.argv[1:]
work = import_module(module).work
work(64, *given)()  # libraries load before the zero is taken
run = work(int(length), *given)
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark falls to what is resident now (Linux)
before = kilobytes("VmRSS")
run()
print((kilobytes("VmHWM") - before) * 1024)
"""


def peak_bytes(module: str, length: int, *given: str) -> int:
    """Peak memory above the inputs of `module.work(length, *given)()`, in a process of its own."""
    command = [sys.executable, "-c", MEMORY_PROGRAM, module, str(length), *given]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def work(length: int, name: str, causal: str):
    """Forward and backward of a variant, its inputs made."""
    x = inputs(length, grad=True)
    return lambda: torch.autograd.grad(VARIANTS[name](*x, causal=causal == "1").sum(), x)


def memory() -> list[dict]:
    """Peak memory above the inputs, forward + backward, each length in a process of its own."""
    rows = []
    for name in VARIANTS:
        for causal in (False, True):
            peaks = [peak_bytes("benchmarks.attention_cpu", length, name, str(int(causal))) for length in LENGTHS]
            found = exponent(LENGTHS, peaks)
            extra = {"peak_bytes": dict(zip(map(str, LENGTHS), peaks))}
            rows.append(
                row("memory slope 4k..32k", name, causal, found, f"<= {SLOPE_BAR}", found <= SLOPE_BAR, **extra)
            )
    return rows


def step(early=1024, late=65536) -> list[dict]:
    """Time of one decoding step after 64k tokens over one after 1k."""
    rows = []
    for name in VARIANTS:
        options = {} if name == "linear" else {"window": WINDOW}
        layer = Attention(HEADS * WIDTH, HEADS, name, causal=True, **options).eval()
        states = {}
        with torch.no_grad():
            state = layer.init_state(1)
            for at in range(0, late, early):
                _, state = layer.prefill(torch.randn(1, early, HEADS * WIDTH), state)
                if at + early in (early, late):
                    states[at + early] = state
            x = torch.randn(1, HEADS * WIDTH)

            def steps(n, layer=layer, states=states, x=x):
                state = states[n]
                for _ in range(20):
                    _, state = layer.step(x, state)

            times = rounds({str(n): lambda n=n: steps(n) for n in (early, late)}, 15)
        ratio = times[str(late)] / times[str(early)]
        rows.append(row("step at 64k / at 1k", name, True, ratio, f"<= {STEP_BAR}", ratio <= STEP_BAR))
    return rows


def crossover() -> list[dict]:
    """Shortest measured length from which a variant is faster than SDPA, forward alone and with backward."""
    lengths = [64, 128, 256, 512, 1024, 2048, 4096]
    rows = []
    for causal in (False, True):
        for name, function in VARIANTS.items():
            for what in ("forward", "forward + backward"):
                wins = []
                for length in lengths:
                    x = inputs(length, grad=what != "forward")

                    def run(function, x=x, causal=causal, what=what):
                        out = function(*x, causal=causal)
                        if what != "forward":
                            torch.autograd.grad(out.sum(), x)

                    times = rounds({"sdpa": lambda: run(sdpa), name: lambda f=function: run(f)}, 5)
                    wins.append(times[name] <= times["sdpa"])
                losing = [n for n, won in zip(lengths, wins) if not won]
                after = [n for n in lengths if n > max(losing, default=0)]
                found = after[0] if after else math.inf
                rows.append(row(f"crossover with SDPA, {what}", name, causal, found, "tokens", None))
    return rows


def row(what, variant, causal, value, bar, ok, **extra) -> dict:
    entry = {
        "what": what,
        "variant": variant,
        "causal": causal,
        "value": round(value, 3),
        "bar": bar,
        "ok": ok,
        **extra,
    }
    verdict = "" if ok is None else ("ok" if ok else "BELOW THE BAR")
    kind = "causal" if causal else "two-sided"
    print(f"{what:36} {variant:12} {kind:10} {value:10.2f}   {bar:9} {verdict}", flush=True)
    return entry


PARTS = {f.__name__: f for f in (forward, backward, slope, memory, step, crossover)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts to run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--out", type=Path, help="write the rows and the environment here, as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    check()
    rows = [one for part in given.only for one in PARTS[part]()]
    finish(rows, given.out, heads=HEADS, width=WIDTH, window=WINDOW)


def finish(rows: list[dict], out: Path | None, **sizes) -> None:
    """Write rows and environment where asked to, and leave with status 1 if a figure is below its bar."""
    if out:
        machine = {"date": date.today().isoformat(), "torch": torch.__version__, "python": platform.python_version()}
        machine |= {"processor": processor(), "threads": torch.get_num_threads(), **sizes}
        out.write_text(json.dumps({"environment": machine, "rows": rows}, indent=1) + "\n")
    if any(one["ok"] is False for one in rows):
        raise SystemExit("some figures are below their bar")


if __name__ == "__main__":
    main()
