"""Recipes: what a YAML file and `key=value` on the command line may say, and how they are read.

Defaults < recipe file < overrides. Every mistake is a `UserError` of one line that names the file, the dotted key and
the nearest spelling. No torch here.
"""

import json
import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, PrivateAttr, ValidationError, model_validator

from core.attention.registry import LAYER_OPTIONS, available, entry, nearest
from core.layout import expand_layout, spell_out
from core.training.app import App, apps, get_app
from core.training.errors import UserError
from core.training.recipe_files import find_recipe, recipes
from core.training.sections import AttentionSection, BackboneSection, OptimSection, Section, TrainerSection
from core.training.yaml_values import parse_yaml, read_yaml, write_yaml

__all__ = [
    "AttentionSection",
    "BackboneSection",
    "OptimSection",
    "Recipe",
    "Section",
    "TrainerSection",
    "build_recipe",
    "dump",
    "find_recipe",
    "load_recipe",
    "recipes",
    "schema",
]


class Recipe(Section):
    """One run, completely: apps subclass this with their own `data` and `model` sections."""

    app: str
    """Which app the recipe is for."""
    attention: AttentionSection = Field(default_factory=lambda: {"variant": "softmax"})
    """The variant with its options, a mapping from the letters of backbone.layout to variants, or a named layout."""
    backbone: BackboneSection = Field(default_factory=BackboneSection)
    """The stack of blocks around the attention."""
    data: Section = Field(default_factory=Section)
    """Where the data comes from and how it is cut."""
    model: Section = Field(default_factory=Section)
    """What the app puts around the backbone."""
    optim: OptimSection = Field(default_factory=OptimSection)
    """The optimiser."""
    trainer: TrainerSection = Field(default_factory=TrainerSection)
    """The loop."""
    predict: Section = Field(default_factory=Section)
    """What `longspan predict` and `inspect` do with a user's file; `predict.key=value` may change it after training."""
    seed: int = Field(0, ge=0)
    """Of weights, data order and dropout."""

    _source: str = PrivateAttr("recipe")

    @property
    def source(self) -> str:
        """Reference or path that this recipe was loaded from; "recipe" when it was made in Python."""
        return self._source

    def judged_by(self) -> tuple[str, Literal["lower", "higher"]] | None:
        """The primary metric of this recipe's task and its direction; None: those of the app."""
        return None

    @model_validator(mode="after")
    def _layout_fits(self) -> Self:
        # Spelled out here, so that a run's recipe says what it was trained with, whatever a name means later.
        self.attention, word = spell_out(self.attention, self.backbone.layout, self.backbone.depth)
        if word != self.backbone.layout:
            self.backbone = self.backbone.model_copy(update={"layout": word})
        expand_layout(self.attention, word, self.backbone.depth)
        return self


def load_recipe(reference: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key=value` overrides, and check all of it.

    Args:
        reference: "app/name" of a shipped recipe, or the path of a YAML file.
        overrides: "dotted.key=value"; the value is read as YAML and replaces what was there. `attention=linear`
            switches the variant and keeps those options that the new one has; it drops backbone.layout.

    Returns:
        The app's own subclass of Recipe.

    Raises:
        UserError: no such recipe, or any mistake in it, with file, dotted key and nearest spelling.
    """
    path, source = find_recipe(reference)
    values = read_yaml(path)
    return build_recipe(values, overrides, source=source)


def build_recipe(values: dict[str, Any], overrides: Sequence[str] = (), *, source: str = "recipe") -> Recipe:
    """A recipe from plain values, as `load_recipe` does after reading its file."""
    values = deepcopy(values)  # overrides are written into it
    if "app" not in values:
        raise UserError(f"{source}: the key 'app' is missing; write 'app: NAME', known apps: {', '.join(apps())}")
    schema = recipe_class(values["app"], source)
    given = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"override {override!r} must have the form key=value, such as optim.lr=1e-3")
        key = key.strip()
        if key == "app":
            raise UserError(f"override {override!r}: a recipe belongs to its app; choose another recipe instead")
        given[key] = override
        _put(values, override, _value(override, text), schema)
    try:
        # By way of JSON: strict there means no "64" for 64, while paths, dates and tuples are written as YAML has them.
        text = json.dumps(values)
        values = json.loads(text)  # its keys are words, as those in pydantic's errors are
        recipe = schema.model_validate_json(text, strict=True)
    except TypeError as error:
        raise UserError(f"{source}: only plain YAML values can stand in a recipe ({error})") from error
    except ValidationError as error:
        lines = dict.fromkeys(_line(problem, schema, values, source, given) for problem in error.errors())
        raise UserError("\n".join(lines)) from error
    recipe._source = source
    return recipe


def recipe_class(app: Any, source: str) -> type[Recipe]:
    """The schema of the app called `app`."""
    if not isinstance(app, str) or app not in apps():
        near = nearest(str(app), apps())
        raise UserError(f"{source}: app: unknown app {app!r}{near}; known: {', '.join(apps()) or 'none'}")
    found = get_app(app).part("recipe")
    if not (isinstance(found, type) and issubclass(found, Recipe)):
        raise UserError(f"app {app!r}: {get_app(app).recipe} must be a subclass of core.training.recipe.Recipe")
    return found


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; `load_recipe` reads it back to the same values."""
    return write_yaml(recipe.model_dump(mode="json"), allow_unicode=True, width=120)


def schema(app: str | App) -> dict[str, Any]:
    """JSON Schema of an app's recipes, for editors."""
    app = get_app(app) if isinstance(app, str) else app
    return recipe_class(app.name, "schema").model_json_schema()


def _value(override: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not YAML; quote it, as in key='\"...\"'") from error


def _put(values: dict[str, Any], override: str, value: Any, schema: type[BaseModel]) -> None:
    """Set a dotted key; missing sections on the way are made, so that the schema can judge the whole path."""
    key = override.partition("=")[0].strip()
    *sections, last = key.split(".")
    if key == "attention":
        value = _switch(values.get("attention"), value)
        single = isinstance(value, str) or (isinstance(value, dict) and "variant" in value)
        if single and isinstance(values.get("backbone"), dict):
            values["backbone"].pop("layout", None)  # one variant for all layers: the word has lost its meaning
    for at, section in enumerate(sections):
        inner = values.get(section)
        if section == "attention" and at == 0:
            if inner is None:
                inner = schema.model_fields["attention"].get_default(call_default_factory=True)
            inner = {"variant": inner} if isinstance(inner, str) else inner
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise UserError(
                f"override {override!r}: {'.'.join(sections[: at + 1])} is a value ({inner!r}), not a section"
            )
        values[section] = inner
        values = inner
    values[last] = value


def _switch(old: Any, new: Any) -> Any:
    """`attention=name`: the new variant with those of the old options that it has too."""
    if not isinstance(new, str) or new not in available() or not isinstance(old, dict) or "variant" not in old:
        return new
    return {"variant": new, **{k: v for k, v in old.items() if k in {**entry(new).options, **LAYER_OPTIONS}}}


def _line(problem: Any, schema: type[BaseModel], values: dict[str, Any], source: str, given: dict[str, str]) -> str:
    """One line for one of pydantic's errors: where it was written, the dotted key, what is wrong, what is right."""
    # Branches of a union and tags of validators appear in pydantic's path: keep what is a key of the user's values.
    keys: list[str] = []
    inner: Any = values
    for part in problem["loc"]:
        if isinstance(inner, dict) and part in inner:
            inner = inner[part]
        elif isinstance(inner, list) and isinstance(part, int):
            inner = inner[part] if part < len(inner) else None
        elif problem["type"] != "missing" or part != problem["loc"][-1]:
            continue
        keys.append(str(part))
    key = ".".join(keys)
    related = [o for o in given if key and (f"{key}.".startswith(f"{o}.") or o.startswith(f"{key}."))]
    if isinstance(inner, dict):  # a whole section: the overrides that the text names are to blame, else all inside it
        words = re.findall(r"\w+", problem["msg"])
        related = [o for o in related if o.rpartition(".")[2] in words] or related
    else:
        related = related[-1:]
    where = f"override {' '.join(given[o] for o in related)!r}" if related else source
    if not key and given:
        where = f"{source} with {' '.join(given.values())}"
    if problem["type"] == "extra_forbidden":
        fields = _fields(schema, keys[:-1])
        return f"{where}: unknown key {key!r}{nearest(keys[-1], fields)}; known there: {', '.join(fields)}"
    if problem["type"] == "missing":
        return f"{where}: {key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if problem["type"] in ("too_short", "too_long"):  # "List should have at least 1 item after validation, not 0"
        message = message.partition(" should ")[2].replace(" after validation", "")
        return f"{where}: {key} must {message}"
    if problem["type"] == "value_error":
        return f"{where}: {key}: {message}" if key else f"{where}: {message}"
    near = ""
    if problem["type"] == "literal_error":
        near = nearest(str(problem["input"]), re.findall("'([^']*)'", problem["ctx"]["expected"]))
    return f"{where}: {key} must be {message[:1].lower()}{message[1:]}, got {problem['input']!r}{near}"


def _fields(schema: type[BaseModel], keys: Iterable[str]) -> list[str]:
    """Names of the fields of the section that `keys` lead to."""
    for key in keys:
        field = schema.model_fields.get(key)
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if inner is None:
            return []
        schema = inner
    return list(schema.model_fields)
