"""The command line: what it prints, its exit codes, and that it is a thin layer."""

import json
import subprocess
import sys

import pytest

from core.attention.registry import available
from core.layout import PRESETS
from core.training.arguments import VERBS
from core.training.command import main
from core.training.recipe import load_recipe


def told(capsys, *words, code=0) -> str:
    assert main([str(word) for word in words]) == code, capsys.readouterr().err
    captured = capsys.readouterr()
    assert bool(captured.err) == (code != 0)
    return captured.err if code else captured.out


def test_lists(toy, capsys):
    assert "toy/demo  " in told(capsys, "list")
    assert told(capsys, "list", "recipes") == told(capsys, "list")
    lines = told(capsys, "list", "variants").splitlines()
    names = [line.split()[0] for line in lines if line]
    assert names == [*available(), "layouts", *PRESETS]
    assert any(line.startswith("sandwich") and line.endswith("; slllllls") for line in lines)
    assert any(line.startswith("window") and "window=64" in line for line in lines)
    listed = [line.split(maxsplit=1) for line in told(capsys, "list", "apps").splitlines()]
    assert ["toy", "a line through generated points (metric: mse, lower is better)"] in listed
    assert "toy/demo" in told(capsys, "list", "data")


def test_show_and_cp(toy, capsys):
    (toy / "shown.yaml").write_text(told(capsys, "show", "toy/demo", "optim.lr=3e-4", "attention=linear"))
    shown = load_recipe("shown.yaml")
    assert shown.model_dump() == load_recipe("toy/demo", ["optim.lr=3e-4", "attention=linear"]).model_dump()
    assert "longspan fit mine.yaml" in told(capsys, "cp", "toy/demo", "mine.yaml")
    assert (toy / "mine.yaml").read_text().startswith("# A line through generated points")
    assert load_recipe("mine.yaml").model_dump() == load_recipe("toy/demo").model_dump()
    assert "mine.yaml is there already" in told(capsys, "cp", "toy/demo", "mine.yaml", code=2)
    assert "cannot write no/where.yaml" in told(capsys, "cp", "toy/demo", "no/where.yaml", code=2)


def test_schema_is_json(toy, capsys):
    assert json.loads(told(capsys, "schema", "toy"))["properties"]["seed"]["type"] == "integer"


@pytest.mark.parametrize(
    "words", [["--run-dir", "run", "KEY"], ["KEY", "--run-dir", "run"], ["--no-floors", "KEY", "--run-dir=run"]]
)
def test_fit_test_and_predict_from_the_command(words, toy, capsys):
    words = ["trainer.epochs=1" if word == "KEY" else word for word in words]
    out = told(capsys, "fit", "toy/demo", "seed=3", *words)
    assert out == "run\n", "not a terminal: only the folder, for scripts"
    first = json.loads((toy / "run" / "metrics.json").read_text())
    assert bool(first["floors"]) == ("--no-floors" not in words)
    assert load_recipe(toy / "run" / "recipe.yaml").seed == 3
    assert told(capsys, "test", "run") == "run\n"
    assert json.loads((toy / "run" / "metrics.json").read_text())["test"] == first["test"]
    (toy / "in.txt").write_text("1 2 3 4 5 6 7 8")
    assert told(capsys, "predict", "run", "--input", "in.txt", "--output", "out.txt") == "out.txt\n"
    value = float((toy / "out.txt").read_text())
    told(capsys, "predict", "run", "--input", "in.txt", "--output", "out.txt", "predict.scale=2")
    assert float((toy / "out.txt").read_text()) == pytest.approx(2 * value)
    assert told(capsys, "inspect", "run", "--input", "in.txt", "--output", "look") == "look/weights.txt\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["fti"], "unknown command 'fti' (did you mean 'fit'?); known: list, show"),
        (["list", "variant"], "cannot list 'variant' (did you mean 'variants'?); known: recipes, variants, apps, data"),
        (["fit"], "the following arguments are required: RECIPE; see longspan fit --help"),
        (["fit", "toy/demo", "--run-dri", "x"], "fit: unknown argument '--run-dri' (did you mean '--run-dir'?)"),
        (["fit", "toy/demo", "seed=1", "oops"], "override 'oops' must have the form key=value"),
        (["fit", "toy/demo", "--resume"], "--resume needs --run-dir"),
        (["fit", "toy/demo", "attention=linaer"], "unknown attention 'linaer' (did you mean 'linear'?)"),
        (["show", "toy/demo", "backbone.heads=3"], "heads must divide dim: 3 does not divide 16; try 1, 2 or 4"),
        (["show", "toy/demoo"], "unknown recipe 'toy/demoo' (did you mean 'toy/demo'?)"),
        (["test", "rum"], "there is no run folder 'rum' (did you mean 'run'?)"),
        (["predict", "run", "--input", "nope", "--output", "x"], "there is no input file 'nope'"),
        (["inspect", "run", "--input", "nope", "--output", "x"], "there is no input file 'nope'"),
        (["predict", "run"], "the following arguments are required: --input, --output"),
        (
            ["compare", "toy/demo", "--variants", "linear", "--seeds", "x"],
            "--seeds must be a number of seeds or a list",
        ),
        (["compare", "toy/demo", "--variants", "linear", "--seeds", "0"], "--seeds must be at least 1"),
        (["compare", "toy/demo", "--variants", "linear", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["report", "run"], "run"),
        (["schema", "toi"], "unknown app 'toi' (did you mean 'toy'?)"),
        (["--debgu"], "unknown argument '--debgu'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(words, line, toy, capsys):
    (toy / "run").mkdir()
    error = told(capsys, *words, code=2)
    assert line in error
    assert error.startswith("longspan: ")
    assert len(error.splitlines()) == 1


def test_help_names_every_command_and_needs_nothing(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {verb} " in listed for verb in VERBS)
    for words in (["--help"], *([verb, "--help"] for verb in VERBS)):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
        assert capsys.readouterr().out.startswith("usage: longspan")


def test_doctor_runs_every_variant(toy, capsys):
    out = told(capsys, "doctor")
    assert out.splitlines()[-1] == "all is well"
    assert "BROKEN" not in out
    assert all(name in out for name in available())


def test_doctor_finds_what_is_broken(toy, capsys, monkeypatch):
    monkeypatch.setenv("LONGSPAN_DATA", str(toy / "nowhere"))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "BROKEN  data folder  LONGSPAN_DATA names a folder that is not there" in out
    assert out.splitlines()[-1] == "1 of 8 checks failed"


def test_a_closed_pipe_is_no_error(toy_environment):
    code = f"{sys.executable} -m apps list variants | true; exit ${{PIPESTATUS[0]}}"
    for _ in range(3):
        done = subprocess.run(["bash", "-c", code], env=toy_environment, capture_output=True, text=True, timeout=60)
        assert done.stderr == ""
        assert done.returncode in (0, 141)
