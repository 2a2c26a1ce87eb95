"""What an app is, and which ones there are; nothing heavy is imported here.

An app is a folder in `apps` (or a package with an entry point in the group `longspan.apps`) whose `__init__.py` holds
`APP = App(...)`. The parts are named as "module:name" and imported when they are first needed.
"""

import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from core.attention.registry import nearest
from core.training.errors import UserError

if TYPE_CHECKING:
    from core.training.recipe import Recipe

GROUP = "longspan.apps"


class Sheet(NamedTuple):
    """A picture that every run of an app leaves, for the variants of a comparison to be seen one below the other.

    file: its name in the run folder, a PNG of the same size for all variants.
    title, text: heading and explanation on the page of the comparison.
    """

    file: str
    title: str
    text: str


@dataclass(frozen=True)
class App:
    """One application: its name and where its parts are, each as "module:name".

    Attributes:
        name: what users type before the slash of a recipe.
        summary: one line for `longspan list apps`.
        recipe: the schema, a subclass of `core.training.recipe.Recipe`.
        data: `build_data(recipe) -> Data`.
        task: `build_task(recipe, spec: dict) -> Task`.
        floors: `floors(recipe, data) -> {name: {metric: value}}` on the test part, without a deep model.
        predict: `predict(run: LoadedRun, input: Path, output: Path) -> list[Path]`, the files written.
        metric: the primary metric, a key of what the task's `eval_compute` returns; a recipe may have another, see
            `judged_for`.
        better: its direction.
        inspect: `inspect(run: LoadedRun, input: Path, output: Path) -> list[Path]` writes into a folder what there is
            to see inside the model; None: nothing.
        side_by_side: `side_by_side(runs: {label: LoadedRun}, input: Path, output: Path) -> list[Path]`, the same of all
            variants of a comparison in one picture; None: each by itself.
        sheet: a picture of every run that the page of a comparison shows; None: there is none.
        sized: `sized(recipe, sizes, batch, device) -> {size: Sized}`, the untrained model at several sizes of its
            input, for `longspan bench RECIPE` (core.training.costs); sizes as the user wrote them, none: the app's
            choice. None: the app does not say.
    """

    name: str
    summary: str
    recipe: str
    data: str
    task: str
    floors: str
    predict: str
    metric: str
    better: Literal["lower", "higher"]
    inspect: str | None = None
    side_by_side: str | None = None
    sheet: Sheet | None = None
    sized: str | None = None

    def part(
        self, name: Literal["recipe", "data", "task", "floors", "predict", "inspect", "side_by_side", "sized"]
    ) -> Any:
        """The object behind one of the references."""
        return load(getattr(self, name))

    @property
    def folder(self) -> Path:
        """Where the app's package lives; its recipes are in `recipes/` there."""
        package = self.recipe.partition(":")[0].rpartition(".")[0]
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"app {self.name!r}: package {package!r} (from {self.recipe!r}) is not importable")
        return Path(spec.origin).parent

    def judged_for(self, recipe: "Recipe") -> "App":
        """This app with the metric of the recipe's task, where one metric does not fit all tasks of the app."""
        chosen = recipe.judged_by()
        return self if chosen is None else replace(self, metric=chosen[0], better=chosen[1])

    def improves(self, new: float, old: float | None) -> bool:
        """Whether `new` is strictly better than `old` in the primary metric; anything beats None."""
        return old is None or (new < old if self.better == "lower" else new > old)


def load(reference: str) -> Any:
    """The object that "module:name" names.

    Raises:
        UserError: no such module or name; an import that fails inside the module is passed on as it is.
    """
    module, colon, name = reference.partition(":")
    if not (module and colon and name):
        raise UserError(f"reference {reference!r} must have the form 'module:name'")
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise  # the module is there, something that it imports is not
        raise UserError(f"reference {reference!r}: there is no module {error.name!r}") from error
    if not hasattr(found, name):
        raise UserError(f"reference {reference!r}: {module} has no {name!r}{nearest(name, vars(found))}")
    return getattr(found, name)


def apps() -> dict[str, App]:
    """All apps by name, sorted: folders of `apps`, then packages with an entry point.

    Raises:
        UserError: an app cannot be imported, holds no `APP`, or takes the name of another; it is named.
    """
    return dict(_apps(tuple(sys.path)))


def get_app(name: str) -> App:
    """The app called `name`, with the nearest spelling when there is none."""
    known = apps()
    if name not in known:
        raise UserError(f"unknown app {name!r}{nearest(name, known)}; known: {', '.join(known) or 'none'}")
    return known[name]


@lru_cache(maxsize=4)
def _apps(_path: tuple[str, ...]) -> tuple[tuple[str, App], ...]:
    # Keyed by sys.path: reading the metadata of all installed packages takes 10 ms, and the answer depends on it.
    references = []
    house = find_spec("apps")
    for place in (house.submodule_search_locations or ()) if house else ():
        folders = sorted(Path(place).iterdir()) if Path(place).is_dir() else []
        references += [f"apps.{f.name}:APP" for f in folders if (f / "__init__.py").is_file() and f.name.isidentifier()]
    references += [point.value for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)]
    found: dict[str, App] = {}
    for reference in references:
        try:
            app = load(reference)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"app {reference!r} cannot be imported: {type(error).__name__}: {error}") from error
        if not isinstance(app, App):
            raise UserError(f"app {reference!r} must be an App, got {type(app).__name__}")
        if app.name in found:
            raise UserError(f"two apps are called {app.name!r}; the second is {reference!r}")
        found[app.name] = app
    return tuple(sorted(found.items()))
