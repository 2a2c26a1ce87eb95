"""The catalogue is read from the source without torch, and agrees with the classes."""

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from core.attention import available, registry
from core.attention.registry import check, entry, nearest, variant_class


@pytest.mark.parametrize("name", available())
def test_the_entry_read_from_the_source_is_the_class(name):
    cls = variant_class(name)
    parameters = inspect.signature(cls.__init__).parameters.values()
    assert entry(name).options == {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert entry(name).summary
    assert entry(name).source
    assert cls.name == name
    assert cls.can <= {"causal", "bidirectional", "cross", "recurrent", "mass", "dropout", "grid", "global"}


def test_no_class_of_the_files_is_overlooked():
    folder = Path(registry.__file__).parent / "variants"
    for path in folder.glob("**/*.py"):
        import_module(".".join(("core.attention.variants", *path.relative_to(folder).with_suffix("").parts)))
    ours = {name for name, cls in registry._registered.items() if cls.__module__.startswith("core.attention.variants.")}
    assert ours == set(registry._shipped())


def test_listing_and_checking_load_no_torch():
    program = (
        "import sys; from core.attention import available; from core.attention.registry import check\n"
        "assert 'hybrid' in available(); check('hybrid', {'window': 3})\n"
        "from core.layout import expand_layout; expand_layout({}, 'lls', 6)\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_unknown_words_get_the_nearest_spelling():
    assert nearest("hybird", available()) == " (did you mean 'hybrid'?)"
    assert nearest("qqqq", available()) == ""
    with pytest.raises(ValueError, match=r"no option 'feature_mop' \(did you mean 'feature_map'\?\)"):
        check("linear", {"feature_mop": "elu"})


def test_every_variant_says_when_to_pick_it_and_what_keeps_it_stable():
    lacking = [name for name in available() if not (entry(name).pick and entry(name).stability)]
    assert lacking == []
