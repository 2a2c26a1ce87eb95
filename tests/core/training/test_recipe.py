"""Recipes: precedence, overrides, YAML's traps, and one line per mistake with the nearest spelling."""

import re

import jsonschema
import pytest
import yaml

from core.training.errors import UserError
from core.training.recipe import build_recipe, dump, load_recipe, recipes, schema
from core.training.yaml_values import parse_yaml, read_yaml


def test_defaults_then_file_then_override(toy):
    assert load_recipe("toy/demo").optim.betas == (0.9, 0.999)  # default
    assert load_recipe("toy/demo").optim.lr == 1e-2  # file, where 1e-2 is a string to plain YAML
    assert load_recipe("toy/demo", ["optim.lr=3e-4"]).optim.lr == 3e-4
    assert load_recipe("toy/demo", ["optim.lr=3e-4", "optim.lr=1"]).optim.lr == 1
    assert load_recipe("toy/demo").source == "toy/demo"


def test_dump_and_load_are_inverse(toy):
    overrides = [
        "attention={s: softmax, l: {variant: linear, feature_map: relu}}",
        "backbone.layout=lls",
        "model.trap='1e3'",
        "model.judge=12:30",
    ]
    recipe = load_recipe("toy/demo", overrides)
    (toy / "copy.yaml").write_text(dump(recipe))
    again = load_recipe("copy.yaml")
    assert again.model_dump() == recipe.model_dump()
    assert again.attention == {"s": {"variant": "softmax"}, "l": {"variant": "linear", "feature_map": "relu"}}


@pytest.mark.parametrize(
    ("overrides", "attention"),
    [
        (["attention=linear"], {"variant": "linear", "feature_map": "elu"}),
        (["attention=window"], {"variant": "window", "window": 8}),
        (["attention=softmax"], {"variant": "softmax"}),
        (["attention.window=16"], {"variant": "hybrid", "window": 16, "feature_map": "elu"}),
        (["attention=window", "attention.window=4"], {"variant": "window", "window": 4}),
        (["attention={variant: linear}"], {"variant": "linear"}),
    ],
)
def test_switching_the_variant_keeps_the_options_that_the_new_one_has(overrides, attention, toy):
    values = {"app": "toy", "attention": {"variant": "hybrid", "window": 8, "feature_map": "elu"}}
    assert build_recipe(values, overrides).attention == attention


def test_switching_the_variant_keeps_the_options_of_the_layer(toy):
    values = {"app": "toy", "attention": {"variant": "hybrid", "window": 8, "short_conv": 3}}
    assert build_recipe(values, ["attention=linear"]).attention == {"variant": "linear", "short_conv": 3}


@pytest.mark.parametrize(
    ("values", "overrides", "told"),
    [
        ({"app": "toy", 1: 2}, [], "recipe: unknown key '1'; known there: app, "),
        ({"app": ["toy"]}, [], "recipe: app: unknown app ['toy'] (did you mean 'toy'?); known: "),
        ({"app": "toy"}, ["data={1: 2}"], "override 'data={1: 2}': unknown key 'data.1'; known there: items, "),
        (
            {"app": "toy"},
            ["backbone.positions=ropee"],
            "must be 'sinusoidal', 'learned', 'rope', 'rope2d' or 'alibi', got",
        ),
        ({"app": "toy"}, ["backbone.positions=ropee"], "got 'ropee' (did you mean 'rope'?)"),
    ],
)
def test_odd_keys_and_values_are_told_in_one_line(values, overrides, told, toy):
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        build_recipe(values, overrides)
    assert len(str(caught.value).splitlines()) == 1


def test_one_variant_for_all_layers_drops_the_layout(toy):
    values = {"app": "toy", "attention": {"l": "linear"}, "backbone": {"layout": "lls"}}
    assert build_recipe(values).attention == {"l": {"variant": "linear"}}
    recipe = build_recipe(values, ["attention=window"])
    assert recipe.attention == {"variant": "window"}
    assert recipe.backbone.layout is None


@pytest.mark.parametrize("value", ["sandwich", {"layout": "sandwich"}])
def test_a_named_layout_is_spelled_out_for_the_depth(value, toy):
    values = {"app": "toy", "attention": value, "backbone": {"depth": 4}}
    recipe = build_recipe(values)
    assert recipe.backbone.layout == "slls"
    assert recipe.attention == {"s": {"variant": "softmax"}, "l": {"variant": "linear"}}
    (toy / "copy.yaml").write_text(dump(recipe))
    assert load_recipe("copy.yaml").model_dump() == recipe.model_dump()
    jsonschema.validate(values, schema("toy"))
    for overrides in (["attention=based"], ["attention={layout: based}"]):
        based = build_recipe(values, overrides)
        assert (based.backbone.layout, based.attention["w"]["window"]) == ("lw", 64)
        assert build_recipe(based.model_dump(mode="json"), ["attention=linear"]).backbone.layout is None


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("attention=linaer", "attention: unknown attention 'linaer' (did you mean 'linear'?); known: "),
        ("attention={variant: window, windw: 3}", "attention 'window' has no option 'windw' (did you mean 'window'?)"),
        ("attention={variant: window, window: 0}", "window must be at least 1 (a position sees itself), got 0"),
        (
            "attention={variant: window, window: wide}",
            "attention: window must be a whole number, got 'wide' (attention 'window')",
        ),
        (
            "attention={variant: window, window: true}",
            "attention: window must be a whole number, got True (attention 'window')",
        ),
        ("attention=3", "attention: must be a variant's name or a mapping with the key 'variant', got 3"),
        ("attention={windw: 3}", "must name a 'variant', or map letters"),
        ("attention={}", "must name a 'variant', or map letters"),
        ("attention={l: linear}", "toy/demo with optim.ema=0.5 attention={l: linear}: attention is given per letter"),
        ("backbone.dept=3", "unknown key 'backbone.dept' (did you mean 'depth'?); known there: depth, dim"),
        ("backbon.depth=3", "unknown key 'backbon' (did you mean 'backbone'?)"),
        ("data.itms=3", "unknown key 'data.itms' (did you mean 'items'?); known there: items, width"),
        ("backbone.depth=four", "backbone.depth must be a valid integer, got 'four'"),
        ("backbone.depth=2.5", "backbone.depth must be a valid integer"),
        ("backbone.dim='64'", "backbone.dim must be a valid integer, got '64'"),
        ("backbone.depth=0", "backbone.depth must be greater than or equal to 1, got 0"),
        ("backbone.heads=3", "backbone: heads must divide dim: 3 does not divide 16; try 1, 2 or 4"),
        ("backbone.layout=xyz", "toy/demo with optim.ema=0.5 backbone.layout=xyz: "),
        ("optim.betas=[0.9]", "'optim.betas.1' is missing"),
        ("optim.warmup=2.5", "warmup must be a share below 1 or a whole number of steps, got 2.5"),
        ("optim.lr=.nan", "optim.lr must be a finite number"),
        ("trainer.precision=fp16", "trainer.precision must be '32-true', 'bf16-mixed' or '16-mixed', got 'fp16'"),
        ("trainer.deterministic=yes", "trainer.deterministic must be a valid boolean, got 'yes'"),
        ("data=3", "data must be an object, got 3"),
        ("optim.lr.x=3", "optim.lr is a value (0.01), not a section"),
        ("seed", "override 'seed' must have the form key=value"),
        ("=3", "must have the form key=value"),
        ("data.items=[1", "the value is not YAML"),
        ("app=vision", "a recipe belongs to its app"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_override(override, told, toy):
    with pytest.raises(UserError) as raised:
        load_recipe("toy/demo", ["optim.ema=0.5", override])
    assert told in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert override in str(raised.value)
    assert ("optim.ema=0.5" in str(raised.value)) == ("optim.ema=0.5" in told), "another override is blamed"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("attention: linear\n", r"bad.yaml: the key 'app' is missing; write 'app: NAME', known apps: .*toy"),
        ("app: toi\n", r"bad.yaml: app: unknown app 'toi' \(did you mean 'toy'\?\)"),
        ("app: toy\noptim: {lr: fast}\n", r"bad.yaml: optim.lr must be a valid number, got 'fast'"),
        ("app: toy\noptm: {}\n", r"bad.yaml: unknown key 'optm' \(did you mean 'optim'\?\)"),
        ("app: toy\nseed: 1\nseed: 2\n", r"bad.yaml:1:1: the key 'seed' is there twice"),
        ("app: toy\n  seed: [1\n", r"bad.yaml:2:7: "),
        ("- app\n", r"bad.yaml: must be a mapping of keys .*, got list"),
        ("", r"bad.yaml: must be a mapping of keys .*, got NoneType"),
        ("app: toy\ndata: !!python/object:os.system {}\n", r"bad.yaml:2:7: could not determine a constructor"),
        ("app: toy\ndata: {items: !!set {1}}\n", r"bad.yaml: only plain YAML values"),
    ],
)
def test_a_mistake_in_the_file_names_the_file(text, told, toy):
    (toy / "bad.yaml").write_text(text)
    with pytest.raises(UserError) as raised:
        load_recipe("bad.yaml")
    assert re.fullmatch(told + ".*", str(raised.value))


def test_two_mistakes_are_two_lines(toy):
    with pytest.raises(UserError) as raised:
        load_recipe("toy/demo", ["optim.lr=-1", "trainer.epochs=0"])
    assert [line.split(":")[0] for line in str(raised.value).splitlines()] == [
        "override 'optim.lr=-1'",
        "override 'trainer.epochs=0'",
    ]


def test_what_is_wrong_with_a_section_is_blamed_on_the_overrides_that_it_names(toy):
    with pytest.raises(
        UserError, match=r"^override 'backbone.dim=16 backbone.heads=3': backbone: heads must divide dim"
    ):
        load_recipe("toy/demo", ["backbone.dim=16", "backbone.heads=3", "backbone.mlp_dim=32"])


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("toy/demoo", "unknown recipe 'toy/demoo' (did you mean 'toy/demo'?); toy has: demo"),
        ("toi/demo", "unknown recipe 'toi/demo' (did you mean 'toy/demo'?)"),
        ("mime.yaml", "there is no recipe file 'mime.yaml' (did you mean 'mine.yaml'?)"),
    ],
)
def test_unknown_recipe(reference, told, toy):
    (toy / "mine.yaml").write_text("app: toy\n")
    with pytest.raises(UserError) as raised:
        load_recipe(reference)
    assert told in str(raised.value)


def test_yaml_means_what_people_write():
    assert parse_yaml("[1e-3, 1E5, .5, 1., -2e+3, .inf]") == [1e-3, 1e5, 0.5, 1.0, -2e3, float("inf")]
    assert parse_yaml("[0, -7, 1_000, 0x10, 1__0]") == [0, -7, 1000, 16, 10]
    assert parse_yaml("[no, off, yes, on, NO]") == ["no", "off", "yes", "on", "NO"]
    assert parse_yaml("[true, False, null, ~]") == [True, False, None, None]
    assert parse_yaml("[2016-07-01, 12:30, 010, 1.2.3, e5, 1e]") == ["2016-07-01", "12:30", "010", "1.2.3", "e5", "1e"]
    # Plain PyYAML reads the same otherwise.
    text = "a: {b: [1, 2.5, 'x', null], c: 0x10}\nd: >\n  long\n  text\n"
    assert parse_yaml(text) == yaml.safe_load(text)


def test_the_schema_accepts_every_recipe_and_refuses_a_mistake(toy):
    found = [(reference, path) for reference, path, _ in recipes() if reference.startswith("toy/")]
    assert len(found) == 1
    described = schema("toy")
    jsonschema.Draft202012Validator.check_schema(described)
    for _, path in found:
        jsonschema.validate(read_yaml(path), described)
    jsonschema.validate({"app": "toy", "attention": "linear"}, described)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"app": "toy", "attention": "linaer"}, described)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"app": "toy", "optim": {"lrr": 1}}, described)
    assert described["$defs"]["OptimSection"]["properties"]["lr"]["description"] == "Peak learning rate."
    undescribed = [
        f"{name}.{key}"
        for name, section in described["$defs"].items()
        for key, field in section.get("properties", {}).items()
        if not field.get("description")
    ]
    assert undescribed == []
