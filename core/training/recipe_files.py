"""Recipe files: which there are, and where. No YAML, no pydantic: `longspan list` starts at once."""

from pathlib import Path

from core.attention.registry import nearest
from core.training.app import apps
from core.training.errors import UserError


def find_recipe(reference: str | Path) -> tuple[Path, str]:
    """File of a recipe, and how to speak of it: its reference, or the path as it was given."""
    text = str(reference)
    shipped = {ref: path for ref, path, _ in recipes()}
    if text in shipped:
        return shipped[text], text
    path = Path(text)
    if path.is_file():
        return path, text
    if path.suffix in (".yaml", ".yml"):
        beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"there is no recipe file {text!r}{nearest(path.name, beside)}")
    app, slash, _ = text.partition("/")
    if slash and app in apps():
        names = [ref.partition("/")[2] for ref in shipped if ref.startswith(app + "/")]
        raise UserError(f"unknown recipe {text!r}{nearest(text, shipped)}; {app} has: {', '.join(names) or 'none'}")
    raise UserError(
        f"unknown recipe {text!r}{nearest(text, shipped)}; known: {', '.join(shipped) or 'none'}, or a YAML file"
    )


def recipes() -> list[tuple[str, Path, str]]:
    """(reference, file, first line of its head comment) of every shipped recipe, sorted by app and name."""
    found = []
    for app in apps().values():
        for path in sorted((app.folder / "recipes").glob("*.yaml")):
            with path.open(encoding="utf-8") as file:
                first = file.readline().strip()
            found.append((f"{app.name}/{path.stem}", path, first.lstrip("# ") if first.startswith("#") else ""))
    return found
