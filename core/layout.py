"""The layout word: which attention in which layer, written as a short word that is repeated over the depth.

    "lls" over 6 layers = linear linear softmax linear linear softmax

A letter means what the recipe's `attention` maps it to; letters that it leaves out mean the variant in `LETTERS`
with its default options. This is the one place that says what a letter means. No torch here: recipes are checked
before it is loaded.
"""

from collections.abc import Mapping
from typing import Any

from core.attention.registry import check

LETTERS = {"s": "softmax", "w": "window", "l": "linear", "h": "hybrid"}


def expand_layout(attention: Mapping[str, Any], layout: str | None, depth: int) -> list[dict[str, Any]]:
    """One `{"variant": name, **options}` per layer.

    Args:
        attention: one variant for all layers, `{"variant": "hybrid", "window": 64}`, or one per letter,
            `{"s": {"variant": "softmax"}, "l": {"variant": "linear", "feature_map": "relu"}}`.
        layout: a word over the letters, cycled to `depth`; None: every layer is `attention` itself.
        depth: number of layers.

    Raises:
        ValueError: a letter without meaning, an unknown variant or option, or letters without a layout.
    """
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
