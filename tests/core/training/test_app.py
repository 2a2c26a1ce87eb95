"""Apps: found as folders and by entry points, and a broken one is named."""

import importlib
import sys

import pytest

from core.training.app import App, apps, get_app, load
from core.training.errors import UserError


def test_apps_come_from_folders_and_entry_points(toy):
    found = apps()
    assert list(found) == sorted(found)
    assert found["timeseries"].recipe == "apps.timeseries.recipe:TimeSeriesRecipe"
    assert found["toy"].summary == "a line through generated points"
    assert (get_app("toy").folder / "recipes" / "demo.yaml").is_file()
    with pytest.raises(UserError, match=r"unknown app 'toi' \(did you mean 'toy'\?\); known: .*timeseries"):
        get_app("toi")


def test_the_better_value(toy):
    lower, higher = get_app("toy"), App(*"nsrdtfpm", better="higher")
    assert lower.improves(1.0, 2.0)
    assert not lower.improves(2.0, 2.0)
    assert higher.improves(2.0, 1.0)
    assert not higher.improves(1.0, 1.0)
    assert lower.improves(9.0, None)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import nowhere_to_be_found", "app 'broken_app:APP' cannot be imported: ModuleNotFoundError: No module named"),
        ("1 / 0", "app 'broken_app:APP' cannot be imported: ZeroDivisionError: division by zero"),
        ("app = 3", "reference 'broken_app:APP': broken_app has no 'APP'"),
        ("APP = 3", "app 'broken_app:APP' must be an App, got int"),
        ("from longspan_toy import APP", "two apps are called 'toy'; the second is 'longspan_toy:APP'"),
    ],
)
def test_a_broken_app_is_named(source, told, toy, monkeypatch):
    info = toy / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[longspan.apps]\nbroken = broken_app:APP\n")
    (toy / "broken_app.py").write_text(source)
    monkeypatch.syspath_prepend(str(toy))
    importlib.invalidate_caches()
    try:
        with pytest.raises(UserError, match=told):
            apps()
    finally:
        sys.modules.pop("broken_app", None)


@pytest.mark.parametrize("reference", ["json", ":x", "json:", "json:dumpz", "nowhere:x"])
def test_a_reference_that_leads_nowhere(reference):
    with pytest.raises(UserError, match=f"reference '{reference}'"):
        load(reference)
    assert load("json:dumps") is importlib.import_module("json").dumps
