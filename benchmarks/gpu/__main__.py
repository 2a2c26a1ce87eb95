"""Attention on a GPU: checked, then timed against peers and against the hardware's own limits.

    python -m benchmarks.gpu                        # everything, under 10 minutes
    python -m benchmarks.gpu --only linear          # groups whose name contains the word
    python -m benchmarks.gpu --check                # correctness alone

At batch x length = 65,536 tokens in bfloat16, H x D = 32 x 128 and 16 x 64, lengths 512 to 131,072 (then more tokens):
time forward and forward + backward, peak memory, and the ratio to the roofline, which is the larger of bytes over the
measured copy bandwidth and FLOPs over the measured matmul rate. A contender is timed only if its output equals the
float64 reference on a short sequence within twice the error of the plain formula in bfloat16, or 2e-2 of the largest
output. Median of 5 times about 50 ms, all contenders of a length in one run. Decoding is timed per token.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from datetime import date
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.contenders import REFERENCES, SPARSE, Contender, ours, pairs, peers, recurrence
from core.attention import linear_attention

TOKENS = 65536
LENGTHS = (512, 2048, 4096, 8192, 16384, 65536, 131072)
HEADS = ((32, 128), (16, 64))
CHUNK = 64
RESULTS = Path(__file__).resolve().parents[1] / "results"


def inputs(heads: int, length: int, width: int, *, tokens: int = TOKENS, grad: bool = False):
    generator = torch.Generator("cuda").manual_seed(0)
    shape = max(1, tokens // length), heads, length, width
    made = [torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    made[1] *= width**-0.5  # keeps un-normalised sums in a sane range; peers get the same numbers
    return [x.requires_grad_(grad) for x in made]


def timed(run, budget_ms: float = 50.0) -> float:
    """Median milliseconds of one call."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()

    def span(calls: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / calls

    calls = max(1, int(budget_ms / max(1e-3, span(1))))
    return statistics.median(span(calls) for _ in range(5))


def limits() -> dict[str, float]:
    """Measured copy bandwidth in bytes per second and bfloat16 matmul rate in FLOPs per second."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    copy, product = timed(lambda: target.copy_(source)), timed(lambda: a @ a)
    return {"bytes_per_s": 2e3 * source.numel() / copy, "flops_per_s": 2e3 * 8192**3 / product}


def roofline_ms(group: str, heads: int, length: int, width: int, both: bool, limit: dict[str, float]) -> float:
    """Least time of the group's mechanism: inputs and outputs moved once, FLOPs of the chunked or banded form."""
    rows = max(1, TOKENS // length) * length * heads
    flops = 4 * pairs(group, length) * width
    if group not in ("softmax", "window", *SPARSE):
        chunked = 4 * width * width + (0 if group == "linear both" else 4 * CHUNK * width)
        flops += chunked * (2 if group.endswith("delta") else 1)  # finding what is written costs as much as reading
    moved = 2 * 4 * width
    if both:
        flops, moved = 3.5 * flops, moved + 2 * 8 * width
    return 1e3 * rows * max(flops / limit["flops_per_s"], moved / limit["bytes_per_s"])


def fault(one: Contender, width: int) -> str:
    """Why this contender may not be timed; "" if its output and gradients are right."""
    q, k, v = inputs(2, 384, width, tokens=384, grad=True)
    try:
        out = one(q, k, v)
        grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    except Exception as error:  # a peer may fail in any way; that is a result, and is printed
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}" if str(error) else type(error).__name__
    if not one.exact:
        return ""
    wide, near = [x.detach().double().requires_grad_() for x in (q, k, v)], [q, k, v]
    results = []
    for tensors in (wide, near):
        plain = REFERENCES[one.exact](*tensors)
        cast = plain.double() if tensors is wide else plain.float()
        results.append([plain, *torch.autograd.grad(cast.square().sum(), tensors)])
    for name, got, truth, rough in zip(("out", "dq", "dk", "dv"), (out, *grads), *results):
        error = (got.double() - truth).abs().max().item()
        allowed = max(2 * (rough.double() - truth).abs().max().item(), 2e-2 * truth.abs().max().item())
        if not error <= allowed:
            return f"{name} is off by {error:.1e}, allowed {allowed:.1e}"
    return ""


def measure(one: Contender, heads: int, width: int, length: int, limit: dict[str, float]) -> dict:
    q, k, v = inputs(heads, length, width, grad=True)
    upstream = torch.randn_like(q)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    def forward():
        with torch.no_grad():
            return one(q, k, v)

    def both():
        return torch.autograd.grad(one(q, k, v), (q, k, v), upstream.to(out_dtype))

    out_dtype = forward().dtype
    row = {"forward_ms": timed(forward), "both_ms": timed(both)}
    row["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    for name, whole in (("forward", False), ("both", True)):
        least = roofline_ms(one.group, heads, length, width, whole, limit)
        row[f"{name}_of_roofline"] = least / row[f"{name}_ms"]
    return row


def decoding(batch: int, heads: int, width: int) -> list[dict]:
    """Milliseconds per token of a decoding step after contexts of different lengths."""
    rows = []
    for length in (1024, 65536):
        q, k, v = inputs(heads, length, width, tokens=length)
        token = [x[:, :, :1].expand(batch, -1, -1, -1).contiguous() for x in (q, k, v)]
        with torch.no_grad():
            _, state = linear_attention(q, k, v, causal=True, return_state=True)
            state = {name: x.expand(batch, *x.shape[1:]).contiguous() for name, x in state.items()}
            delta = partial(recurrence, group="gated delta", backend="triton")
            memory = delta(q, k, v)[1].expand(batch, -1, -1, -1).contiguous()
            ms = {
                "linear": timed(lambda token=token, state=state: linear_attention(*token, causal=True, state=state)),
                "gated delta": timed(lambda token=token, state=memory, delta=delta: delta(*token, state=state)),
            }
        shape = {"after": length, "batch": batch, "heads": heads, "width": width}
        rows += [{"group": group, **shape, "step_ms": time} for group, time in ms.items()]
    return rows


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = sorted({(row["group"], row["heads"], row["width"]) for row in rows})
    figure, axes = pyplot.subplots(len(groups), 2, figsize=(11, 3 * len(groups)), squeeze=False)
    for line, key in zip(axes, groups):
        mine = [row for row in rows if (row["group"], row["heads"], row["width"]) == key]
        for axis, kind in zip(line, ("forward_ms", "both_ms")):
            for name in sorted({row["name"] for row in mine}):
                points = [(row["length"], row[kind]) for row in mine if row["name"] == name]
                axis.plot(*zip(*points), marker="o", label=name)
            axis.set(xscale="log", yscale="log", xlabel="length", ylabel=kind, title=f"{key[0]}, {key[1]} x {key[2]}")
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="groups whose name contains this")
    parser.add_argument("--check", action="store_true", help="correctness alone")
    parser.add_argument("--out", type=Path, default=RESULTS / f"attention-gpu-{date.today()}.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device; torch sees none, so nothing was run")
        return 0
    field = [one for one in (*ours(), *peers()) if arguments.only in one.group]
    right, failed = [], 0
    for one in field:
        found = {width: fault(one, width) for _, width in HEADS}
        why = "; ".join(f"width {width}: {text}" for width, text in found.items() if text)
        print(f"{'left out' if why else 'right':8}  {one.group:14} {one.name:28} {why}", flush=True)
        failed += bool(why) and one.name.startswith(("longspan triton", "longspan flex"))
        right += [] if why else [one]
    if arguments.check or failed:
        print(f"{failed} of our kernels are wrong: nothing is timed" if failed else "all of our kernels are right")
        return 1 if failed else 0
    limit = limits()
    print(f"copy {limit['bytes_per_s'] / 1e12:.2f} TB/s, matmul {limit['flops_per_s'] / 1e12:.0f} TFLOP/s")
    rows = []
    for heads, width in HEADS:
        for length in LENGTHS:
            for one in right:
                if length > one.longest:
                    continue
                shape = {"group": one.group, "name": one.name, "heads": heads, "width": width, "length": length}
                try:
                    row = {**shape, **measure(one, heads, width, length, limit)}
                except torch.OutOfMemoryError:
                    print(f"{one.group:14} {one.name:28} {heads}x{width} {length:7}  out of memory", flush=True)
                    continue
                finally:
                    torch.cuda.empty_cache()
                rows.append(row)
                print(
                    f"{one.group:14} {one.name:28} {heads}x{width} {length:7}  forward {row['forward_ms']:8.3f} ms "
                    f"({row['forward_of_roofline']:4.0%} of roofline)  both {row['both_ms']:8.3f} ms "
                    f"({row['both_of_roofline']:4.0%})  {row['peak_mb']:8.0f} MB",
                    flush=True,
                )
    steps = [row for heads, width in HEADS for row in decoding(64, heads, width)]
    for row in steps:
        rate = 1e3 * row["batch"] / row["step_ms"]
        where = f"{row['group']:14} step after {row['after']:6}  {row['heads']}x{row['width']}"
        print(f"{where}  {row['step_ms']:.3f} ms, {rate:.0f} tokens/s")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    environment = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__,
        "python": platform.python_version(),
        "date": str(date.today()),
        "commit": commit,
        **limit,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"environment": environment, "rows": rows, "steps": steps}, indent=1) + "\n")
    plot(rows, arguments.out.with_suffix(".png"))
    print(f"written: {arguments.out} and {arguments.out.with_suffix('.png').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
