"""Data sets of the Hugging Face hub, or saved by its library on this machine, with values that need no library.

An address is "hub:organisation/name@configuration:split", or "hub:FOLDER:split" of what `save_to_disk` or a repository
left there. Class numbers come back as the names that the data set has for them, and images undecoded, as
{"bytes", "path"}, so that an app reads them by its own rules and one broken image stops nothing.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.attention.registry import nearest
from core.training.errors import UserError

HUB = "hub:"


def load(source: str) -> Any:
    """The `datasets.Dataset` of an address; without a split, "train".

    Raises:
        UserError: not an address, or nothing that can be loaded.
    """
    name, configuration, split = _parts(source)
    import datasets

    wanted = split or "train"
    if _is_saved(name):
        held = _saved(source, name)
        if wanted in held:
            return held[wanted]
        if split is None and len(held) == 1:
            return next(iter(held.values()))
        raise UserError(f"{source}: there is no split {wanted!r}{nearest(wanted, held)}; splits: {', '.join(held)}")
    return _asked(source, lambda: datasets.load_dataset(name, configuration, split=wanted))


def splits(source: str) -> list[str]:
    """Names of the splits of a data set, as it lists them; the address names none.

    Raises:
        UserError: as `load`.
    """
    name, configuration, _ = _parts(source)
    import datasets

    if _is_saved(name):
        return list(_saved(source, name))
    return _asked(source, lambda: datasets.get_dataset_split_names(name, configuration))


def names_split(source: str) -> bool:
    """Whether an address says which split."""
    return _parts(source)[2] is not None


def undecoded(found: Any) -> Any:
    """A `Dataset` whose columns of images give {"bytes", "path"}."""
    import datasets

    for column, feature in found.features.items():
        if isinstance(feature, datasets.Image) and feature.decode:
            found = found.cast_column(column, datasets.Image(decode=False))
    return found


def named(value: Any, feature: Any) -> Any:
    """A value with class names in place of class numbers, at any depth; None where the number means "unknown" (-1)."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return None if value is None or value < 0 else feature.names[value]
    if isinstance(feature, datasets.List | datasets.LargeList) and value is not None:
        return [named(one, feature.feature) for one in value]
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: named(one, feature.get(key)) for key, one in value.items()}
    return value


def _parts(source: str) -> tuple[str, str | None, str | None]:
    match = re.fullmatch(r"hub:(?P<name>[^@:\s]+)(@(?P<configuration>[^:\s]+))?(:(?P<split>\S+))?", source)
    if match is None:
        raise UserError(f"{source!r} must have the form hub:organisation/name@configuration:split")
    return match["name"], match["configuration"], match["split"]


def _is_saved(name: str) -> bool:
    folder = Path(name).expanduser()
    return any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))


def _saved(source: str, name: str) -> dict[str, Any]:
    import datasets

    found = _asked(source, lambda: datasets.load_from_disk(str(Path(name).expanduser())))
    return dict(found) if isinstance(found, dict) else {str(found.split or "train"): found}


def _asked(source: str, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:  # the library raises a dozen kinds, its own, the hub's and the network's
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"{source}: cannot be loaded: {type(error).__name__}: {first}") from error
