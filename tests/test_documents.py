"""What the pages say is done here: commands are parsed, the cheap ones run, examples run, tables are current."""

import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

from core.attention import registry
from core.training import command as command_line
from core.training.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for pattern in ("*.md", "docs/**/*.md", "core/**/*.md", "apps/**/*.md", "benchmarks/**/*.md")
    for path in sorted(ROOT.glob(pattern))
}
CHEAP = {"list", "show", "cp", "schema", "doctor"}


def blocks(text: str, *languages: str) -> list[str]:
    """Fenced blocks in one of these languages, also indented ones."""
    found = re.findall(r"^( *)```(\w+)\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [body for _, language, body in found if language in languages]


def longspan_commands(text: str) -> list[str]:
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    commands = []
    for line in lines:
        found = re.search(r"(?:^|&& )\s*(?:\S*/bin/)?longspan (.*?)(?:\s+[#>].*)?$", line)
        if found:
            commands.append(found[1].strip())
    return commands


COMMANDS = sorted({(command, page) for page, text in PAGES.items() for command in longspan_commands(text)})


def test_the_walk_finds_pages_and_commands():
    assert {"README.md", "docs/attention.md", "apps/README.md"} <= set(PAGES)
    assert len(COMMANDS) > 15
    assert longspan_commands("```bash\nx && .venv/bin/longspan list \\\n  apps   # all\n```") == ["list    apps"]


@pytest.fixture
def understood(monkeypatch):
    """The command line up to the point where it would act: words -> (exit code, what it understood)."""

    def parse(words):
        seen = []
        monkeypatch.setattr(command_line, "_ACTIONS", dict.fromkeys(command_line.VERBS, seen.append))
        return command_line.main(words), seen

    return parse


@pytest.mark.parametrize(("command", "page"), COMMANDS)
def test_a_command_on_a_page_is_understood(command, page, understood, capsys):
    code, seen = understood(shlex.split(command))
    if command.startswith("--"):  # --help and --version answer themselves
        return
    assert (code, len(seen)) == (0, 1), capsys.readouterr().err
    recipe = getattr(seen[0], "recipe", None)
    if recipe is not None and not recipe.endswith(".yaml"):
        load_recipe(recipe, getattr(seen[0], "overrides", ()))


@pytest.mark.parametrize(
    "command", ["fitt timeseries/demo", "fit timeseries/demo --run_dirr x", "compare timeseries/demo"]
)
def test_a_wrong_command_is_not_understood(command, understood):
    assert understood(command.split()) == (2, [])


@pytest.mark.parametrize("command", sorted({command for command, _ in COMMANDS if command.split()[0] in CHEAP}))
def test_a_cheap_command_runs(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command_line.main(shlex.split(command)) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text, "python")])
def test_examples_on_a_page_run(page, tmp_path, monkeypatch):
    # An example may register a variant, which the other tests must not see; but the shipped ones, which register
    # themselves when they are first imported, must stay.
    for name in registry.available():
        registry.variant_class(name)
    for name in ("_registered", "_entries"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks(PAGES[page], "python")), page, "exec"), {"__name__": "__main__"})


# --- README -----------------------------------------------------------------------------------------------------------


def setup_commands() -> list[str]:
    return [line for line in "".join(blocks(README, "bash")).splitlines() if line.startswith("python -m venv")]


def test_first_command_stands_by_line_15_and_the_page_is_short():
    lines = README.splitlines()
    assert lines.index("```bash") + 2 <= 15
    assert lines[lines.index("```bash") + 1] == setup_commands()[0]
    assert len(lines) <= 150


def test_two_commands_do_all_the_setting_up_and_ci_runs_the_second():
    first, second = setup_commands()
    assert first.endswith("longspan fit timeseries/demo")
    assert second.endswith("-m pytest")
    shown = subprocess.run(
        ["bash", ".ci/run", "--print"], cwd=ROOT, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )
    assert shown.stdout == second + "\n"
    for command in (first, second):
        assert "uv pip install" in command, "plain pip may pick a torch without CUDA"
        assert "-c requirements/constraints.txt" in command


def test_the_map_names_what_is_there():
    for name in re.findall(r"^\| `([\w./]+)`", README.split("## Map")[1].split("\n## ")[0], re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_table_of_variants_is_current():
    made = runpy.run_path(str(ROOT / "docs" / "make_variants.py"))["page"]()
    assert (ROOT / "docs" / "variants.md").read_text() == made, "run: python docs/make_variants.py"
