"""Names -> variants: what there is, what each takes, and how to build one.

A variant is a class in `core/attention/variants/` under the decorator

    @register("window", summary="softmax over the nearest keys", source="Beltagy et al. 2020, arXiv:2004.05150")
    class WindowAttention(Variant):
        def __init__(self, heads: Heads, *, window: int = 64): ...

Its options are the keyword-only parameters of `__init__`, so their names and defaults are written once. This module
reads them from the source files without running them: listing variants and checking a recipe never loads torch.
Variants registered at run time by other packages are read from the class itself.
"""

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue: a variant's name, purpose, paper and options with their defaults."""

    name: str
    summary: str
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    """What the source says each option is, such as "int | None"."""
    module: str = ""
    pick: str = ""
    stability: str = ""


LAYER_OPTIONS = {"short_conv": 0}
"""Options of `Attention` itself that may stand among a variant's: they go with every variant."""

_registered: dict[str, type] = {}
_entries: dict[str, Entry] = {}


def register(name: str, *, summary: str, source: str, pick: str = "", stability: str = "") -> Callable[[T], T]:
    """Class decorator: put a variant into the catalogue under `name`.

    Args:
        name: the word users type; lower case, unique.
        summary: one line for `longspan list variants`.
        source: paper or origin.
        pick: when to choose it, a few words for docs/variants.md.
        stability: what keeps its numbers in range, or puts them at risk; a few words for the same page.

    Raises:
        ValueError: the name is taken by another class.
    """

    def keep(cls: T) -> T:
        taken = _registered.get(name)
        shipped = _shipped().get(name)
        if shipped is not None and shipped.module != cls.__module__:
            raise ValueError(f"attention {name!r} is already registered by {shipped.module}; choose another name")
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"attention {name!r} is already registered by {taken.__module__}.{taken.__qualname__}")
        parameters = [p for p in inspect.signature(cls.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
        options = {p.name: p.default for p in parameters}
        kinds = {p.name: _written(p.annotation) for p in parameters}
        cls.name = name
        _registered[name] = cls
        _entries[name] = Entry(name, summary, source, options, kinds, cls.__module__, pick, stability)
        return cls

    return keep


def available() -> tuple[str, ...]:
    """Names of all variants, sorted; torch is not loaded."""
    return tuple(sorted({**_shipped(), **_entries}))


def entry(name: str) -> Entry:
    """The catalogue's line for `name`.

    Raises:
        ValueError: there is no such variant (the text shows the nearest spelling and all names).
    """
    found = _entries.get(name) or _shipped().get(name)
    if found is None:
        known = available()
        raise ValueError(f"unknown attention {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return found


def check(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError unless `name` is a variant and `options` are of it, or of the layer, and of their kind."""
    _check(name, options, {**entry(name).options, **LAYER_OPTIONS})


KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word", "None": "null"}
"""Kinds of options that are checked, as an error calls them; others are the variant's to check."""


def _check(name: str, options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for option, value in options.items():
        if option not in known:
            takes = f"it takes {', '.join(sorted(known))}" if known else "it takes no options"
            raise ValueError(f"attention {name!r} has no option {option!r}{nearest(option, known)}; {takes}")
        kinds = re.findall(r"\w+", entry(name).kinds.get(option, "")) or [type(known[option]).__name__]
        given = "None" if value is None else type(value).__name__
        if not set(kinds) - set(KINDS) and given not in (*kinds, *(["int"] if "float" in kinds else [])):
            told = " or ".join(KINDS[kind] for kind in kinds)
            raise ValueError(f"{name}: {option} must be {told} (default {known[option]!r}), got {value!r}")


def _written(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def variant_class(name: str) -> type:
    """The class behind `name`; imports its file (and so torch)."""
    found = entry(name)
    if name not in _registered:
        import_module(found.module)
    return _registered[name]


def build(name: str, heads: Any, **options: Any) -> Any:
    """Build the variant `name` for these heads.

    Args:
        name: one of `available()`.
        heads: a `core.attention.contract.Heads` (number of query and key heads, their widths).
        **options: the variant's own options; `entry(name).options` lists them with defaults.

    Returns:
        The variant, an `nn.Module` from (q, k, v) to `Attended`.

    Raises:
        ValueError: unknown name or option, or a value that the variant refuses.
    """
    _check(name, options, entry(name).options)
    return variant_class(name)(heads, **options)


def nearest(word: str, choices: Iterable[str]) -> str:
    """ " (did you mean 'linear'?)" when a choice is spelled like `word`, else the empty string."""
    close = get_close_matches(str(word).lower(), list(choices), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


_REGISTERED = re.compile(r"^@register\((?:.|\n)*?^class .*\n(?:[ \t].*\n|\n)*", re.MULTILINE)
"""A decorated class in a source file, up to the next line that is not indented: parsing these alone and not whole files
takes a fifth of the time (2026-11-25), and every command waits for it."""


@cache
def _shipped() -> dict[str, Entry]:
    """The variants of this package, read from their source files without importing them."""
    found, folder = {}, Path(__file__).parent / "variants"
    for path in sorted(folder.glob("**/*.py")):
        module = ".".join(("core.attention.variants", *path.relative_to(folder).with_suffix("").parts))
        for text in _REGISTERED.findall(path.read_text(encoding="utf-8")):
            cls = ast.parse(text).body[0]
            assert isinstance(cls, ast.ClassDef)
            call = cls.decorator_list[0]
            assert isinstance(call, ast.Call)
            name = ast.literal_eval(call.args[0])
            words = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
            options, kinds = _options(cls)
            found[name] = Entry(name, options=options, kinds=kinds, module=module, **words)
    return found


def _options(cls: ast.ClassDef) -> tuple[dict[str, Any], dict[str, str]]:
    """(option -> default, option -> annotation)."""
    for node in cls.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            given = node.args.kwonlyargs
            defaults = [None if value is None else ast.literal_eval(value) for value in node.args.kw_defaults]
            kinds = {one.arg: ast.unparse(one.annotation) for one in given if one.annotation is not None}
            return {one.arg: value for one, value in zip(given, defaults)}, kinds
    return {}, {}
