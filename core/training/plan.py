"""From a request to a plan: which variants, seeds and settings, and whether comparing them is fair.

Everything is checked on the resolved recipes before the first run starts: unknown names, a variant given twice under
two spellings, and anything but the attention that would differ between two runs.
"""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from core.attention.registry import available, entry, nearest
from core.layout import PRESETS
from core.training.app import get_app
from core.training.differences import differing, flat
from core.training.errors import UserError
from core.training.ledger import Plan
from core.training.recipe import Recipe, load_recipe
from core.training.workers import places
from core.training.yaml_values import parse_list, write_yaml

OWN = "recipe"  # the label for the attention that the recipe itself names, such as a layout of several variants


def make_plan(
    recipe_ref: str | Path,
    *,
    variants: Sequence[str],
    seeds: int | Sequence[int],
    jobs: int = 1,
    overrides: Sequence[str] = (),
    baseline: str | None = None,
    grid: Sequence[str] = (),
) -> Plan:
    """Check the whole request against the resolved recipes.

    Raises:
        UserError: anything that would make the comparison impossible or unfair.
    """
    _check_overrides([*overrides, *grid])
    if jobs < 1:
        raise UserError(f"jobs must be at least 1, got {jobs}")
    chosen = _seeds(seeds)
    labels = _labels(variants)
    baseline = baseline or labels[0]
    if baseline not in labels:
        raise UserError(
            f"the baseline {baseline!r} takes no part{nearest(baseline, labels)}; variants: {', '.join(labels)}"
        )
    settings = _settings(grid)
    attentions: dict[str, dict[str, Any]] = {}
    configs = []
    judges: dict[tuple[str, str], Sequence[str]] = {}
    for setting in settings:
        resolved = {
            label: load_recipe(recipe_ref, [*overrides, *setting, *attention_overrides(label), f"seed={chosen[0]}"])
            for label in labels
        }
        before = attentions
        config, attentions = _same_but_attention(resolved)
        for label in before:
            if before[label] != attentions[label]:
                raise UserError(
                    f"{label!r} does not mean the same layers in every setting ({before[label].get('layout')} and "
                    f"{attentions[label].get('layout')}); compare one of these settings at a time"
                )
        configs.append(config)
        one = next(iter(resolved.values()))
        app = get_app(one.app).judged_for(one)
        judges.setdefault((app.metric, app.better), setting)
    if len(judges) > 1:
        told = " and ".join(f"{metric} ({' '.join(setting)})" for (metric, _), setting in judges.items())
        raise UserError(f"the settings are judged by different metrics, {told}; compare them one at a time")
    # Side by side each run gets its share of the cores, unless the user has said how many.
    own = configs[0]["trainer"]["threads"]
    plan = Plan(
        recipe=str(recipe_ref),
        app=app.name,
        metric=app.metric,
        better=app.better,
        variants=attentions,
        seeds=chosen,
        settings=settings,
        baseline=baseline,
        overrides=tuple(overrides),
        jobs=jobs,
        threads=own if own is not None and jobs > 1 else places(jobs, _cores()),
        configs=tuple(configs),
        environment=_environment(),
    )
    return replace(plan, command=command_of(plan))


def _check_overrides(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key == "attention" or key.startswith("attention."):
            raise UserError(
                f"override {override!r}: the attention is what is compared; say it in the variant, such as "
                f"--variants window:window=16,{OWN}"
            )
        if key == "seed":
            raise UserError(f"override {override!r}: say it with --seeds, as a number of seeds or a list")


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen:
        raise UserError(f"seeds must be at least one, got {seeds!r}")
    if len(set(chosen)) < len(chosen):
        raise UserError(f"a seed is there twice: {', '.join(map(str, chosen))}")
    return chosen


def _labels(variants: Sequence[str]) -> list[str]:
    labels = [label.strip() for label in variants if label.strip()]
    if not labels:
        raise UserError(
            f"name the variants to compare, such as --variants softmax,linear; known: {', '.join(available())}"
        )
    for i, label in enumerate(labels):
        name = label.partition(":")[0]
        if name != OWN and name not in available() and name not in PRESETS:
            raise UserError(
                f"unknown attention {name!r}{nearest(name, (*available(), *PRESETS))}; "
                f"known: {', '.join((*available(), *PRESETS))}, and {OWN!r} for the recipe's own"
            )
        if label in labels[:i]:
            raise UserError(f"the variant {label!r} is there twice")
        if any("=" not in option for option in label.split(":")[1:]) or (name == OWN and label != OWN):
            raise UserError(f"variant {label!r} must have the form name or name:option=value:option=value")
    return labels


def attention_overrides(label: str) -> list[str]:
    """Overrides that turn a recipe into the variant."""
    name, *options = label.split(":")
    return [] if name == OWN else [f"attention={name}", *(f"attention.{option}" for option in options)]


def _settings(grid: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Every point of the grid as a tuple of overrides; one empty tuple where there is no grid."""
    axes: dict[str, list[str]] = {}
    for axis in grid:
        key, equals, text = axis.partition("=")
        key = key.strip()
        try:
            values = parse_list(text) if equals and key else []
        except yaml.YAMLError:
            values = []
        if not values:
            raise UserError(f"grid {axis!r} must have the form key=value,value")
        if key in axes:
            raise UserError(f"grid {axis!r}: {key} is there twice; give all its values at once, as in key=value,value")
        for i, (written, value) in enumerate(values):
            for before, other in values[:i]:
                if value == other and isinstance(value, bool) == isinstance(other, bool):
                    raise UserError(f"grid {axis!r}: {before} and {written} are the same value")
        axes[key] = [f"{key}={written}" for written, _ in values]
    return tuple(product(*axes.values()))


def flow(value: Any) -> str:
    """A value as one line of YAML."""
    return write_yaml(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def _same_but_attention(recipes: dict[str, Recipe]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The part that all recipes share, and each one's attention; UserError where anything else differs."""
    attentions: dict[str, dict[str, Any]] = {}
    shared: dict[str, Any] = {}
    for label, recipe in recipes.items():
        config = recipe.model_dump(mode="json")
        attention, layout = complete(config.pop("attention")), config["backbone"].pop("layout")
        del config["seed"]
        attentions[label] = attention if layout is None else {"layout": layout, **attention}
        shared = shared or config
        for key in differing(shared, config):
            raise UserError(
                f"{label} and {next(iter(recipes))} differ in {key} ({flat(config).get(key)!r} and "
                f"{flat(shared).get(key)!r}); only the attention may differ in a comparison"
            )
        for other, chosen in attentions.items():
            if other != label and chosen == attentions[label]:
                raise UserError(f"{other!r} and {label!r} are the same attention here: {flow(chosen)}")
    return shared, attentions


def complete(attention: dict[str, Any]) -> dict[str, Any]:
    """An attention section with the options that it leaves to their defaults."""
    if "variant" not in attention:
        return {letter: complete(chosen) for letter, chosen in attention.items()}
    return {"variant": attention["variant"], **entry(attention["variant"]).options, **attention}


def command_of(plan: Plan) -> str:
    """The command that asks for all of a plan."""
    words = ["longspan", "compare", plan.recipe, *plan.overrides, "--variants", ",".join(plan.variants)]
    count = len(plan.seeds)
    seeds = str(count) if plan.seeds == tuple(range(count)) else ",".join(map(str, plan.seeds))
    seeds += "," if count == 1 and plan.seeds != (0,) else ""  # "3" would be three seeds
    words += ["--seeds", seeds, "--baseline", plan.baseline]
    axes: dict[str, list[str]] = {}
    for setting in plan.settings:
        for word in setting:
            key, _, value = word.partition("=")
            if value not in axes.setdefault(key, []):
                axes[key].append(value)
    for key, values in axes.items():
        words += ["--grid", f"{key}={','.join(values)}"]
    return shlex.join([*words, "--jobs", str(plan.jobs)])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _environment() -> dict[str, str]:
    """Versions and machine, asked for without loading anything heavy; the runs add what only they know."""
    packages = ("longspan", "torch", "pytorch-lightning", "numpy")
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": str(_cores()),
    }
