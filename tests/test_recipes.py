"""Every recipe of every app: it parses, its head can be checked, and the command lists it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from core.training.app import apps
from core.training.errors import UserError
from core.training.recipe import dump, load_recipe, schema
from core.training.recipe_files import find_recipe, recipes
from core.training.yaml_values import read_yaml

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    f"{path.parts[-3]}/{path.stem}": path
    for path in sorted((ROOT / "apps").rglob("*.y*ml"))
    if path.parts[-2] == "recipes"
}


def test_the_walk_and_the_command_find_the_same_recipes():
    stray = [path for path in (ROOT / "apps").rglob("*.y*ml") if path not in FILES.values()]
    assert stray == [], "a YAML file that no command can name"
    assert len(FILES) >= 9, "the walk found too few recipes"
    # The tests of the glue have an app of their own, which may be there as well.
    assert [ref for ref, path, _ in recipes() if ROOT / "apps" in path.parents] == sorted(FILES)
    listed = subprocess.run(
        [sys.executable, "-m", "apps", "list", "recipes"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    for reference in FILES:
        assert re.search(rf"(?<!\S){re.escape(reference)}(?!\S)", listed), f"{reference} is not listed:\n{listed}"


@pytest.mark.parametrize("reference", FILES)
def test_recipe_parses_and_is_complete(reference):
    recipe = load_recipe(reference)
    assert reference.split("/")[0] == recipe.app
    # What is written beside the results says the same as what was read.
    again = yaml.safe_load(dump(recipe))
    assert type(recipe).model_validate_json(json.dumps(again)).model_dump() == recipe.model_dump()
    jsonschema.validate(read_yaml(FILES[reference]), schema(recipe.app))
    jsonschema.validate(again, schema(recipe.app))


@pytest.mark.parametrize("name", apps())
def test_the_schema_refuses_what_the_loader_refuses(name):
    reference = f"{name}/demo"
    values = read_yaml(find_recipe(reference)[0])
    values["trainer"] = {**values.get("trainer", {}), "epochz": 3}
    with pytest.raises(jsonschema.ValidationError, match="epochz"):
        jsonschema.validate(values, schema(name))
    with pytest.raises(UserError, match=r"trainer\.epochz.*did you mean 'epochs'"):
        load_recipe(reference, ["trainer.epochz=3"])


# --- the head: a comment before the first key -------------------------------------------------------------------------

KEYS = ("command", "hardware", "time", "peak memory", "expected", "published")
MEASURED = ("time", "peak memory", "expected")


def head_of(text: str) -> tuple[str, dict[str, str]]:
    """First line, and the `key: value` lines of the head; a value goes on over deeper indented lines."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:])
    first, values, key = (lines[0].strip() if lines else ""), {}, None
    for line in lines[1:]:
        found = re.match(rf" ({'|'.join(KEYS)}): +(\S.*)$", line)
        if found:
            key = found[1]
            values[key] = found[2]
        elif key and line.startswith("  "):
            values[key] += " " + line.strip()
        else:
            key = None
    return first, values


def faults(reference: str, text: str, metric: str) -> list[str]:
    """Which rules of a head this recipe breaks. A figure may be missing, but then the head says why."""
    first, head = head_of(text)
    rules = {
        "first line is one sentence": 20 <= len(first) <= 110,
        **{f"has {key}": bool(head.get(key)) for key in KEYS},
        "command is longspan and names this recipe": bool(
            re.match(rf"longspan \w+ {re.escape(reference)}(\s|$)", head.get("command", ""))
        ),
    }
    shapes = {
        "time": r"(about |under )?[\d.]+ (seconds|minutes?|hours?)",
        "peak memory": r"(about |under )?[\d.]+ (MB|GB)",
        "expected": rf".*\b{metric}\b.*\d.*\b\d+ seeds?\b|.*\b(floor|ridge)",
    }
    for key, shape in shapes.items():
        rules[f"{key} has its unit, or a reason why not"] = bool(
            re.match(rf"{shape}|not measured: .{{10,}}", head.get(key, ""))
        )
    return [rule for rule, kept in rules.items() if not kept]


@pytest.mark.parametrize("reference", FILES)
def test_recipe_head_can_be_checked(reference):
    metric = apps()[reference.split("/")[0]].judged_for(load_recipe(reference)).metric
    assert faults(reference, FILES[reference].read_text(), metric) == []


@pytest.mark.parametrize("reference", FILES)
def test_what_can_be_measured_here_is(reference, shared_data):
    recipe = load_recipe(reference)
    file = getattr(recipe.data, "file", None)
    at_hand = getattr(recipe.data, "generated", None) is not None
    at_hand |= file is not None and any(shared_data.glob(f"*/{file}"))
    head = head_of(FILES[reference].read_text())[1]
    unmeasured = [key for key in MEASURED if head[key].startswith("not measured")]
    assert not (at_hand and unmeasured), f"the data of {reference} is at hand, measure its {' and '.join(unmeasured)}"


GOOD_HEAD = """\
# Forecast a generated series, two channels, 24 steps ahead
#
# command:      longspan fit x/demo
# hardware:     2 CPU cores
# time:         1 minutes
# peak memory:  600 MB
# expected:     test mse 0.251 +- 0.002 over 3 seeds
#               (2026-11-21)
# published:    none (generated data)
app: x
"""


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("# Forecast a generated series, two channels, 24 steps ahead", "# A demo", "first line is one sentence"),
        ("# published:", "# publisht:", "has published"),
        ("x/demo", "x/demos", "command is longspan and names this recipe"),
        ("longspan fit", "python -m fit", "command is longspan and names this recipe"),
        ("1 minutes", "soon", "time has its unit, or a reason why not"),
        ("1 minutes", "not measured", "time has its unit, or a reason why not"),
        ("600 MB", "600", "peak memory has its unit, or a reason why not"),
        ("mse 0.251", "error 0.251", "expected has its unit, or a reason why not"),
        ("over 3 seeds", "once", "expected has its unit, or a reason why not"),
    ],
)
def test_a_faulty_head_is_seen(old, new, fault):
    assert faults("x/demo", GOOD_HEAD, "mse") == []
    assert faults("x/demo", GOOD_HEAD.replace("600 MB", "not measured: no such machine"), "mse") == []
    assert faults("x/demo", GOOD_HEAD.replace(old, new), "mse") == [fault]
