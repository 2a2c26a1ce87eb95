"""What the kernels should reach, as ratios within one run, and whether they did."""

from typing import NamedTuple

from benchmarks.gpu.packed import NAMES

OURS = "longspan triton"
FLASH = ("sdpa flash_attention", "sdpa cudnn_attention", "flash-attn")
BOTH = ("forward_ms", "both_ms")


class Aim(NamedTuple):
    """`names` of `group` over ours in `mine`, at least `least` at every length from `low` to `high`.

    The fastest of `names` counts. apart: groups of ours whose times are added instead.
    """

    mine: str
    group: str
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    least: float
    low: int = 0
    high: int = 1 << 30
    apart: tuple[str, ...] = ()

    def __str__(self) -> str:
        against = " + ".join(self.apart) + " apart" if self.apart else " or ".join(self.names)
        span = f"{self.low} to {self.high} tokens" if self.high < 1 << 30 else "every length"
        return f"{self.mine}: {against} takes >= {self.least:.2f} times as long ({span})"


AIMS = (
    Aim("linear decay", "linear decay", ("fla simple_gla",), BOTH, 1.2, 4096, 65536),
    Aim("linear causal", "linear causal", ("fla linear_attn",), BOTH, 1.5, 4096, 65536),
    Aim("linear both", "linear both", ("two matmuls, torch.compile",), BOTH, 1.5),
    Aim("hybrid", "hybrid", (), BOTH, 1 / 1.3, apart=("linear causal", "window")),
    Aim("hybrid", "softmax", FLASH, ("both_ms",), 3.0, 16384, 16384),
    Aim("hybrid", "softmax", FLASH, ("both_ms",), 10.0, 65536, 65536),
    Aim("window", "window", ("longspan flex", "flash-attn"), BOTH, 1.0),
    Aim("window2d", "window2d", ("longspan flex",), BOTH, 1.0),
    *(Aim(name, name, ("longspan triton, padded",), BOTH, 1.0) for name in NAMES),
    Aim("linear causal", "softmax", FLASH, ("both_ms",), 1.0, 2048, 131072),
)
ROOFLINE = ("linear both", 0.7)
"""Least share of the roofline forward."""
STEADY = 1.1
"""Most that a step after the long context may take of one after the short."""


def verdicts(rows: list[dict], steps: list[dict]) -> list[dict]:
    """One line per aim: what was asked, the worst ratio found (None: not measured) and whether it was met."""
    shapes = sorted({(row["heads"], row["width"], row["length"]) for row in rows})
    times = {(r["group"], r["name"], r["heads"], r["width"], r["length"]): r for r in rows}
    found = []
    for aim in AIMS:
        for kind in aim.kinds:
            ratios = []
            for shape in shapes:
                mine = times.get((aim.mine, OURS, *shape))
                if mine is None or not aim.low <= shape[2] <= aim.high:
                    continue
                wanted = [(group, OURS) for group in aim.apart] or [(aim.group, name) for name in aim.names]
                others = [times[*one, *shape][kind] for one in wanted if (*one, *shape) in times]
                if aim.apart and len(others) == len(aim.apart):
                    ratios.append(sum(others) / mine[kind])
                elif others and not aim.apart:
                    ratios.append(min(others) / mine[kind])
            found.append(_verdict(f"{aim}, {kind.removesuffix('_ms')}", min(ratios, default=None), aim.least))
    shares = [r["forward_of_roofline"] for r in rows if (r["group"], r["name"]) == (ROOFLINE[0], OURS)]
    found.append(_verdict(f"{ROOFLINE[0]}: share of the roofline, forward", min(shares, default=None), ROOFLINE[1]))
    by = {(r["group"], r["batch"], r["heads"], r["width"], r["after"]): r["step_ms"] for r in steps}
    near, far = (choose((r["after"] for r in steps), default=0) for choose in (min, max))
    mine = [key for key in by if key[4] == near and key[0] != "softmax sdpa" and (*key[:4], far) in by]
    growth = [by[*key[:4], near] / by[*key[:4], far] for key in mine]
    found.append(_verdict("a step takes no longer after a long context", min(growth, default=None), 1 / STEADY))
    return found


def _verdict(text: str, ratio: float | None, least: float) -> dict:
    return {"aim": text, "ratio": ratio, "least": least, "met": None if ratio is None else ratio >= least}
