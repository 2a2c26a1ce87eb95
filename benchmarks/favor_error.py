"""How far FAVOR+ is from the softmax attention it estimates, by number of features, norm of q and k, and kind of draw.

    python -m benchmarks.favor_error                                        # about a minute on one core
    python -m benchmarks.favor_error --out benchmarks/results/favor-error.json

Scores are q.k / sqrt(D), as in softmax attention. `kernel` is the estimate of exp(score) itself, whose variance is
exactly proportional to 1 / m; `output` is attention with it, a quotient of two estimates, that follows the same law
once the error is well below 1. A figure is the root mean square over draws of omega and over data of
|estimate - truth| / |truth|, the lengths being those of all numbers together (256 queries and keys on the sphere of
that norm, normal values). The factor before m^(-1/2) grows like exp(|q + k|^2 / (2 sqrt(D))). The slope is that of a
least-squares line through (log m, log error); the bar is -0.5 +- 0.1, for `output` only where the error starts below
1/2. The last two blocks have no bar: norm sqrt(D), which is what RMS-normalised heads have, at D = 64 and at D = 16,
the width to which the layer projects by default. A thousand features do not average that out: what a layer learns with
`favor` there, it learns with the features it has.
"""

import argparse
import json
import platform
from datetime import date
from pathlib import Path

import torch

from benchmarks.attention_cpu import exponent, processor
from core.attention import softmax_attention
from core.attention.contract import Heads
from core.attention.random_features import Favor, draw
from core.attention.variants import linear

FEATURES = (64, 128, 256, 512, 1024)
DRAWS, DATA, LENGTH = 32, 4, 256
SLOPE_BARS = (-0.6, -0.4)
BARRED = [(64, 1.0), (64, 2.0), (64, 4.0)]
BEYOND = [(64, 8.0), (16, 4.0)]


def inputs(width: int, norm: float, seed: int) -> list[torch.Tensor]:
    """q and k [1, DRAWS, LENGTH, width] of this norm and v, the same for all draws of omega, which are its heads."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, LENGTH, width, generator=generator) for _ in range(3))
    q, k = (norm * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    return [x.expand(-1, DRAWS, -1, -1) for x in (q, k, v)]


def errors(width: int, norm: float, features: int, orthogonal: bool) -> dict[str, float]:
    """Root mean squares of the relative errors of the kernel and of the output."""
    phi = Favor(Heads(DRAWS, DRAWS, width, width), width, features, 0, 0)
    squares = {"kernel": [], "output": []}
    for seed in range(DATA):
        phi.omega.copy_(draw(DRAWS, features, width, seed, orthogonal=orthogonal))
        q, k, v = inputs(width, norm, seed)
        fq, fk, level = phi(q, k)
        attended, _ = linear.attend(q, k, v, phi, causal=False)
        for what, got, want in (
            ("kernel", fq @ fk.mT * level.exp().unsqueeze(-1), (q[:, :1] @ k[:, :1].mT * width**-0.5).exp()),
            ("output", attended.out, softmax_attention(q[:, :1], k[:, :1], v[:, :1])),
        ):
            squares[what].append((got - want).square().sum((0, 2, 3)) / want.square().sum())
    return {what: torch.cat(found).mean().sqrt().item() for what, found in squares.items()}


def block(width: int, norm: float, barred: bool) -> list[dict]:
    """Rows for this width and norm: both kinds of rows, both measures."""
    found = {
        kind: [errors(width, norm, m, kind == "orthogonal") for m in FEATURES] for kind in ("orthogonal", "independent")
    }
    rows = []
    for what in ("kernel", "output"):
        for kind, many in found.items():
            values = [one[what] for one in many]
            slope = exponent(FEATURES, values)
            ok = None
            if barred and (what == "kernel" or values[0] < 0.5):
                ok = SLOPE_BARS[0] <= slope <= SLOPE_BARS[1]
            rows.append(
                {
                    "what": what,
                    "width": width,
                    "norm": norm,
                    "rows": kind,
                    "errors": {str(m): float(f"{one:.4g}") for m, one in zip(FEATURES, values)},
                    "slope": round(slope, 3),
                    "ok": ok,
                }
            )
            numbers = "  ".join(f"{one:9.3g}" for one in values)
            verdict = {None: "", True: "ok", False: "MISSES ITS BAR"}[ok]
            print(f"{what}  D {width:2}  norm {norm:2.0f}  {kind:11}  {numbers}  {slope:6.2f}  {verdict}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the rows and the environment here, as JSON")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    print(f"{'relative error':36}" + "  ".join(f"m ={m:6}" for m in FEATURES) + "   slope")
    rows = [row for width, norm in BARRED for row in block(width, norm, True)]
    rows += [row for width, norm in BEYOND for row in block(width, norm, False)]
    if given.out:
        environment = {
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processor": processor(),
            "draws": DRAWS * DATA,
            "length": LENGTH,
            "slope bars": SLOPE_BARS,
        }
        given.out.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    if any(row["ok"] is False for row in rows):
        raise SystemExit("some figures miss their bar")


if __name__ == "__main__":
    main()
