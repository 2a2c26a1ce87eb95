"""A stock vision transformer at rising resolution: time and memory by attention, against SDPA in it (Linux).

    python -m benchmarks.vision_resolution                          # about 12 minutes on a CPU core, 8 GB
    python -m benchmarks.vision_resolution --sizes 224 384 --only time
    python -m benchmarks.vision_resolution --out benchmarks/results/vision-resolution-2026-11-25.json
    python -m benchmarks.vision_resolution --draw benchmarks/results/vision-resolution-2026-11-25.json

The model is timm's deit_tiny_patch16_224 with random weights, batch 1, float32, forward only, eager. "sdpa" is timm's
own code (fused attention on); "materialised" is timm's with fused attention off, which makes the matrix; all others are
the same model with its attention replaced by `apps.vision.timm_models`. Every figure is a ratio of one run on one
machine, the best of several rounds in which all take turns. Before anything is timed, softmax in place of timm's own
and windows as wide as the image have to give timm's outputs. A crossover is the first size from which a variant stays
faster than SDPA. Peak memory is what a forward pass adds to the resident process, each in a process of its own.
"--draw" makes the picture beside such a file: seconds by size, fitted exponents and crossovers marked, and memory.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from apps.vision.timm_models import replace_attention
from benchmarks.attention_cpu import exponent, finish, peak_bytes, rounds

MODEL = "deit_tiny_patch16_224"
SIZES = (224, 320, 384, 512, 640, 768, 1024, 1536, 2048)
VARIANTS = {
    "linear": {"variant": "linear"},
    "linear + conv": {"variant": "linear", "conv": 3},
    "focused + conv": {"variant": "linear", "feature_map": "focused", "conv": 3},
    "inline": {"variant": "inline"},
    "hybrid": {"variant": "hybrid", "window": 32},
    "window2d": {"variant": "window2d", "window": 5},
    "hybrid2d": {"variant": "hybrid2d", "window": 5},
}
BARS = {384: 1.0, 640: 1.6, 1024: 3.5}
"""Ratio to SDPA that linear or hybrid has to reach at these sizes: the project's own plan."""
MATRIX_SIZE = 1024
"""Largest size at which the model that makes the matrix is run: it needs 8 GB at 2048."""
MEMORY_SIZES = (MATRIX_SIZE, 2048)
"""Where memory is compared, as far as they are asked for; else at the largest size."""
FAIR = ("linear", "hybrid")
"""Those that count for the bars."""


def model(name: str) -> nn.Module:
    """The model with this attention; dynamic sizes."""
    torch.manual_seed(0)
    made = timm.create_model(MODEL, dynamic_img_size=True).eval()
    if name in ("sdpa", "materialised"):
        for block in made.blocks:
            block.attn.fused_attn = name == "sdpa"
        return made
    return replace_attention(made, [VARIANTS[name]])


def check() -> None:
    """No speed without truth: what equals softmax has to give timm's outputs."""
    x = torch.randn(1, 3, 224, 320)
    with torch.no_grad():
        want = model("sdpa")(x)
        for chosen in (
            {"variant": "softmax"},
            {"variant": "hybrid", "window": 999},
            {"variant": "hybrid2d", "window": 99},
        ):
            got = replace_attention(model("sdpa"), [chosen])(x)
            worst = ((got - want).abs().max() / want.abs().max()).item()
            if worst > 1e-5:
                raise SystemExit(f"{chosen} is off by {worst:.1e}: no speed is measured for wrong numbers")


def measure_time(sizes: tuple[int, ...], number: int) -> list[dict]:
    """Ratio of SDPA's time to each variant's at every size, the growth of each, and the crossovers."""
    models = {name: model(name) for name in ("sdpa", *VARIANTS)}
    found: dict[str, list[float]] = {name: [] for name in models}
    rows = []
    for size in sizes:
        x = torch.randn(1, 3, size, size)
        with torch.no_grad():
            passes = {name: lambda m=m, x=x: m(x) for name, m in models.items()}
            times = rounds(passes, number if size < 768 else max(2, number // 2) if size <= 1024 else 1)
        for name, ms in times.items():
            found[name].append(ms)
        ratios = {name: times["sdpa"] / times[name] for name in VARIANTS}
        rows += [row("forward, seconds", name, size, ms / 1e3, "", None) for name, ms in times.items()]
        rows += [row("forward, sdpa / variant", name, size, ratio, "", None) for name, ratio in ratios.items()]
        if size in BARS:
            bar, best = BARS[size], max(ratios[name] for name in FAIR)
            rows.append(row("forward, best of linear and hybrid", "", size, best, f">= {bar}", best >= bar))
    tokens = [(size // 16) ** 2 + 1 for size in sizes]
    for name, times in found.items():
        rows.append(row("exponent of time by tokens", name, sizes[-1], exponent(tokens, times), "", None))
        wins = [a >= b for a, b in zip(found["sdpa"], times)]
        losing = [size for size, won in zip(sizes, wins) if not won]
        after = [size for size in sizes if size > max(losing, default=0)]
        if name != "sdpa":
            rows.append(
                row(
                    "faster than sdpa from",
                    name,
                    after[0] if after else None,
                    after[0] if after else math.nan,
                    "",
                    None,
                )
            )
    return rows


def work(size: int, name: str):
    """A forward pass at this size, its input made; for `peak_bytes`."""
    torch.set_num_threads(1)
    made, x = model(name), torch.randn(1, 3, max(224, size), max(224, size))

    def run() -> None:
        with torch.no_grad():
            made(x)

    return run


def measure_memory(sizes: tuple[int, ...]) -> list[dict]:
    """Peak memory of a forward pass, as a share of SDPA's and of that of the model that makes the matrix.

    The lesser of two processes counts, above MATRIX_SIZE a single one: what the allocator keeps scatters upwards.
    """
    rows = []
    for size in [one for one in MEMORY_SIZES if one in sizes] or [sizes[-1]]:
        small = size <= MATRIX_SIZE
        names = ["sdpa", *(["materialised"] if small else []), *VARIANTS]
        runs = [
            {name: peak_bytes("benchmarks.vision_resolution", size, name) for name in names} for _ in range(1 + small)
        ]
        peaks = {name: min(run[name] for run in runs) for name in names}
        for name, peak in peaks.items():
            share, fair = peak / peaks["sdpa"], name in FAIR and size == MATRIX_SIZE
            bar, ok = ("<= 1.1", share <= 1.1) if fair else ("", None)
            rows.append(row("peak memory / sdpa", name, size, share, bar, ok, peak_bytes=peak))
            if small:
                whole = peak / peaks["materialised"]
                bar, ok = ("<= 0.5", whole <= 0.5) if fair else ("", None)
                rows.append(row("peak memory / materialised", name, size, whole, bar, ok))
    return rows


def draw(file: Path) -> Path:
    """The picture of a file of rows, beside it: seconds and memory by size, with exponents and crossovers."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    from core.training.plots import COLOURS, LINES

    rows = json.loads(file.read_text())["rows"]

    def series(what: str, name: str, field: str = "value") -> dict[int, float]:
        return {one["size"]: one[field] for one in rows if (one["what"], one["variant"]) == (what, name)}

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = ["sdpa", *VARIANTS]
    for at, name in enumerate(names):
        times = series("forward, seconds", name)
        grown = next(iter(series("exponent of time by tokens", name).values()))
        colour = "black" if name == "sdpa" else [*COLOURS[:-1], "#8a8f98"][at - 1]
        style: dict[str, Any] = {"color": colour, "linestyle": LINES[at % len(LINES)]}
        start = next(iter(series("faster than sdpa from", name).values()), None)
        label = f"{name}: tokens ^ {grown:.2f}" + (f", faster from {start:.0f}" if start else "")
        left.plot(list(times), list(times.values()), label=label, **style)
        if start:
            left.plot(start, times[int(start)], "o", color=colour)
    left.set(xscale="log", yscale="log", xlabel="side of the image, pixels", ylabel="seconds of a forward pass")
    left.set_xticks(list(times), [str(size) for size in times], fontsize=8)
    left.xaxis.set_minor_locator(NullLocator())
    left.legend(frameon=False, fontsize=8)
    names.insert(1, "materialised")
    sizes = sorted({one["size"] for one in rows if one["what"] == "peak memory / sdpa"})
    for size, marker in zip(sizes, "osD^"):
        peaks = {name: series("peak memory / sdpa", name, "peak_bytes").get(size, 0) for name in names}
        there = [name for name in names if peaks[name]]  # all but the matrix at large sizes
        found = [peaks[name] / 2**20 for name in there]
        right.plot(found, [names.index(name) for name in there], marker, label=f"{size} pixels")
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set(xscale="log", xlabel="MiB that a forward pass adds")
    right.grid(alpha=0.3)
    right.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{MODEL} at rising resolution, one CPU thread", fontsize=11)
    out = file.with_suffix(".png")
    figure.savefig(out, dpi=110)
    return out


def row(what, variant, size, value, bar, ok, **extra) -> dict:
    verdict = "" if ok is None else ("ok" if ok else "BELOW THE BAR")
    print(f"{what:36} {variant:16} {size!s:6} {value:10.2f}   {bar:9} {verdict}", flush=True)
    value = None if math.isnan(value) else round(value, 3)
    return {"what": what, "variant": variant, "size": size, "value": value, "bar": bar, "ok": ok, **extra}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=list(SIZES), help="sides of square images, multiples of 16"
    )
    parser.add_argument("--only", choices=("time", "memory"), help="one of the two parts")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of which the best counts")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", type=Path, help="write the rows and the environment here, as JSON")
    parser.add_argument("--draw", type=Path, help="measure nothing: draw such a JSON file, as PNG beside it")
    given = parser.parse_args()
    if given.draw:
        print(draw(given.draw))
        return
    torch.set_num_threads(given.threads)
    check()
    sizes, rows = tuple(sorted(given.sizes)), []
    if given.only != "memory":
        rows += measure_time(sizes, given.rounds)
    if given.only != "time":
        rows += measure_memory(sizes)
    finish(rows, given.out, model=MODEL, timm=timm.__version__, batch=1, dtype="float32")


if __name__ == "__main__":
    main()
