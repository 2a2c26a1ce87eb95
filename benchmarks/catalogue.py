"""Every variant of the catalogue on a CPU (Linux): growth of time and memory with the length, speed of the chunk forms.

    python -m benchmarks.catalogue                                # everything, hours on 2 cores
    python -m benchmarks.catalogue --only gla window              # some variants
    python -m benchmarks.catalogue --parts chunk                  # or time, memory
    python -m benchmarks.catalogue --lengths 256 512 --only gla   # a trial
    python -m benchmarks.catalogue --out benchmarks/results/catalogue.json

The mechanism alone, without the layer's projections: default options, batch 1, 2 heads of width 64, float32, forward
and backward to all inputs and parameters. A slope is that of a line through (log length, log time or peak memory);
variants that are quadratic by definition are not measured, nor is `auto`, which is one of the others. `chunk` compares
the chunk forms with plain causal linear attention at 4,096 tokens and 8 heads, without the output gate, a projection
that plain linear attention does not have. Before a variant is measured, outputs and gradients are compared with its
float64 reference. The bars are the project's own, from its plan.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.attention_cpu import exponent, finish, peak_bytes, rounds, row
from core.attention.contract import Heads, Inputs
from core.attention.registry import available, build, entry, variant_class

HEADS, WIDTH = 2, 64
LENGTHS = (4096, 8192, 16384, 32768)
SLOPE_BAR, CHUNK_BAR = 1.2, 4.0
CHUNKED = ("ssd", "gla", "mlstm", "delta", "gated_delta", "kda")
CHUNK_HEADS, CHUNK_LENGTH = 8, 4096
WRONG = 1e-3  # of the largest value of a tensor, or of a thousandth of all; float32 against float64
DIRECTIONS = {"bidirectional": False, "causal": True}


def measured() -> list[str]:
    """Variants that attend to their own sequence in less than quadratic time."""
    return [
        name
        for name in available()
        if variant_class(name).growth != "quadratic" and variant_class(name).can & set(DIRECTIONS)
    ]


class Run:
    """One variant with inputs of a length; calling it does forward and backward."""

    def __init__(self, name, causal, length, *, heads=HEADS, dtype=torch.float32, backend="auto", **options):
        if "max_length" in entry(name).options:
            options["max_length"] = max(length, entry(name).options["max_length"])
        torch.manual_seed(0)
        self.variant = build(name, Heads(heads, heads, WIDTH, WIDTH, heads * WIDTH), **options).to(dtype).eval()
        self.causal, self.backend = causal, backend
        q, k, v = (torch.randn(1, heads, length, WIDTH).to(dtype).requires_grad_() for _ in range(3))
        self.inputs = (q, k, v, torch.randn(1, length, heads * WIDTH).to(dtype).requires_grad_())

    def out(self):
        *qkv, x = self.inputs
        return self.variant(*qkv, causal=self.causal, backend=self.backend, inputs=Inputs(x)).out

    def gradients(self, loss):
        return torch.autograd.grad(loss, [*self.inputs, *self.variant.parameters()], allow_unused=True)

    def __call__(self):
        self.gradients(self.out().sum())


def work(length: int, name: str, causal: str):
    """For `peak_bytes`."""
    return Run(name, causal == "1", length)


def check(name: str, causal: bool) -> None:
    """No speed without truth: outputs and gradients against the float64 reference, odd length."""
    fast = Run(name, causal, 331)
    slow = Run(name, causal, 331, dtype=torch.float64, backend="reference")
    got, want = fast.out(), slow.out()
    mine, exact = ([y, *run.gradients(y.square().sum())] for y, run in ((got, fast), (want, slow)))
    largest = max(x.abs().max().item() for x in exact if x is not None)
    for one, other in zip(mine, exact):
        if (one is None) != (other is None):
            raise SystemExit(f"{name} causal={causal}: a gradient is missing")
        if one is not None and other is not None:
            worst = (one - other).abs().max().item() / max(other.abs().max().item(), largest / 1000)
            if not worst <= WRONG:
                raise SystemExit(f"{name} causal={causal} is off by {worst:.1e}: nothing is measured for wrong numbers")


def time(name: str, causal: bool, lengths) -> dict:
    """Slope of time."""
    runs = {str(length): Run(name, causal, length) for length in lengths}
    times = rounds(runs, 3)
    found = exponent(lengths, [times[str(length)] for length in lengths])
    said = f"time slope {lengths[0]}..{lengths[-1]}"
    ms = {length: round(value, 2) for length, value in times.items()}
    return row(said, name, causal, found, f"<= {SLOPE_BAR}", found <= SLOPE_BAR, ms=ms)


def memory(name: str, causal: bool, lengths) -> dict:
    """Slope of peak memory above the inputs, each length in a process of its own."""
    peaks = {str(n): peak_bytes("benchmarks.catalogue", n, name, str(int(causal))) for n in lengths}
    # A page is the least that can be seen; a short trial may stay below it.
    found = exponent(lengths, [max(4096, peak) for peak in peaks.values()])
    said = f"memory slope {lengths[0]}..{lengths[-1]}"
    return row(said, name, causal, found, f"<= {SLOPE_BAR}", found <= SLOPE_BAR, peak_bytes=peaks)


def chunk(name: str, length: int) -> dict:
    """Time over that of plain causal linear attention, taking turns."""
    options = {"gate": False} if "gate" in entry(name).options else {}
    runs = {
        "linear": Run("linear", True, length, heads=CHUNK_HEADS),
        name: Run(name, True, length, heads=CHUNK_HEADS, **options),
    }
    times = rounds(runs, 4)
    ratio = times[name] / times["linear"]
    said = f"time over linear's, {length} tokens"
    ms = {key: round(value, 2) for key, value in times.items()}
    return row(said, name, True, ratio, f"<= {CHUNK_BAR}", ratio <= CHUNK_BAR, ms=ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=measured(), nargs="+", default=measured(), metavar="NAME", help="variants")
    parser.add_argument("--parts", choices=("time", "memory", "chunk"), nargs="+", default=["time", "memory", "chunk"])
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, metavar="N", help="of the slopes, two or more"
    )
    parser.add_argument("--chunk-length", type=int, default=CHUNK_LENGTH, metavar="N", help="of the part chunk")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--out", type=Path, help="write the rows and the environment here, as JSON")
    given = parser.parse_args()
    if len(set(given.lengths)) < 2:
        parser.error("a slope needs two lengths or more")
    torch.set_num_threads(given.threads)
    rows = []
    for name in given.only:
        for ability, causal in DIRECTIONS.items():
            if ability in variant_class(name).can:
                check(name, causal)
                parts = [part for part in (time, memory) if part.__name__ in given.parts]
                rows += [part(name, causal, given.lengths) for part in parts]
        if "chunk" in given.parts and name in CHUNKED:
            rows.append(chunk(name, given.chunk_length))
    finish(rows, given.out, heads=HEADS, width=WIDTH, chunk_heads=CHUNK_HEADS)


if __name__ == "__main__":
    main()
