"""The last words of a run: the model beside its floors, said honestly."""

import io

from rich.console import Console

from core.training.app import App, get_app
from core.training.result_table import floor_line, print_result, result_table

LOWER = App(*"nsrdtfp", metric="mse", better="lower")
HIGHER = App(*"nsrdtfp", metric="mcc", better="higher")
COST = {"parameters": 12345, "tokens_per_s": 1000.4, "step_ms": 1.26, "peak_bytes": 2**21, "seconds": 3.0}


def metrics(ours, floors, metric="mse"):
    test = {"other": 1.0, metric: ours}
    return {"val": {}, "test": test, "floors": {name: {metric: v} for name, v in floors.items()}, "cost": COST}


def printed(found, app):
    out = io.StringIO()
    Console(file=out, width=100).print(result_table(found, app))
    return out.getvalue()


def test_the_sentence_about_the_floors():
    floors = {"last value": 0.9, "ridge": 0.37, "optimum": 0.1}
    assert floor_line(metrics(0.36, floors), LOWER).startswith(
        "Better than the best floor, ridge: mse 0.36 against 0.37"
    )
    worse = "Not better than ridge, which needs no deep model: mse 0.37 against 0.37."
    assert floor_line(metrics(0.37, floors), LOWER) == worse
    assert floor_line(metrics(0.95, {"majority": 0.4, "k-mer": 0.9}, "mcc"), HIGHER).startswith("Better than the best")
    assert floor_line(metrics(0.85, {"majority": 0.4, "k-mer": 0.9}, "mcc"), HIGHER).startswith("Not better than k-mer")
    assert floor_line(metrics(0.37, {}), LOWER).startswith("No floors were computed")


def test_the_table_has_the_best_floor_first_and_the_primary_metric_on_top():
    text = printed(metrics(0.36, {"last value": 0.9, "ridge": 0.37}), LOWER)
    assert text.index("model") < text.index("ridge") < text.index("last value")
    assert text.index("0.36") < text.index("other")
    text = printed(metrics(0.36, {"majority": 0.4, "k-mer": 0.9}, "mcc"), HIGHER)
    assert text.index("k-mer") < text.index("majority")


def test_an_interval_stands_beside_its_figure_and_is_heeded():
    found = metrics(0.85, {"k-mer": 0.82}, "mcc")
    found["test"] |= {"mcc_low": 0.8, "mcc_high": 0.9}
    text = printed(found, HIGHER)
    assert "0.85 [0.8, 0.9]" in text
    assert "mcc_low" not in text
    assert floor_line(found, HIGHER).startswith("Not separable from k-mer by this test set: mcc 0.85 against 0.82")
    found["test"] |= {"mcc_low": 0.83}
    assert floor_line(found, HIGHER).startswith("Better than the best floor, k-mer")


def test_a_terminal_gets_the_table_and_a_script_the_folder(toy, capsys):
    out = io.StringIO()
    found = metrics(0.36, {"ridge": 0.37})
    print_result(
        found, toy / "run", get_app("toy"), Console(file=out, force_terminal=True, width=200, color_system=None)
    )
    assert "Better than the best floor, ridge" in out.getvalue()
    assert "12,345 parameters, 1,000 tokens/s, 1.3 ms per step, peak 2 MiB, 3.0 s of training" in out.getvalue()
    assert out.getvalue().splitlines()[-1].rstrip() == str(toy / "run")
    print_result(found, toy / "run", get_app("toy"))
    assert capsys.readouterr().out == f"{toy / 'run'}\n"
