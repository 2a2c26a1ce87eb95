"""The layout word: which attention in which layer, written as a short word that is repeated over the depth.

    "lls" over 6 layers = linear linear softmax linear linear softmax

A letter means what the recipe's `attention` maps it to; letters that it leaves out mean the variant in `LETTERS`
with its default options. Patterns that have a name in the field are `PRESETS`: `{"layout": "based"}` stands for a word
and the meaning of its letters. This is the one place that says what a letter means. No torch here: recipes are checked
before it is loaded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from core.attention.registry import available, check, nearest

LETTERS = {
    "s": "softmax",
    "w": "window",
    "l": "linear",
    "h": "hybrid",
    "g": "gla",
    "d": "delta",
    "m": "ssd",
    "n": "norm",
    "b": "diagonal",
}


@dataclass(frozen=True)
class Preset:
    """A pattern of layers with a name.

    Attributes:
        summary: one line for `longspan list variants`.
        source: paper or origin.
        letters: what the letters of the word mean.
        word: the layout word for a depth.
    """

    summary: str
    source: str
    letters: Mapping[str, Mapping[str, Any]]
    word: Callable[[int], str]


PRESETS = {
    "based": Preset(
        "Taylor linear and window 64 in turn, with short convolutions",
        "Arora et al. 2024, arXiv:2402.18668; its gated convolution layers stand on q, k and v here",
        {
            "l": {"variant": "linear", "feature_map": "taylor", "feature_dim": 16, "short_conv": 3},
            "w": {"variant": "window", "window": 64, "short_conv": 3},
        },
        lambda depth: "lw",
    ),
    "jamba": Preset(
        "one softmax in eight layers, the others ssd",
        "Lieber et al. 2024, arXiv:2403.19887; no mixture of experts",
        {"m": {"variant": "ssd"}, "s": {"variant": "softmax"}},
        # Below eight layers too there is one softmax, in the middle as there.
        lambda depth: "mmmmsmmm" if depth >= 8 else "m" * (depth // 2) + "s" + "m" * (depth - depth // 2 - 1),
    ),
    "sandwich": Preset(
        "softmax in the first and the last layer, linear between them",
        "this project's",
        {"s": {"variant": "softmax"}, "l": {"variant": "linear"}},
        lambda depth: "s" + "l" * (depth - 2) + "s" if depth > 1 else "s",
    ),
    "transnormer": Preset(
        "softmax within blocks in the first half of the layers, linear with a norm in the second",
        "Qin et al. 2022, arXiv:2210.10340",
        {"b": {"variant": "diagonal"}, "n": {"variant": "norm"}},
        lambda depth: "b" * (depth // 2) + "n" * (depth - depth // 2),
    ),
}
"""Patterns of layers by name: what is known of them is written here and nowhere else."""


def check_name(name: Any) -> None:
    """Raise ValueError unless `name` is a variant or a preset."""
    if name not in available() and name not in PRESETS:
        known = f"known: {', '.join(available())}, and the layouts {', '.join(PRESETS)}"
        raise ValueError(f"unknown attention {name!r}{nearest(name, (*available(), *PRESETS))}; {known}")


def is_preset(attention: Mapping[str, Any]) -> bool:
    """Whether an attention section names a preset, as `{"layout": "based"}` does."""
    return "layout" in attention


def spell_out(attention: Mapping[str, Any], layout: str | None, depth: int) -> tuple[dict[str, Any], str | None]:
    """The same attention and layout without presets: letters and a word in place of `{"layout": name}`.

    Raises:
        ValueError: unknown preset, options beside it, or a word of the recipe's own beside it.
    """
    if not is_preset(attention):
        return dict(attention), layout
    name, *more = attention["layout"], *(key for key in attention if key != "layout")
    if name not in PRESETS:
        raise ValueError(f"unknown layout {name!r}{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}")
    if more:
        letters = ", ".join(PRESETS[name].letters)
        raise ValueError(
            f"layout {name!r} takes no options, got {more[0]!r}; write its letters ({letters}) and backbone.layout out"
        )
    if layout is not None:
        raise ValueError(f"attention names the layout {name!r}, so backbone.layout={layout!r} has to go")
    preset = PRESETS[name]
    word = preset.word(depth)
    return {letter: dict(chosen) for letter, chosen in preset.letters.items() if letter in word}, word


def expand_layout(attention: Mapping[str, Any], layout: str | None, depth: int) -> list[dict[str, Any]]:
    """One `{"variant": name, **options}` per layer.

    Args:
        attention: one variant for all layers, `{"variant": "hybrid", "window": 64}`, one per letter,
            `{"s": {"variant": "softmax"}, "l": {"variant": "linear", "feature_map": "relu"}}`, or a preset,
            `{"layout": "based"}`.
        layout: a word over the letters, cycled to `depth`; None: every layer is `attention` itself.
        depth: number of layers.

    Raises:
        ValueError: a letter without meaning, an unknown variant, option or preset, or letters without a layout.
    """
    attention, layout = spell_out(attention, layout, depth)
    single = "variant" in attention
    if layout is None:
        if not single:
            raise ValueError(
                f"attention is given per letter ({', '.join(attention)}) but backbone.layout is missing; "
                f"write for example backbone.layout={''.join(attention)}"
            )
        check(attention["variant"], _options(attention))
        return [dict(attention) for _ in range(depth)]
    if single:
        raise ValueError(
            f"backbone.layout={layout!r} mixes variants by letter, but attention names one variant for all layers "
            f"({attention['variant']}); give attention per letter or drop the layout"
        )
    if not layout:
        raise ValueError("backbone.layout is empty; write a word such as 'lls'")
    layers = []
    for letter in layout:
        default = {"variant": LETTERS[letter]} if letter in LETTERS else {}
        chosen = {**default, **attention.get(letter, {})}
        if "variant" not in chosen:
            known = sorted({*attention, *LETTERS})
            raise ValueError(f"layout {layout!r}: letter {letter!r} has no meaning; known letters: {', '.join(known)}")
        check(chosen["variant"], _options(chosen))
        layers.append(dict(chosen))
    unused = set(attention) - set(layout)
    if unused:
        raise ValueError(f"layout {layout!r} does not use the letter {sorted(unused)[0]!r} that attention defines")
    return [dict(layers[i % len(layers)]) for i in range(depth)]


def _options(chosen: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in chosen.items() if key != "variant"}
