"""Figures equal those of the libraries that define them, and intervals do what intervals do."""

import numpy as np
import pytest
import sklearn.metrics as sk
from scipy.stats import pearsonr, spearmanr

from core.training.scores import classification, multilabel, regression

RNG = np.random.default_rng(0)


def drawn(count, classes):
    labels = RNG.integers(classes, size=count)
    logits = RNG.normal(size=(count, classes)) + 1.2 * np.eye(classes)[labels]
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True), labels


@pytest.mark.parametrize("classes", [2, 3, 8])
def test_classification_figures_are_the_defined_ones(classes):
    probabilities, labels = drawn(300, classes)
    predicted = probabilities.argmax(1)
    found = classification(probabilities, labels)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, predicted))
    assert found["f1_macro"] == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    assert found["mcc"] == pytest.approx(sk.matthews_corrcoef(labels, predicted))
    binary = probabilities[:, 1] if classes == 2 else probabilities
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(labels, binary, multi_class="ovr"), abs=1e-6)
    onehot = labels if classes == 2 else np.eye(classes)[labels]
    assert found["auprc"] == pytest.approx(sk.average_precision_score(onehot, binary), abs=1e-6)
    if classes > 5:
        assert found["top5"] == pytest.approx(sk.top_k_accuracy_score(labels, probabilities, k=5))
    assert ("top5" in found) == (classes > 5)


def test_calibration_error_by_hand():
    probabilities = np.array([[0.9, 0.1]] * 10)
    found = classification(probabilities, np.array([0] * 7 + [1] * 3))
    assert found["ece"] == pytest.approx(0.9 - 0.7)


def test_one_class_alone_has_no_ranking_and_no_correlation():
    found = classification(np.array([[0.8, 0.2], [0.3, 0.7]]), np.array([0, 0]))
    assert "auroc" not in found
    assert (found["accuracy"], found["mcc"]) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("probabilities", "labels", "match"),
    [
        (np.ones((2, 3)) / 3, np.array([0, 3]), r"labels must lie in 0..2, got 0..3"),
        (np.ones((2, 1)), np.array([0, 0]), r"\[N, K >= 2\]"),
        (np.ones((0, 2)), np.array([], dtype=int), "no example"),
    ],
)
def test_what_cannot_be_scored_is_refused(probabilities, labels, match):
    with pytest.raises(ValueError, match=match):
        classification(probabilities, labels)


def test_multilabel_figures_are_the_defined_ones():
    labels = RNG.integers(2, size=(200, 4))
    labels[:, 3] = 0  # a label that never occurs ranks nothing
    probabilities = np.clip(0.5 * labels + RNG.uniform(size=(200, 4)) * 0.7, 0, 1)
    found = multilabel(probabilities, labels)
    predicted = probabilities >= 0.5
    assert found["accuracy"] == pytest.approx((predicted == labels).mean())
    assert found["exact_match"] == pytest.approx(sk.accuracy_score(labels, predicted))
    assert found["f1_micro"] == pytest.approx(sk.f1_score(labels, predicted, average="micro"))
    assert found["f1_macro"] == pytest.approx(sk.f1_score(labels, predicted, average="macro", zero_division=0))
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(labels[:, :3], probabilities[:, :3]), abs=1e-6)


def test_regression_figures_are_the_defined_ones():
    target = RNG.integers(5, size=100).astype(float)  # ties
    predicted = target + RNG.normal(size=100)
    found = regression(predicted, target)
    assert found["spearman"] == pytest.approx(spearmanr(predicted, target).statistic)
    assert found["pearson"] == pytest.approx(pearsonr(predicted, target).statistic)
    assert found["r2"] == pytest.approx(sk.r2_score(target, predicted))
    assert found["mse"] == pytest.approx(sk.mean_squared_error(target, predicted))
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(target, predicted))
    assert regression(np.ones(3), np.array([1.0, 2.0, 3.0]))["spearman"] == 0


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """Accuracy 0.7 on 150 examples, 60 times: a 95 % interval misses seldom, and is neither empty nor everything."""
    misses, widths = 0, []
    for _ in range(60):
        right = RNG.uniform(size=150) < 0.7
        probabilities = np.where(right[:, None], [0.9, 0.1], [0.1, 0.9])
        found = classification(probabilities, np.zeros(150, dtype=int), intervals=True)
        misses += not found["accuracy_low"] <= 0.7 <= found["accuracy_high"]
        widths.append(found["accuracy_high"] - found["accuracy_low"])
    assert misses <= 9
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(0.21 / 150), rel=0.1)


def test_every_interval_holds_its_figure():
    probabilities, labels = drawn(120, 3)
    for found in (
        classification(probabilities, labels, intervals=True),
        regression(probabilities[:, 0], labels.astype(float), intervals=True),
        multilabel(probabilities, np.eye(3)[labels], intervals=True),
    ):
        bounded = [name for name in found if f"{name}_low" in found]
        assert len(bounded) >= 3
        for name in bounded:
            assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"], name


def test_a_target_that_is_constant_but_for_rounding_has_no_r2():
    target = np.full(3, 0.1)
    assert target.mean() != 0.1, "the case: the mean misses the values by a digit"
    found = regression(np.array([0.1, 0.2, 0.3]), target)
    assert (found["r2"], found["pearson"], found["spearman"]) == (0, 0, 0)
    assert regression(np.array([1.0, 2.0]), np.array([1e-9, 3e-9]))["pearson"] == pytest.approx(1)
