"""A stock vision transformer at rising resolution: time and memory by attention, against SDPA in it (Linux).

    python -m benchmarks.vision_resolution                          # about 10 minutes on a CPU core
    python -m benchmarks.vision_resolution --sizes 224 384 --only time
    python -m benchmarks.vision_resolution --out benchmarks/results/vision-resolution-2026-11-25.json

The model is timm's deit_tiny_patch16_224 with random weights, batch 1, float32, forward only, eager. "sdpa" is timm's
own code (fused attention on); "materialised" is timm's with fused attention off, which makes the matrix; all others are
the same model with its attention replaced by `apps.vision.timm_models`. Every figure is a ratio of one run on one
machine, the best of several rounds in which all take turns. Before anything is timed, softmax in place of timm's own
and windows as wide as the image have to give timm's outputs. A crossover is the first size from which a variant stays
faster than SDPA. Peak memory is what a forward pass adds to the resident process, each in a process of its own.
"""

import argparse
import math
from pathlib import Path

import timm
import torch
from torch import nn

from apps.vision.timm_models import replace_attention
from benchmarks.attention_cpu import exponent, finish, peak_bytes, rounds

MODEL = "deit_tiny_patch16_224"
SIZES = (224, 320, 384, 512, 640, 768, 1024)
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
            times = rounds(passes, number if size < 768 else max(2, number // 2))
        for name, ms in times.items():
            found[name].append(ms)
        ratios = {name: times["sdpa"] / times[name] for name in VARIANTS}
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
    """Peak memory of a forward pass at the largest size, as a share of SDPA's."""
    size = sizes[-1]
    peaks = {
        name: peak_bytes("benchmarks.vision_resolution", size, name) for name in ("sdpa", "materialised", *VARIANTS)
    }
    rows = []
    for name, peak in peaks.items():
        share, whole = peak / peaks["sdpa"], peak / peaks["materialised"]
        fair = name in FAIR
        rows.append(
            row(
                "peak memory / sdpa",
                name,
                size,
                share,
                "<= 1.1" if fair else "",
                share <= 1.1 if fair else None,
                peak_bytes=peak,
            )
        )
        rows.append(
            row(
                "peak memory / materialised",
                name,
                size,
                whole,
                "<= 0.5" if fair else "",
                whole <= 0.5 if fair else None,
            )
        )
    return rows


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
    given = parser.parse_args()
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
