"""Write docs/variants.md from the registry: `python docs/make_variants.py`. A test fails when the page is stale."""

from pathlib import Path

from core.attention.contract import Heads
from core.attention.registry import available, build, entry, variant_class

PAGE = Path(__file__).with_name("variants.md")
ABILITIES = ("causal", "bidirectional", "cross", "recurrent", "mass", "dropout")
GEOMETRY = Heads(query=8, key=8, width=64, value_width=64)
LENGTHS = (1_024, 16_384)

HEAD = """\
# The attention variants

Written by `docs/make_variants.py` from the registry; do not edit. The command line shows the same with
`longspan list variants`. What the words mean, and how to choose, is in [attention.md](attention.md).
"""

ABILITY_TEXT = """\
**causal**: a position sees its past only. **bidirectional**: every position sees all. **cross**: keys may come from
another sequence. **recurrent**: has a decoding state, `prefill` and `step`. **mass**: results over disjoint keys can be
merged. **dropout**: on the attention weights. **positions**: what acts inside the mechanism; sinusoidal and learned
positions are added to the input and go with everything.
"""

COST_TEXT = """\
What `cost()` answers for one forward pass of the mechanism alone: default options, batch 1, 8 heads of width 64,
causal, fp32. Counted, not timed: speed is measured by the programs in [benchmarks](../benchmarks).
"""


def options_of(name: str) -> str:
    """`window=64, feature_map='elu'`, or a dash."""
    return ", ".join(f"`{option}={value!r}`" for option, value in entry(name).options.items()) or "–"


def with_unit(number: float, units: tuple[str, ...]) -> str:
    """Three digits and a decimal unit: 1_500_000 -> 1.5 M."""
    power = 0
    while number >= 1000 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {units[power]}"


def page() -> str:
    """The whole text of docs/variants.md."""
    lines = [HEAD, "| variant | what it is | options | source |", "|---|---|---|---|"]
    for name in available():
        one = entry(name)
        lines.append(f"| `{name}` | {one.summary} | {options_of(name)} | {one.source} |")
    lines += ["", "## What each can do", "", ABILITY_TEXT]
    lines += [f"| variant | {' | '.join(ABILITIES)} | positions |", "|---" * (len(ABILITIES) + 2) + "|"]
    for name in available():
        cls = variant_class(name)
        marks = " | ".join("yes" if ability in cls.can else "–" for ability in ABILITIES)
        lines.append(f"| `{name}` | {marks} | {', '.join(sorted(cls.positions)) or '–'} |")
    lines += ["", "## What each costs", "", COST_TEXT]
    columns = [f"{what}, {length:,} tokens" for what in ("FLOPs", "decoding state") for length in LENGTHS]
    lines += [f"| variant | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in available():
        costs = [build(name, GEOMETRY).cost(1, length, causal=True) for length in LENGTHS]
        flops = [with_unit(cost.flops, ("", "k", "M", "G", "T")) for cost in costs]
        states = [with_unit(cost.state_bytes, ("B", "kB", "MB", "GB")) if cost.state_bytes else "–" for cost in costs]
        lines.append(f"| `{name}` | {' | '.join(flops + states)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
