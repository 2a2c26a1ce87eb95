"""What the command adds to `compare`: options become arguments, the answer is printed, failures give exit code 1."""

from types import SimpleNamespace

import pytest

import core.training.compare
import core.training.tables
from core.training.command import main


@pytest.mark.parametrize(("failures", "code"), [([], 0), (["one"], 1)])
def test_options_reach_compare_and_its_failures_the_exit_code(failures, code, toy, monkeypatch, capsys):
    asked = {}

    def compare(recipe, **options):
        asked.update(options, recipe=recipe)
        return SimpleNamespace(summary=SimpleNamespace(runs=["one", "two"]), run_dir="cmp", failures=failures)

    monkeypatch.setattr(core.training.compare, "compare", compare)
    monkeypatch.setattr(core.training.tables, "print_comparison", lambda summary, run_dir: print("answer in", run_dir))
    words = "compare toy/demo seed=1 --variants softmax,hybrid:window=4 --seeds 0,5 --jobs 2 --baseline softmax"
    words += " --grid optim.lr=1,2 --grid seed=3,4 trainer.epochs=1"
    assert main(words.split()) == code
    assert asked == {
        "recipe": "toy/demo",
        "variants": ["softmax", "hybrid:window=4"],
        "seeds": [0, 5],
        "jobs": 2,
        "run_dir": None,
        "overrides": ["seed=1", "trainer.epochs=1"],
        "baseline": "softmax",
        "grid": ["optim.lr=1,2", "seed=3,4"],
    }
    captured = capsys.readouterr()
    assert captured.out == "answer in cmp\n"
    assert captured.err == ("longspan: 1 of 2 runs failed; the report shows them\n" if failures else "")
