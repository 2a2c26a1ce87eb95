"""Floors: each solves what it should and nothing else, and is fitted without the test part."""

import numpy as np
import pytest
import torch

from apps.genomics import linear
from apps.genomics.alphabet import DNA
from apps.genomics.baselines import floors
from apps.genomics.data import build_data
from apps.genomics.task import build_task


def write(path, texts, labels):
    path.write_text("sequence,label\n" + "\n".join(f"{t},{y}" for t, y in zip(texts, labels)) + "\n")
    return {"path": str(path)}


def test_letters_by_position_are_seen_by_position_alone(tmp_path, letters, recipe):
    texts = letters(400, 20)
    made = recipe("classification", write(tmp_path / "x.csv", texts, [text[7] in "AC" for text in texts]))
    found = floors(made, build_data(made))
    assert found["position"]["accuracy"] == 1.0
    assert found["kmer"]["accuracy"] < 0.8
    assert abs(found["majority"]["accuracy"] - 0.5) < 0.15
    assert found["majority"]["mcc"] == 0.0


def test_composition_is_seen_by_kmers(tmp_path, letters, recipe):
    texts = letters(150, 60, "AACGT") + letters(150, 60, "ACGTT", seed=1)
    made = recipe("classification", write(tmp_path / "x.csv", texts, [n < 150 for n in range(300)]))
    assert floors(made, build_data(made))["kmer"]["accuracy"] > 0.8


def test_numbers_that_are_linear_are_found_exactly(tmp_path, letters, recipe):
    texts = letters(300, 10)
    values = [3.0 * (text[2] == "A") - 2.0 * (text[5] == "G") + 7 for text in texts]
    made = recipe("regression", write(tmp_path / "x.csv", texts, values))
    found = floors(made, build_data(made))
    assert found["position"]["r2"] > 0.999
    assert found["mean"]["r2"] < 0.01


@pytest.mark.parametrize(
    ("task", "strand"), [("classification", "none"), ("regression", "none"), ("regression", "tied")]
)
def test_the_floor_of_the_shortcut_is_where_training_starts(tmp_path, letters, recipe, task, strand):
    texts = letters(200, 12)
    values = [t.count("CG") + t.count("A") if task == "regression" else "AC" in t for t in texts]
    data = {**write(tmp_path / "x.csv", texts, values), "leaks": "off"}
    made = recipe(task, data, {"shortcut": "kmer:2+first:4", "shortcut_strength": 0.1, "strand": strand})
    parts = build_data(made)
    trained = build_task(made, parts.spec).eval()
    trained.start_pass("test")
    with torch.no_grad():
        trained.eval_update(parts.test.__getitems__(range(len(parts.test))) | {"index": torch.arange(len(parts.test))})
        start = trained.eval_compute()
    found = floors(made, parts)["shortcut"]
    for name in ("accuracy", "mcc") if task == "classification" else ("r2", "mse"):
        assert found[name] == pytest.approx(start[name], rel=1e-4)
    assert "shortcut" not in floors(
        made.model_copy(update={"model": type(made.model)()}), build_data(recipe(task, data))
    )


def test_several_labels(tmp_path, letters, recipe):
    texts = letters(300, 10)
    labels = [";".join(n for n, yes in (("a", t[0] in "AC"), ("g", t[3] in "AG")) if yes) or "-" for t in texts]
    made = recipe("multilabel", write(tmp_path / "x.csv", texts, labels))
    assert floors(made, build_data(made))["position"]["auroc"] > 0.99


def test_the_window_floor_reads_neighbours_and_no_other_sequence():
    one, two = DNA.encode("ACGT", "x"), DNA.encode("TT", "x")
    found = linear.windows([one, two], 3, DNA, np.array([0, 3, 4])).reshape(3, 3, 4)
    letters = np.concatenate([found, 0.5 * (found.sum(-1, keepdims=True) == 0)], -1).argmax(-1)
    assert ["".join("ACGT."[i] for i in row) for row in letters] == [".AC", "GT.", ".TT"]


def test_a_class_that_does_not_occur_is_not_predicted():
    x = np.random.default_rng(0).normal(size=(60, 3))
    weights, bias = linear.fit_classes(x, np.where(x[:, 0] > 0, 0, 2), 3, 1.0)
    answers = (x @ weights + bias).argmax(1)
    assert set(answers) == {0, 2}
    assert np.mean(answers == np.where(x[:, 0] > 0, 0, 2)) > 0.95


@pytest.mark.parametrize("rows", [20, 200])
def test_ridge_is_ridge_with_few_rows_and_with_many(rows):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(rows, 40)), random.normal(size=(rows, 2))
    weights, bias = linear.fit_numbers(x, y, 5.0)
    z = (x - x.mean(0)) / x.std(0)
    wanted = np.linalg.solve(z.T @ z + 5.0 * np.eye(40), z.T @ (y - y.mean(0)))
    assert np.allclose(x @ weights + bias, z @ wanted + y.mean(0))


def test_language_floors_choose_their_order_on_the_validation_part(tmp_path, recipe):
    text = "".join("ACGT"[(n // 3 + n % 3) % 4] for n in range(3000))
    (tmp_path / "g.fa").write_text(f">c\n{text}\n")
    made = recipe("causal", {"path": str(tmp_path / "g.fa"), "split": "positions", "length": 50})
    found = floors(made, build_data(made))
    assert found["markov_0"]["perplexity"] == pytest.approx(4, abs=0.01)
    best = next(name for name in found if name.startswith("markov_") and name != "markov_0")
    assert found[best]["perplexity"] < 1.1
    made = recipe("masked", {"path": str(tmp_path / "g.fa"), "split": "positions", "length": 50})
    assert min(values["masked_perplexity"] for values in floors(made, build_data(made)).values()) < 1.6


def test_floors_without_a_validation_part(tmp_path, letters, recipe, monkeypatch):
    texts = letters(200, 10)
    data = write(tmp_path / "x.csv", texts, [float(text.count("A")) for text in texts])
    made = recipe("regression", {**data, "validate_on": "nothing"})
    found = build_data(made)
    assert found.val is None
    assert len(found.train) == 160
    used, fit = [], linear.fit_numbers
    monkeypatch.setattr(linear, "RIDGE", (1e9, 1e-6))
    monkeypatch.setattr(
        linear, "fit_numbers", lambda x, y, strength: used.append((len(x), strength)) or fit(x, y, strength)
    )
    assert floors(made, found)["position"]["r2"] > 0.95
    # The strength is chosen on a tenth of the training rows, and then all of them are fitted.
    assert used[-3:] == [(144, 1e9), (144, 1e-6), (160, 1e-6)]
