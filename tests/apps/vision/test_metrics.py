"""Figures by hand: IoU, Dice, errors per pixel; ignored pixels and absent classes count nowhere."""

import pytest
import torch

from apps.vision.baselines import floors, histogram, thumbnail
from apps.vision.data import build_data
from apps.vision.generated import MARK, generate
from apps.vision.metrics import ClassScores, SegmentScores, ValueScores
from apps.vision.recipe import GeneratedSection
from core.training.recipe import load_recipe


def test_iou_is_of_the_whole_part_not_a_mean_over_images():
    scores = SegmentScores(["a", "b", "never"], ignore=9)
    scores.update(torch.tensor([[0, 0], [1, 1]]), torch.tensor([[0, 1], [1, 9]]))
    scores.update(torch.tensor([0, 0]), torch.tensor([0, 0]))
    found = scores.compute()
    # a: hit 3, truth 3, answer 4 -> 3/4; b: hit 1, truth 2, answer 1 -> 1/2; the ignored pixel counts nowhere.
    assert found["miou"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found["dice"] == pytest.approx((6 / 7 + 2 / 3) / 2)
    assert found["accuracy"] == pytest.approx(4 / 5)
    rows = scores.by_class()
    assert rows[2]["iou"] is None
    assert rows[0]["recall"] == 1.0
    assert [row["pixels"] for row in rows] == [3, 2, 0]


def test_errors_per_pixel():
    scores = ValueScores()
    scores.update(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    scores.update(torch.tensor([3.0]), torch.tensor([4.0]))
    found = scores.compute()
    assert found["mse"] == pytest.approx(5 / 3)
    assert found["mae"] == pytest.approx(1.0)
    assert found["r2"] == pytest.approx(1 - 5 / 6)


def test_classes_and_labels_are_scored_as_sets():
    single = ClassScores(True)
    single.update(torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.0, 3.0]]), torch.tensor([0, 1, 0]))
    assert single.compute()["accuracy"] == pytest.approx(2 / 3)
    several = ClassScores(False)
    several.update(torch.tensor([[3.0, -3.0], [3.0, 3.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert several.compute()["f1_macro"] == 1.0


def test_scenes_repeat_and_their_answer_is_hidden_from_the_floors():
    options = GeneratedSection(images=200, size=(64, 80), flipped=0.1)
    one, two = generate(options), generate(options)
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.labels, two.labels)
    kinds = [set(mask.unique().tolist()) - {0} for mask in one.masks]
    assert [len(kind) - 1 for kind in kinds] == one.truth.tolist()  # two kinds of stripes: different
    assert (one.masks > 0).sum((1, 2)).unique().tolist() == [2 * MARK**2]
    assert 0.05 < (one.labels != one.truth).float().mean() < 0.15
    columns = (one.masks > 0).any(1)
    assert not columns[:, 80 // 3 : 2 * 80 // 3].any()  # the marks stand in the outer thirds
    recipe = load_recipe(
        "vision/demo", ["data.generated.images=160", "data.generated.size=[64,80]", "data.size=[64,80]"]
    )
    found = floors(recipe, build_data(recipe))
    assert set(found) == {"majority", "histogram", "thumbnail", "optimum"}
    assert found["optimum"]["accuracy"] > 0.85
    assert max(found[name]["accuracy"] for name in ("majority", "histogram", "thumbnail")) < 0.8


def test_floors_see_colours_places_and_shapes(colours, halves):
    recipe = load_recipe("vision/folder", [f"data.path={colours}", "data.size=32"])
    found = floors(recipe, build_data(recipe))
    assert found["majority"]["accuracy"] == 0.5
    assert found["histogram"]["accuracy"] == found["thumbnail"]["accuracy"] == 1.0
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    assert histogram(image).sum() == pytest.approx(4.0)  # three channels and the colours together
    assert thumbnail(image).shape == (768,)
    given = [f"data.path={halves}", "data.images=PART", "data.masks=PARTannot", "data.ignore=255", "data.size=32"]
    recipe = load_recipe("vision/segmentation", given)
    found = floors(recipe, build_data(recipe))
    assert found["position"]["miou"] > found["majority"]["miou"] > 0.1
