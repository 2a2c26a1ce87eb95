"""Intervals of ranked figures equal a plain bootstrap, drawn by groups; strata hold every item once."""

import csv

import numpy as np
import pytest

from apps.genomics.ranking import _areas, _ranks, area_intervals, spearman_interval
from apps.genomics.strata import write_strata
from core.training.scores import classification, regression


def test_one_draw_of_all_examples_gives_the_figures_themselves():
    random = np.random.default_rng(0)
    labels = random.integers(3, size=60)
    scores = np.round(random.random((60, 3)) + np.eye(3)[labels] * 0.4, 1)  # rounded: with ties
    probabilities = scores / scores.sum(1, keepdims=True)
    once = [_areas(np.unique(-probabilities[:, k], return_inverse=True)[1], labels == k, np.ones(60)) for k in range(3)]
    wanted = classification(probabilities, labels)
    assert np.mean(once, axis=0) == pytest.approx([wanted["auroc"], wanted["auprc"]], abs=1e-6)
    a, b = scores[:, 0], scores[:, 1]
    ranks = [_ranks(np.unique(x, return_inverse=True)[1], np.ones(60)) for x in (a, b)]
    assert np.corrcoef(*ranks)[0, 1] == pytest.approx(regression(a, b)["spearman"])


def test_a_weight_stands_for_an_example_that_comes_so_often():
    random = np.random.default_rng(1)
    a, b, weights = random.random(30), random.integers(2, size=30), random.integers(4, size=30)
    order = np.unique(-a, return_inverse=True)[1]
    rows = np.repeat(np.arange(30), weights)
    wanted = classification(np.stack([1 - a, a], 1)[rows], b[rows])
    assert _areas(order, b == 1, weights.astype(float)) == pytest.approx((wanted["auroc"], wanted["auprc"]), abs=1e-6)


def test_intervals_hold_the_figure_and_are_wider_over_few_groups():
    random = np.random.default_rng(2)
    groups = np.repeat(np.arange(12), 40)
    target = random.normal(size=480) + random.normal(size=12)[groups]  # neighbours are alike
    predicted = target + random.normal(size=12)[groups] * 2
    figure = regression(predicted, target)["spearman"]
    alone, together = spearman_interval(predicted, target), spearman_interval(predicted, target, groups)
    for found in (alone, together):
        assert found["spearman_low"] < figure < found["spearman_high"]
    width = {name: found["spearman_high"] - found["spearman_low"] for name, found in (("a", alone), ("t", together))}
    assert width["t"] > 2 * width["a"]
    labels = (target > 0).astype(int)
    chances = 1 / (1 + np.exp(-predicted))
    areas = area_intervals(np.stack([1 - chances, chances], 1), labels, groups)
    whole = classification(np.stack([1 - chances, chances], 1), labels)
    for name in ("auroc", "auprc"):
        assert areas[f"{name}_low"] < whole[name] < areas[f"{name}_high"]
    assert area_intervals(np.ones((4, 2)) / 2, np.zeros(4, int)) == {}
    assert spearman_interval(predicted[:40], target[:40], groups[:40]) == {}  # one group tells no spread


def test_strata_hold_every_item_once_and_show_where_errors_sit(tmp_path):
    random = np.random.default_rng(3)
    shares, letters = random.random(300), random.integers(50, 60, size=300)
    right = (random.random(300) < np.where(shares > 0.6, 0.5, 1.0)).astype(float)
    files = write_strata(tmp_path, np.stack([letters, shares], 1), lambda n: {"accuracy": float(right[n].mean())})
    assert [path.name for path in files] == ["strata.csv", "strata.png"]
    with files[0].open() as file:
        rows = list(csv.DictReader(file))
    for trait in ("GC share", "letters"):
        assert sum(int(row["items"]) for row in rows if row["by"] == trait) == 300
    by_share = [row for row in rows if row["by"] == "GC share"]
    assert float(by_share[0]["accuracy"]) == 1
    assert float(by_share[-1]["accuracy"]) < 0.7
    assert float(by_share[-1]["accuracy_low"]) < float(by_share[-1]["accuracy"]) < float(by_share[-1]["accuracy_high"])
    alike = np.stack([np.full(300, 41), np.full(300, np.nan)], 1)  # proteins of one length
    assert write_strata(tmp_path, alike, lambda n: {"accuracy": 1.0}) == []
