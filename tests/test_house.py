"""The house rules that a machine can check: what is pinned, what may lie in the repository, what documents promise."""

import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = ROOT / "requirements" / "constraints.txt"


@cache
def tracked() -> list[Path]:
    """Every file under version control that exists, or all files of an unpacked source archive."""
    if (ROOT / ".git").exists():
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
        files = [ROOT / name for name in names.split("\0") if name]
    else:
        files = [path for path in ROOT.rglob("*") if path.is_file()]
    return [path for path in files if path.exists()]


def texts(*suffixes: str) -> dict[str, str]:
    """Relative name -> text of the tracked text files, of all kinds or of those named."""
    found = {}
    for path in tracked():
        if not suffixes or path.suffix in suffixes:
            content = path.read_bytes()
            if b"\0" not in content:
                found[str(path.relative_to(ROOT))] = content.decode()
    assert found, f"no tracked file ends in {suffixes}"
    return found


# --- the pinned set ---------------------------------------------------------------------------------------------------


def pins(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def bad_pins(text: str) -> list[str]:
    """Lines that are anything but `name==public.version ; marker`: addresses, options, local versions."""
    plain = re.compile(r"^[A-Za-z0-9._-]+==[0-9A-Za-z.!]+( ; [^:/@]+)?$")
    return [line for line in text.splitlines() if line.strip() and not plain.match(line)]


def unsatisfied(text: str, wanted: list[str]) -> list[str]:
    """Requirements for which no pin that applies here satisfies the bounds."""
    chosen = {}
    for pin in pins(text):
        if pin.marker is None or pin.marker.evaluate(dict(default_environment())):
            (chosen[canonicalize_name(pin.name)],) = [one.version for one in pin.specifier]
    missing = []
    for line in wanted:
        need = Requirement(line)
        version = chosen.get(canonicalize_name(need.name))
        if version is None or not need.specifier.contains(version, prereleases=True):
            missing.append(f"{line} (pinned: {version})")
    return missing


def test_constraints_carry_no_address_and_satisfy_pyproject():
    text = CONSTRAINTS.read_text()
    assert len(pins(text)) > 30
    assert bad_pins(text) == []
    assert unsatisfied(text, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]) == []


@pytest.mark.parametrize(
    "line",
    [
        "--index-url https://example.org/simple",
        "torch==2.15.0+cpu",
        "torch @ https://example.org/torch.whl",
        "torch @ file:///wheels/torch.whl",
        "torch>=2.0",
        "--find-links /wheels",
    ],
)
def test_a_pin_that_is_not_plain_is_seen(line):
    assert bad_pins("numpy==2.0.0\n" + line) == [line]


def test_a_pin_outside_the_bounds_is_seen():
    assert unsatisfied("torch==2.0.0", ["torch>=2.11", "rich"]) == [
        "torch>=2.11 (pinned: 2.0.0)",
        "rich (pinned: None)",
    ]


def test_every_dependency_has_a_user_and_every_import_is_declared():
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    owners = packages_distributions()
    modules = set()
    for name, text in texts(".py").items():
        if name.startswith(("core/", "apps/")):
            modules |= set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))
    used = {canonicalize_name(dist) for module in modules for dist in owners.get(module, [])} - {"longspan"}
    # pandas reads Parquet through pyarrow without our naming it; triton comes with torch where it exists, and
    # markupsafe is the type of jinja2's own strings.
    assert declared - used <= {"pyarrow"}, "a dependency that nobody imports"
    extras = {canonicalize_name(Requirement(line).name) for line in PROJECT["optional-dependencies"]["hf"]}
    assert used - declared <= {"triton", "markupsafe"} | extras, "an import that pyproject.toml does not declare"


# --- what may lie in the repository -----------------------------------------------------------------------------------

MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:home|Users|root|work|opt/pypi|opt/wheels)/[\w.]|file:///|[A-Z]:\\\\?Users")


def machine_paths(files: dict[str, str]) -> list[str]:
    local = [f"{folder}/" for folder in (ROOT.parent, Path.home()) if folder != Path(folder.anchor)]
    found = []
    for name, text in files.items():
        for number, line in enumerate(text.splitlines(), 1):
            if MACHINE_PATHS.search(line) or any(folder in line for folder in local):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    return found


def test_no_path_of_a_machine_stands_in_a_tracked_file():
    files = texts()
    # The planted samples of the next test stand in this file, so it is read without them.
    files.pop(str(Path(__file__).relative_to(ROOT)), None)
    assert machine_paths(files) == []


@pytest.mark.parametrize(
    "line", ["data: /home/ada/x.csv", "cd /" + "work/main", "--find-links file:///wheels", "/Users/ada"]
)
def test_a_path_of_a_machine_is_seen(line):
    assert machine_paths({"notes.md": f"first\n{line}"}) == [f"notes.md:2: {line}"]


def test_no_large_file_and_no_cache_is_tracked():
    large = [str(path.relative_to(ROOT)) for path in tracked() if path.stat().st_size > 1_500_000]
    caches = [str(path) for path in tracked() if {"__pycache__", "runs", ".venv"} & set(path.relative_to(ROOT).parts)]
    assert large + caches == []


def test_no_source_file_is_longer_than_400_lines():
    lengths = {name: text.count("\n") for name, text in texts(".py").items()}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


def test_file_names_say_what_a_thing_is():
    nameless = {"utils.py", "util.py", "common.py", "base.py", "helpers.py", "misc.py"}
    assert [name for name in texts(".py") if Path(name).name in nameless] == []
    packages = [name for name in texts(".py") if name.startswith("tests/") and name.endswith("__init__.py")]
    assert [name for name in packages if "APP = App(" not in texts(".py")[name]] == [], "tests are no packages"


def test_no_unfinished_marks():
    # Written apart, so that this line is not a find.
    marks = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"]) + r")\b")
    assert [name for name, text in texts(".py").items() if marks.search(text)] == []


def test_ruff_is_content():
    for arguments in (["check", "--quiet"], ["format", "--check", "--quiet"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# --- what the documents say -------------------------------------------------------------------------------------------


def test_licence_is_apache_2_in_full():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text.splitlines()) > 195


def test_changelog_and_citation_name_the_version():
    version = PROJECT["version"]
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (version, PROJECT["license"])


def anchors(markdown: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(root: Path, pages: dict[str, str]) -> list[str]:
    found = []
    for name, text in pages.items():
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            path = (root / name).parent / file if file else root / name
            if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
                found.append(f"{name}: {target}")
    return found


def test_links_between_documents_resolve():
    pages = texts(".md")
    assert sum(text.count("](") for text in pages.values()) > 10, "no links were found"
    assert broken_links(ROOT, pages) == []


def test_a_broken_link_is_seen(tmp_path):
    (tmp_path / "a.md").write_text("# One thing\n[good](#one-thing) [self](a.md) [bad](b.md) [worse](a.md#two)")
    assert broken_links(tmp_path, {"a.md": (tmp_path / "a.md").read_text()}) == ["a.md: b.md", "a.md: a.md#two"]
