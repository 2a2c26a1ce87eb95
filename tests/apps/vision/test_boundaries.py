"""The boundary F by hand: what meets within the tolerance, what counts nowhere, and how it is averaged."""

import csv
import json

import numpy as np
import pytest
import torch

from apps.vision.boundaries import TOLERANCE, boundary_f, mean_over_classes, outline
from apps.vision.metrics import SegmentScores


def halves(edge, shape=(100, 200)):
    """A mask whose columns from `edge` on are of class 1."""
    mask = np.zeros(shape, dtype=np.int64)
    mask[:, edge:] = 1
    return mask


def test_an_outline_has_both_sides_of_an_edge_and_ends_where_nothing_is_known():
    mask = halves(3, (2, 6))
    assert outline(mask).tolist() == [[False, False, True, True, False, False]] * 2
    mask[0, 2:4] = -1
    assert outline(mask).tolist() == [[False] * 6, [False, False, True, True, False, False]]
    assert not outline(np.zeros((4, 4), dtype=np.int64)).any()


@pytest.mark.parametrize(("shift", "wanted"), [(0, 1.0), (1, 1.0), (2, 0.0), (9, 0.0)])
def test_edges_meet_within_the_tolerance_of_the_diagonal(shift, wanted):
    # 0.75 % of the diagonal of 100 x 200 pixels are 1.68 pixels.
    assert TOLERANCE * np.hypot(100, 200) == pytest.approx(1.677, abs=1e-3)
    assert boundary_f(halves(80 + shift), halves(80), 2).tolist() == [wanted, wanted]


def test_precision_and_recall_are_of_points_and_absent_classes_count_nowhere():
    truth, answer = halves(80), halves(80)
    answer[:40, 120:] = 2  # a third class where none is: its outline costs precision of class 1, and is all wrong
    found = boundary_f(answer, truth, 4)
    own = 100 + 40 + 80 - 1  # points of class 1: the true edge, and the new one along 40 rows and 80 columns
    precision = 100 / own
    assert found[0] == 1.0
    assert found[1] == pytest.approx(2 * precision / (precision + 1), abs=0.01)
    assert found[2] == 0.0
    assert np.isnan(found[3])
    # What has no class in truth has no outline in the answer either.
    truth[:50, 100:] = -1
    assert boundary_f(answer, truth, 4)[:2].tolist() == [1.0, 1.0]


def test_images_are_averaged_by_class_and_classes_count_alike():
    assert mean_over_classes(np.array([[1.0, np.nan, np.nan], [0.5, 0.0, np.nan]])) == pytest.approx((0.75 + 0) / 2)
    assert mean_over_classes(np.full((2, 2), np.nan)) == 0.0
    scores = SegmentScores(["a", "b", "never"], ignore=9, outlines=True)
    for shift in (0, 5):
        mask = torch.from_numpy(halves(80))
        mask[0] = 9
        scores.update(torch.from_numpy(halves(80 + shift)), mask)
    rows = scores.by_class()
    assert [row["boundary_f"] for row in rows] == [0.5, 0.5, None]
    found = scores.compute(intervals=True)
    assert found["boundary_f"] == 0.5
    assert found["boundary_f_low"] == 0.0
    assert found["boundary_f_high"] == 1.0
    plain = SegmentScores(["a", "b"], None)
    plain.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert "boundary_f" not in plain.compute()


def test_a_run_reports_it_for_the_test_part_by_class_and_with_an_interval(segmenter):
    metrics = json.loads((segmenter / "metrics.json").read_text())
    assert 0 < metrics["test"]["boundary_f"] <= 1
    assert metrics["test"]["boundary_f_low"] <= metrics["test"]["boundary_f"] <= metrics["test"]["boundary_f_high"]
    rows = list(csv.DictReader((segmenter / "classes.csv").read_text().splitlines()))
    mean = sum(float(row["boundary_f"]) for row in rows) / len(rows)
    assert mean == pytest.approx(metrics["test"]["boundary_f"], abs=1e-4)
    assert "boundary_f" not in (segmenter / "metrics.csv").read_text().splitlines()[0]  # too slow for each epoch
