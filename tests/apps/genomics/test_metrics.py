"""Figures: by examples, by counts of bases, per base of a language; with and without copies."""

import numpy as np
import pytest

from apps.genomics.metrics import (
    base_figures,
    confusion,
    language_figures,
    moments,
    number_figures,
    sequence_figures,
)
from core.training.scores import classification, regression

RANDOM = np.random.default_rng(0)


def test_counts_of_bases_give_the_figures_of_the_bases():
    labels, predicted = RANDOM.integers(0, 3, 500), RANDOM.integers(0, 3, 500)
    labels[:50] = -1
    pieces = [confusion(p, y, 3) for p, y in zip(np.split(predicted, 5), np.split(labels, 5))]
    found = base_figures(np.stack(pieces), intervals=True)
    wanted = classification(np.eye(3)[predicted[50:]], labels[50:])
    for name in ("accuracy", "mcc", "f1_macro"):
        assert found[name] == pytest.approx(wanted[name])
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]


def test_sums_give_the_figures_of_numbers():
    target = RANDOM.normal(size=400)
    predicted = target + RANDOM.normal(size=400)
    target[::7] = np.nan
    known = ~np.isnan(target)
    found = number_figures(np.stack([moments(p, y) for p, y in zip(np.split(predicted, 4), np.split(target, 4))]))
    wanted = regression(predicted[known], target[known])
    for name in ("pearson", "r2", "mse", "mae"):
        assert found[name] == pytest.approx(wanted[name]), name


def test_perplexity_is_that_of_all_bases_together():
    found = language_figures(np.array([10.0, 0.0, 5.0]), np.array([8.0, 0.0, 2.0]))
    assert found["nats_per_base"] == pytest.approx(1.5)
    assert found["perplexity"] == pytest.approx(np.exp(1.5))
    assert found["bits_per_base"] == pytest.approx(1.5 / np.log(2))
    named = language_figures(RANDOM.random(30), np.ones(30), intervals=True, prefix="masked_")
    assert named["masked_perplexity_low"] < named["masked_perplexity"] < named["masked_perplexity_high"]
    assert not any(name.startswith("perplexity") for name in named), "the two kinds must not share a column"


def test_copies_are_left_out_or_said_beside():
    predicted = np.eye(2)[[0, 1, 1, 0, 0, 1]]
    target = np.array([0, 1, 0, 1, 0, 1])
    copied = np.array([True, True, False, False, False, False])  # the copies are right, half of the others
    drop = sequence_figures("classification", predicted, target, ["a", "b"], copied=copied, leaks="drop")
    warn = sequence_figures("classification", predicted, target, ["a", "b"], copied=copied, leaks="warn")
    assert (drop["accuracy"], drop["accuracy_with_copies"]) == (0.5, pytest.approx(4 / 6))
    assert (warn["accuracy"], warn["accuracy_without_copies"]) == (pytest.approx(4 / 6), 0.5)
    none = sequence_figures("classification", predicted, target, ["a", "b"], copied=np.zeros(6, dtype=bool))
    assert not any("copies" in name for name in none)


def test_several_targets_count_by_their_mean():
    target = RANDOM.normal(size=(50, 2))
    predicted = np.stack([target[:, 0], -target[:, 1]], axis=1)
    found = sequence_figures("regression", predicted, target, ["up", "down"])
    assert (found["spearman_up"], found["spearman_down"]) == (pytest.approx(1), pytest.approx(-1))
    assert found["spearman"] == pytest.approx(0)
