"""Write docs/variants.md from the registry: `python docs/make_variants.py`. A test fails when the page is stale."""

from collections.abc import Iterable
from pathlib import Path

from core.attention.contract import Heads
from core.attention.feature_maps import FEATURE_MAPS
from core.attention.learned_maps import LEARNED_MAPS, build_map, is_narrow
from core.attention.registry import available, build, entry, variant_class
from core.layout import LETTERS, PRESETS

PAGE = Path(__file__).with_name("variants.md")
ABILITIES = ("causal", "bidirectional", "cross", "recurrent", "mass", "dropout", "grid", "global")
GEOMETRY = Heads(query=8, key=8, width=64, value_width=64, model=512)
LENGTHS = (1_024, 16_384)
GROWTH = {"linear": "L", "log-linear": "L log L", "root": "L√L", "quadratic": "L²"}
ANCHOR = {"": "–", "start": "start", "length": "whole length"}
INSIDE = ("given", "given_floored", "identity")  # maps that stand for features computed elsewhere

HEAD = """\
# The attention variants

Written by `docs/make_variants.py` from the registry; do not edit. The command line shows the same with
`longspan list variants`. What the words mean, and how to choose, is in [attention.md](attention.md); what each
remembers is in [recall.md](recall.md), how fast it is on your machine is measured by `longspan bench`.
"""

PICK_TEXT = """\
**growth** is that of time and memory with the length L. **stability** says what keeps the numbers in range.
"""

ABILITY_TEXT = """\
**causal**: a position sees its past only. **bidirectional**: every position sees all. **cross**: keys may come from
another sequence. **recurrent**: has a decoding state, `prefill` and `step`. **mass**: results over disjoint keys can be
merged. **dropout**: on the attention weights. **grid**: looks at the image grid where it is told one. **global**: takes
global tokens. **positions**: what acts inside the mechanism; sinusoidal and learned positions are added to the input
and go with everything. **counts from**: where its pattern of keys is anchored: with "start" padding belongs on the
right, with "whole length" there must be none. An option can take an ability away; the error then says so.
"""

COMPILED = "All of them compile whole: `torch.compile(fullgraph=True, dynamic=True)`."

COST_TEXT = """\
What `cost()` answers for one forward pass of the mechanism alone: default options, batch 1, 8 heads of width 64, fp32,
causal where it can be. Counted, not timed: speed is measured by the programs in [benchmarks](../benchmarks). `auto`
costs what its choice costs.
"""

LAYOUT_TEXT = """\
Patterns over the layers, chosen like a variant: `attention=based`, or `attention: {layout: based}` in a recipe.
"""

MAP_TEXT = """\
For `linear`, `hybrid` and others that have the option `feature_map`. **features**: for a head of width 64, after the
projection to 16 dimensions where a map acts on few. **kernel**: a function of q.k alone, so that rotary positions act
before the map. Maps that are not **positive** have no mass and serve only where nothing is divided by it. Formulas and
sources are in [feature_maps.py](../core/attention/feature_maps.py),
[learned_maps.py](../core/attention/learned_maps.py) and [random_features.py](../core/attention/random_features.py).
"""


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table, empty cells as dashes."""
    columns = list(columns)
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(cell or '–' for cell in row)} |" for row in rows]


def options_of(name: str) -> str:
    """`window=64`, `feature_map='elu'`."""
    return ", ".join(f"`{option}={value!r}`" for option, value in entry(name).options.items())


def with_unit(number: float, units: tuple[str, ...]) -> str:
    """Three digits and a decimal unit: 1_500_000 -> 1.5 M."""
    power = 0
    while number >= 1000 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {units[power]}".strip()


def mechanisms() -> list[str]:
    """What each is, when to pick it, what it can do."""
    names = available()
    lines = table(
        ("variant", "what it is", "options", "source"),
        ((f"`{name}`", entry(name).summary, options_of(name), entry(name).source) for name in names),
    )
    lines += ["", "## When to pick it", "", PICK_TEXT]
    lines += table(
        ("variant", "pick it when", "growth", "stability"),
        ((f"`{name}`", entry(name).pick, GROWTH[variant_class(name).growth], entry(name).stability) for name in names),
    )
    lines += ["", "## What each can do", "", ABILITY_TEXT]
    rows = []
    for name in names:
        cls = variant_class(name)
        marks = ["yes" if ability in cls.can else "" for ability in ABILITIES]
        rows.append((f"`{name}`", *marks, ", ".join(sorted(cls.positions)), ANCHOR[cls.anchor]))
    lines += table(("variant", *ABILITIES, "positions", "counts from"), rows)
    reasons = [f"- `{name}`: {reason}" for name in names if (reason := variant_class(name).uncompiled)]
    told = ["Not under `torch.compile(fullgraph=True)`:", "", *reasons] if reasons else [COMPILED]
    return [*lines, "", *told]


def costs() -> list[str]:
    """FLOPs and state bytes at two lengths."""
    rows = []
    for name in available():
        if name == "auto":  # its choice depends on the machine, this page must not
            continue
        variant = build(name, GEOMETRY)
        found = [variant.cost(1, length, causal="causal" in variant.can) for length in LENGTHS]
        flops = [with_unit(cost.flops, ("", "k", "M", "G", "T")) for cost in found]
        states = [with_unit(cost.state_bytes, ("B", "kB", "MB", "GB")) if cost.state_bytes else "" for cost in found]
        rows.append((f"`{name}`", *flops, *states, with_unit(found[0].parameters, ("", "k", "M"))))
    columns = [f"{what}, {length:,} tokens" for what in ("FLOPs", "decoding state") for length in LENGTHS]
    return table(("variant", *columns, "parameters"), rows)


def layouts() -> list[str]:
    """The named patterns and the letters."""
    rows = []
    for name, preset in PRESETS.items():
        means = "; ".join(
            f"`{letter}` {chosen['variant']}"
            + "".join(f" {option}={value}" for option, value in chosen.items() if option != "variant")
            for letter, chosen in preset.letters.items()
        )
        rows.append((f"`{name}`", preset.summary, f"`{(preset.word(8) * 8)[:8]}`", means, preset.source))
    letters = ", ".join(f"`{letter}` {name}" for letter, name in LETTERS.items())
    return [
        *table(("layout", "what it is", "over 8 layers", "letters", "source"), rows),
        "",
        f"Letters that a recipe's `attention` does not define mean, with default options: {letters}.",
    ]


def feature_maps() -> list[str]:
    """Every feature map that an option can name."""
    rows = []
    for name in sorted({*FEATURE_MAPS, *LEARNED_MAPS} - set(INSIDE)):
        width = 16 if is_narrow(name) else GEOMETRY.width
        one = build_map(name, GEOMETRY, width, None, 0, 0)
        learned = "random" if name.startswith("favor") else "learned" if name in LEARNED_MAPS else "fixed"
        facts = [one.kernel, one.positive, bool(one.floor)]
        marks = ["yes" if fact else "" for fact in facts]
        rows.append((f"`{name}`", str(one.width(width)), "16" if is_narrow(name) else "the head", *marks, learned))
    return table(("map", "features", "dimensions", "kernel", "positive", "can vanish, so has a floor", "is"), rows)


def page() -> str:
    """The whole text of docs/variants.md."""
    lines = [HEAD, *mechanisms(), "", "## What each costs", "", COST_TEXT, *costs()]
    lines += ["", "## Layouts", "", LAYOUT_TEXT, *layouts(), "", "## Feature maps", "", MAP_TEXT, *feature_maps()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
