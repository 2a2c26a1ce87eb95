"""What a model costs by size and attention: from `longspan bench RECIPE`, and in the size table of a run."""

import csv
import json

import pytest
import torch

from apps.vision.costs import measured_at, size_of
from core.training.command import main
from core.training.costs import costs, faster_from, growth, peak_bytes
from core.training.errors import UserError
from core.training.fit import fit
from core.training.recipe import load_recipe
from tests.apps.vision.conftest import SMALL

RECIPE = ["vision/folder", *SMALL]


def test_every_attention_is_measured_at_every_size_of_the_users_own_model(tmp_path, capsys):
    given = ["--variants", "softmax,recipe,linear", "--sizes", "96,32,64x96", "--out", str(tmp_path / "costs.json")]
    assert main(["bench", *RECIPE, *given]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "costs.json").read_text())
    sizes = ["32x32", "64x96", "96x96"]
    assert [(row["size"], row["attention"]) for row in found["rows"]] == [
        (size, label) for size in sizes for label in ("softmax", "recipe", "linear")
    ]
    assert [row["tokens"] for row in found["rows"]][::3] == [16, 96, 144]
    rows = {(row["attention"], row["size"]): row for row in found["rows"]}
    assert rows["softmax", "96x96"]["gflops"] > rows["linear", "96x96"]["gflops"]  # 144 keys against 8 of the state
    assert all(row["peak_mb"] > 0 and row["items_per_s"] > 0 for row in found["rows"])
    assert set(found["growth"]) == {"softmax", "recipe", "linear"}
    assert "softmax: time grows with the tokens to the power" in printed
    assert (tmp_path / "costs.png").read_bytes()[:4] == b"\x89PNG"


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.zeros(1000, 1000)
    one, two = (peak_bytes(lambda f=f: f(x), "cpu") for f in (lambda x: (x + 1).sum(), lambda x: (x + 1) * (x + 2)))
    assert 4e6 <= one < 4.1e6
    assert 12e6 <= two < 12.1e6


def test_growth_and_crossover_are_those_of_known_times():
    def row(label, tokens, ms):
        return {"attention": label, "size": str(tokens), "tokens": tokens, "ms": ms}

    counts = (100, 200, 400, 800)
    rows = [row("softmax", n, 1 + n**2 / 1e4) for n in counts] + [row("linear", n, n / 50) for n in counts]
    rows += [row("slow", n, 100 * n) for n in counts] + [row("noisy", n, t) for n, t in zip(counts, (1, 99, 1, 1))]
    assert growth(rows)["linear"] == pytest.approx(1)
    assert 1.8 < growth(rows)["softmax"] < 2
    assert faster_from(rows) == {"linear": "200", "slow": None, "noisy": "400"}


def test_mistakes_say_what_would_be_right(capsys):
    with pytest.raises(UserError, match=r"--sizes: 100x100 does not divide into patches of 8; the nearest is 96x96"):
        costs(RECIPE[0], overrides=SMALL, sizes=["100"])
    with pytest.raises(UserError, match=r"--sizes: 'big' must be a number of pixels, or rows x columns"):
        size_of("big")
    for words, said in (
        (["timeseries/demo"], "the app 'timeseries' does not say how its model grows"),
        (["vision/folder", "--suite", "recall"], "--suite goes with single layers"),
        (["vision/folder", "--variants", "linaer"], "did you mean 'linear'"),
        (["vision/folder", "--batch", "0"], "--batch must be at least 1"),
        (["--sizes", "64"], "--sizes goes with a recipe: longspan bench RECIPE"),
    ):
        assert main(["bench", *words]) == 2
        assert said in capsys.readouterr().err


def test_the_size_table_of_a_run_holds_quality_beside_its_price(colours, tmp_path):
    sizes = "model.eval_sizes=[16,[48,64]]"
    recipe = load_recipe("vision/folder", [f"data.path={colours}", *SMALL, "trainer.epochs=1", sizes])
    fit(recipe, run_dir=tmp_path / "run", quiet=True, floors=False)
    rows = list(csv.DictReader((tmp_path / "run" / "sizes.csv").read_text().splitlines()))
    assert [(row["rows"], row["columns"], row["trained"], row["tokens"]) for row in rows] == [
        ("16", "16", "0", "4"),
        ("32", "32", "1", "16"),
        ("48", "64", "0", "48"),
    ]
    for column in ("gflops", "peak_mb"):
        values = [float(row[column]) for row in rows]
        assert values == sorted(values)
        assert values[0] > 0
    assert all(float(row["images_per_s"]) > 0 for row in rows)
    assert 0 <= float(rows[0]["accuracy"]) <= 1


def test_a_model_is_left_in_its_mode():
    from apps.vision.model import VisionModel

    model = VisionModel(load_recipe("vision/folder", SMALL), {"classes": ["a", "b"], "size": [32, 32]}).train()
    assert measured_at(model, 3, (32, 32))["tokens"] == 16
    assert model.training
