"""Plots: the numbers behind the curves are right, and what is drawn is what was given."""

import numpy as np
import pytest
import sklearn.metrics as sk
from matplotlib.figure import Figure

from core.training import figures
from core.training.figures import draw_calibration, draw_confusion, draw_curves, draw_scatter

RNG = np.random.default_rng(0)


def test_the_curve_is_the_defined_one_with_ties():
    labels = RNG.integers(2, size=200).astype(bool)
    scores = np.round(RNG.uniform(size=200) + 0.3 * labels, 1)
    hits, alarms, precision = figures._sweep(scores, labels)
    wanted_alarms, wanted_hits, _ = sk.roc_curve(labels, scores, drop_intermediate=False)
    assert hits == pytest.approx(wanted_hits)
    assert alarms == pytest.approx(wanted_alarms)
    wanted_precision, _, _ = sk.precision_recall_curve(labels, scores)
    assert precision[1:] == pytest.approx(wanted_precision[:-1][::-1])


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that were saved."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (saved.append(self), path.write_bytes(b"x")))
    return saved


def test_confusion_writes_each_count_once_and_leaves_rare_classes_out(tmp_path, drawn):
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 2])
    draw_confusion(tmp_path / "a" / "c.png", labels, predicted, ["a", "b", "c"])
    assert sorted(text.get_text() for text in drawn[0].axes[0].texts) == ["1", "1", "2", "2"]
    many = np.repeat(np.arange(30), np.arange(30) + 1)
    draw_confusion(tmp_path / "c.png", many, many, [f"class {k}" for k in range(30)])
    shown = [label.get_text() for label in drawn[1].axes[0].get_yticklabels()]
    assert shown == [f"class {k}" for k in range(10, 30)]
    assert "20 of 30 classes" in drawn[1].axes[0].get_title(loc="left")


def test_calibration_counts_all_examples(tmp_path, drawn):
    top = RNG.uniform(0.5, 1, size=100)
    draw_calibration(tmp_path / "c.png", np.stack([top, 1 - top], 1), RNG.integers(2, size=100))
    assert sum(bar.get_height() for bar in drawn[0].axes[1].patches) == 100


def test_curves_of_two_classes_and_of_many(tmp_path, drawn):
    labels = RNG.integers(2, size=50)
    draw_curves(tmp_path / "r.png", RNG.dirichlet([1, 1], 50), labels, ["no", "yes"])
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == ["yes"]
    draw_curves(tmp_path / "r.png", RNG.dirichlet([1] * 7, 90), RNG.integers(7, size=90), list("abcdefg"))
    assert len(drawn[1].axes[0].get_legend().get_texts()) == 5
    draw_curves(tmp_path / "r.png", np.array([[0.2, 0.8]]), np.array([1]), ["no", "yes"])
    assert drawn[2].axes[0].get_legend() is None


def test_a_real_file_is_written(tmp_path):
    target = RNG.normal(size=(40, 2))
    path = draw_scatter(tmp_path / "s.png", target + 0.1, target, ["height in m", "x" * 40])
    assert path.read_bytes()[:4] == b"\x89PNG"
