"""Layout words and the patterns that have a name."""

import pytest

from core.attention.registry import available
from core.backbone import Encoder
from core.layout import LETTERS, PRESETS, expand_layout, spell_out


def word(name: str, depth: int) -> str:
    """The preset's variants, by the initials of their names."""
    return "".join(layer["variant"][0] for layer in expand_layout({"layout": name}, None, depth))


def test_patterns_are_what_their_papers_say():
    assert [word("based", n) for n in (1, 2, 5)] == ["l", "lw", "lwlwl"]
    assert [word("sandwich", n) for n in (1, 2, 3, 6)] == ["s", "ss", "sls", "slllls"]
    taylor, window = expand_layout({"layout": "based"}, None, 2)
    assert taylor == {"variant": "linear", "feature_map": "taylor", "feature_dim": 16, "short_conv": 3}
    assert window == {"variant": "window", "window": 64, "short_conv": 3}


@pytest.mark.parametrize("depth", [1, 2, 3, 7, 8, 12, 16, 32])
def test_patterns_that_split_the_depth(depth):
    _, jamba = spell_out({"layout": "jamba"}, None, depth)
    assert jamba is not None
    expanded = (jamba * depth)[:depth]
    assert expanded.count("s") == max(1, round(depth / 8 - 1e-9))
    assert set(expanded) <= {"s", "m"}
    _, transnormer = spell_out({"layout": "transnormer"}, None, depth)
    assert transnormer == "b" * (depth // 2) + "n" * (depth - depth // 2)


@pytest.mark.parametrize("name", PRESETS)
def test_a_pattern_is_a_model(name):
    assert name not in available(), "a name means one thing"
    preset = PRESETS[name]
    assert preset.summary
    assert preset.source
    encoder = Encoder(32, 8, 2, {"layout": name}, causal=True)
    built = [block.attention.variant.name for block in encoder]
    assert built == [layer["variant"] for layer in expand_layout({"layout": name}, None, 8)]
    assert set(built) == {chosen["variant"] for chosen in preset.letters.values()}


def test_letters_name_variants():
    assert {name for name in LETTERS.values() if name not in available()} == set()


@pytest.mark.parametrize(
    ("attention", "layout", "told"),
    [
        ({"layout": "sandwhich"}, None, r"unknown layout 'sandwhich' \(did you mean 'sandwich'\?\); known: based"),
        ({"layout": "based", "window": 3}, None, r"takes no options, got 'window'; write its letters \(l, w\)"),
        ({"layout": "based"}, "ls", r"so backbone.layout='ls' has to go"),
    ],
)
def test_mistakes_are_told(attention, layout, told):
    with pytest.raises(ValueError, match=told):
        expand_layout(attention, layout, 4)
