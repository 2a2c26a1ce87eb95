"""Boxes: read from both forms, moved with their image, learned one token each, and scored as COCO scores."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from apps.vision.baselines import prior
from apps.vision.boxes import BoxAugment, frame_of, seen, unseen
from apps.vision.convert import between_boxes
from apps.vision.data import build_data
from apps.vision.detection import BoxScores, overlap, pair_up, set_loss
from apps.vision.images import fitted
from apps.vision.recipe import AugmentSection
from core.training.errors import UserError
from core.training.fit import fit
from core.training.predict import predict
from core.training.recipe import load_recipe
from tests.apps.vision.conftest import SMALL

VOC = """<annotation><filename>{name}</filename>{things}</annotation>"""
THING = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
GIVEN = ["model.task=boxes", "data.boxes=boxes", "data.images=images", "data.resize=stretch", *SMALL]
GIVEN += ["augment.smoothing=0", "augment.cutmix=0", "augment.crop=null", "augment.colour=0"]


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    """Dark images 32 x 64 with a bright square each, red or blue, and its box as Pascal VOC and in a table."""
    folder = tmp_path_factory.mktemp("squares")
    (folder / "images").mkdir()
    (folder / "boxes").mkdir()
    draw = np.random.default_rng(0)
    rows = []
    for n in range(40):
        image = draw.integers(0, 40, (32, 64, 3))
        left, top, kind = int(draw.integers(0, 44)), int(draw.integers(0, 16)), n % 2
        image[top : top + 12, left : left + 16, 2 * kind] = 250
        Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"{n}.png")
        box = (("red", "blue")[kind], left, top, left + 16, top + 12)
        (folder / "boxes" / f"{n}.xml").write_text(VOC.format(name=f"{n}.png", things=THING.format(*box)))
        rows.append([f"{n}.png", *box])
    with (folder / "boxes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "class", "left", "top", "right", "bottom"], *rows])
    return folder


def recipe_of(folder, *more):
    return load_recipe("vision/folder", [f"data.path={folder}", *GIVEN, *more])


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)


def test_both_forms_give_the_same_boxes_as_shares_of_the_image(squares):
    voc, table = (build_data(recipe_of(squares, f"data.boxes={name}")) for name in ("boxes", "boxes.csv"))
    assert voc.spec["classes"] == table.spec["classes"] == ["blue", "red"]
    for part in ("train", "val", "test"):
        for one, other in zip(getattr(voc, part).targets, getattr(table, part).targets):
            assert torch.equal(one, other)
    box = voc.train.targets[0][0]
    assert float(box[3] - box[1]) == pytest.approx(16 / 64)
    assert float(box[4] - box[2]) == pytest.approx(12 / 32)


def test_what_leaves_the_image_is_cut_and_what_is_empty_left_out_both_counted(squares, tmp_path):
    lines = ["image,class,left,top,right,bottom", "0.png,a,-5,2,20,90", "0.png,a,10,10,10,20", "1.png,b,0,0,64,32"]
    (tmp_path / "images").symlink_to(squares / "images")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    data = build_data(recipe_of(tmp_path, "data.boxes=t.csv"))
    assert data.summary["boxes_cut_at_the_border"] == data.summary["boxes_left_out_as_empty"] == 1
    targets = {
        item.name: boxes for part in (data.train, data.val, data.test) for item, boxes in zip(part.items, part.targets)
    }
    assert targets["images/0.png"].tolist() == [[0, 0, pytest.approx(2 / 32), pytest.approx(20 / 64), 1]]
    assert targets["images/2.png"].shape == (0, 5)  # an image without boxes is one


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("image,class,left,top,right,bottom\n9999.png,a,0,0,5,5", "t.csv, line 2: image '9999.png' is not there"),
        ("image,class,left,top,right,bottom\n0.png,a,x,0,5,5", "t.csv, line 2: left, top, right and bottom must be"),
        ("image,kind,left,top,right,bottom\n0.png,a,0,0,5,5", "there is no column 'class'"),
        ("image,class,left,top,right,bottom\n", "data.boxes hold no box"),
    ],
)
def test_mistakes_in_a_table_of_boxes_are_named(squares, tmp_path, rows, said):
    (tmp_path / "images").symlink_to(squares / "images")
    (tmp_path / "t.csv").write_text(rows)
    with pytest.raises(UserError) as error:
        build_data(recipe_of(tmp_path, "data.boxes=t.csv"))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_mistakes_in_a_recipe_and_in_files_are_named(squares, tmp_path):
    with pytest.raises(UserError, match=r"model.task=boxes and data.boxes go together"):
        load_recipe("vision/folder", ["model.task=boxes"])
    with pytest.raises(UserError, match=r"data.boxes: there is no .*boxess \(did you mean 'boxes'\?\)"):
        build_data(recipe_of(squares, "data.boxes=boxess"))
    (tmp_path / "images").symlink_to(squares / "images")
    (tmp_path / "boxes").mkdir()
    (tmp_path / "boxes" / "0.xml").write_text("<annotation>")
    with pytest.raises(UserError, match=r"0.xml: not a Pascal VOC file"):
        build_data(recipe_of(tmp_path))


@pytest.mark.parametrize(("resize", "ratio"), [("crop", 0.8), ("stretch", 1.0), ("pad", 1.0)])
def test_boxes_stay_at_their_pixels_and_come_back(resize, ratio):
    image = torch.zeros(1, 60, 90, dtype=torch.uint8)
    image[:, 24:36, 40:60] = 255
    box = boxes([0, 40 / 90, 24 / 60, 60 / 90, 36 / 60])
    frame = frame_of((60, 90), (48, 48), resize, ratio)
    shown, _ = fitted(image, (48, 48), resize, ratio)
    left, top, right, bottom = (seen(box, frame)[0, 1:] * 48).tolist()
    rows, columns = torch.where(shown[0] > 127)
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == pytest.approx(
        [left, top, right, bottom], abs=1
    )
    torch.testing.assert_close(unseen(seen(box, frame)[:, 1:], frame), box[:, 1:])


def test_crops_and_mirrors_take_the_boxes_along():
    options = AugmentSection(crop=(0.3, 1.0), flip=True, flip_rows=True)
    augment = BoxAugment(options, (64, 64), "stretch", [])
    image = torch.zeros(3, 60, 90, dtype=torch.uint8)
    image[:, 20:40, 30:60] = 255
    met = 0
    for _ in range(40):
        shown, found, _ = augment.boxed(image, boxes([1, 30 / 90, 20 / 60, 60 / 90, 40 / 60]))
        for _, left, top, right, bottom in (found * torch.tensor([1, 64, 64, 64, 64])).tolist():
            rows, columns = torch.where(shown[0] > 127)
            want = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert [left, top, right, bottom] == pytest.approx([float(x) for x in want], abs=1.5)
            met += 1
    assert met > 30


def test_overlap_of_boxes_by_hand():
    a, b = torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, 3.0, 3.0])
    iou, empty = overlap(a, b)
    assert float(iou) == pytest.approx(1 / 7)
    assert float(empty) == pytest.approx(2 / 9)
    assert [float(x) for x in overlap(a, a)] == pytest.approx([1, 0])


def test_the_cheapest_pairing_finds_each_box_its_token_in_any_order():
    true = boxes([0, 0.1, 0.1, 0.3, 0.3], [1, 0.6, 0.6, 0.9, 0.9])
    sides = torch.tensor([[0.6, 0.6, 0.9, 0.9], [0.4, 0.4, 0.5, 0.5], [0.1, 0.1, 0.3, 0.3]])
    logits = torch.tensor([[-9.0, 9.0], [-9.0, -9.0], [9.0, -9.0]])
    for order in ([0, 1], [1, 0]):
        tokens, things = pair_up(logits, sides, true[order])
        assert {(t, order[k]) for t, k in zip(tokens.tolist(), things.tolist())} == {(2, 0), (0, 1)}
    answer = torch.cat((logits, sides), 1)[None]
    loss, terms = set_loss(answer, [true])
    assert float(loss) < 1e-3 > float(terms["sides"])
    wrong, _ = set_loss(torch.cat((logits.flip(1), sides), 1)[None], [true])
    assert float(wrong) > 5
    nothing, _ = set_loss(torch.cat((logits, sides), 1)[None], [boxes()])
    assert float(nothing) > 5  # two sure answers where there is nothing


def scored(images, classes=1, threshold=0.5):
    scores = BoxScores([str(k) for k in range(classes)], threshold)
    for answers, true in images:
        rows = torch.tensor(answers, dtype=torch.float32).reshape(-1, 6)
        rows = rows[rows[:, 1].argsort(descending=True)]
        scores.update(rows[:, 0].long(), rows[:, 1], rows[:, 2:], boxes(*true))
    return scores


A, B, FAR = [0.0, 0.0, 0.2, 0.2], [0.5, 0.5, 0.7, 0.7], [0.8, 0.0, 0.9, 0.1]


def test_average_precision_by_hand():
    # Hit, miss, hit: precision 1 up to recall .5 (51 of 101 points), then 2/3.
    one = scored([([[0, 0.9, *A], [0, 0.8, *FAR], [0, 0.7, *B]], [[0, *A], [0, *B]])])
    assert one.compute()["map50"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    # The second answer for the same box is a miss, and comes after all are found: it costs nothing.
    assert scored([([[0, 0.9, *A], [0, 0.8, *A]], [[0, *A]])]).compute()["map50"] == pytest.approx(1)
    # A missed box: recall ends at 1/2.
    assert scored([([[0, 0.9, *A]], [[0, *A], [0, *B]])]).compute()["map50"] == pytest.approx(51 / 101)
    # An overlap of .64 counts at .5, .55 and .6: three of ten thresholds.
    inner = [0.0, 0.0, 0.16, 0.16]
    half = scored([([[0, 0.9, *inner]], [[0, *A]])]).compute()
    assert half["map50"] == pytest.approx(1)
    assert half["map"] == pytest.approx(0.3)


def test_answers_of_all_images_are_ranked_together_and_absent_classes_left_out():
    # A surer miss in an image without boxes comes before the hit: precision 1/2 at every recall.
    two = scored([([[0, 0.9, *A]], []), ([[0, 0.8, *A]], [[0, *A]])], classes=2)
    assert two.compute()["map50"] == pytest.approx(0.5)
    assert [row["ap"] for row in two.by_class()][1] is None
    # Class decides: the right place with the wrong class is a miss for one and nothing for the other.
    assert scored([([[1, 0.9, *A]], [[0, *A]])], classes=2).compute()["map50"] == 0
    # Counts: 1 answer for 0 boxes, 1 for 1, and 0 above the threshold for 1.
    third = ([[0, 0.4, *A]], [[0, *A]])
    counted = scored([([[0, 0.9, *A]], []), ([[0, 0.8, *A]], [[0, *A]]), third]).compute()
    assert counted["count_error"] == pytest.approx(2 / 3)


def test_the_floor_knows_where_boxes_usually_are():
    kinds, scores, sides = prior([boxes([0, *A], [1, *B]), boxes([0, *A])], 2)
    assert kinds.tolist() == [0, 1]
    assert scores.tolist() == [1.0, 0.5]
    torch.testing.assert_close(sides, torch.tensor([A, B]))


@pytest.fixture(scope="session")
def detector(squares, tmp_path_factory):
    torch.manual_seed(0)
    recipe = recipe_of(
        squares, "data.size=[32,64]", "optim.lr=1e-2", "trainer.epochs=30", "optim.ema=0", "attention=softmax"
    )
    run = tmp_path_factory.mktemp("runs") / "detector"
    fit(recipe, run_dir=run, quiet=True)
    return run


def test_squares_are_found_and_the_floor_is_not_enough(detector):
    metrics = json.loads((detector / "metrics.json").read_text())
    assert metrics["test"]["map50"] > 0.7 > metrics["floors"]["prior"]["map50"]
    rows = list(csv.DictReader((detector / "classes.csv").read_text().splitlines()))
    assert sum(int(row["boxes"]) for row in rows) == 6
    for name in ("curves.png", "test_boxes.png"):
        assert (detector / name).read_bytes()[:4] == b"\x89PNG"


def test_predicted_boxes_are_in_pixels_of_the_image_and_can_be_read_as_data(detector, squares, tmp_path):
    (tmp_path / "images").mkdir()
    for n in range(4):
        with Image.open(squares / "images" / f"{n}.png") as image:
            image.resize((128, 64), Image.Resampling.NEAREST).save(tmp_path / "images" / f"{n}.png")
    files = predict(detector, tmp_path / "images", tmp_path / "out", ["predict.threshold=0.2"])
    assert [file.name for file in files] == ["boxes.csv", *(f"{n}_boxes.png" for n in range(4))]
    with Image.open(files[1]) as image:
        assert image.size == (128, 64)
    rows = list(csv.DictReader(files[0].read_text().splitlines()))
    truth = {row["image"]: row for row in csv.DictReader((squares / "boxes.csv").read_text().splitlines())}
    found = {row["image"]: row for row in reversed(rows)}
    assert set(found) == {f"{n}.png" for n in range(4)}
    for name, row in found.items():
        sides = [[float(one[key]) for key in ("left", "top", "right", "bottom")] for one in (row, truth[name])]
        assert sides[0] == pytest.approx([2 * x for x in sides[1]], abs=12)
        assert row["class"] == truth[name]["class"]
    (tmp_path / "boxes.csv").write_text(files[0].read_text())
    data = build_data(recipe_of(tmp_path, "data.boxes=boxes.csv"))
    assert sum(data.spec["counts"]) <= len(rows)
    with pytest.raises(UserError, match=r"boxes are written to a .csv file, or with pictures to a folder"):
        predict(detector, tmp_path / "images", tmp_path / "out.png")


def test_a_detector_converts_keeps_what_it_knew_and_reports_the_gap(detector, squares, tmp_path):
    given = ["data.size=[32,64]", "optim.lr=3e-3", "optim.ema=0", "attention=linear", f"model.convert_from={detector}"]
    recipe = recipe_of(squares, *given, "trainer.epochs=3", "model.distil.steps=4")  # an epoch
    fit(recipe, run_dir=tmp_path / "run", quiet=True, floors=False)
    test = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    source = json.loads((detector / "metrics.json").read_text())["test"]["map50"]
    assert test["source_map50"] == pytest.approx(source)
    assert test["map50"] > 0.9 * source
    assert "replaced_map50" in test
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert [bool(row["train_transfer"]) for row in rows] == [True, False, False]
    assert [bool(row["train_distance"]) for row in rows] == [False, True, True]
    assert float(rows[2]["train_distance"]) < float(rows[1]["train_distance"])
    assert [file.name for file in predict(tmp_path / "run", squares / "images" / "0.png", tmp_path / "b.csv")] == [
        "b.csv"
    ]


def test_answers_of_two_detectors_differ_by_what_the_other_is_sure_of():
    wanted = torch.tensor([[[4.0, -4.0, 0.1, 0.1, 0.3, 0.3], [-9.0, -9.0, 0.5, 0.5, 0.6, 0.6]]])
    assert float(between_boxes(wanted, wanted)) == pytest.approx(0, abs=1e-6)
    moved = wanted.clone()
    moved[0, 1, 2:] += 0.2  # where the other sees nothing, its sides mean nothing
    assert float(between_boxes(moved, wanted)) < 0.01
    moved = wanted.clone()
    moved[0, 0, 2:] += 0.2
    assert float(between_boxes(moved, wanted)) == pytest.approx(5 * 0.8 * torch.tensor(4.0).sigmoid().item(), rel=0.01)
    moved = wanted.clone()
    moved[0, 0, :2] = -4.0
    assert float(between_boxes(moved, wanted)) > 5
