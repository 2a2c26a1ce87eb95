"""From files to batches: parts, checks, broken images, copies, sizes."""

import numpy as np
import pytest
import torch
from PIL import Image

from apps.vision.data import build_data
from core.training.data import eval_loader, train_loader
from core.training.errors import UserError
from core.training.recipe import load_recipe

SIZE = ["data.size=32", "model.patch=8"]


def data_of(folder, *more, recipe="vision/folder"):
    return build_data(load_recipe(recipe, [f"data.path={folder}", *SIZE, *more]))


def test_parts_are_drawn_by_class_and_the_same_every_time(colours):
    first, again = data_of(colours), data_of(colours)
    assert first.summary["images"] == {"train": 28, "val": 6, "test": 6}
    assert first.spec == again.spec
    assert first.spec["classes"] == ["blue", "red"]
    assert first.spec["counts"] == [14, 14]
    assert sorted(name.split("/")[0] for name in first.spec["test_names"]) == ["blue"] * 3 + ["red"] * 3
    names = [item.name for part in (first.train, first.val, first.test) for item in part.items]
    assert len(set(names)) == 40


def test_batches_have_one_size_and_evaluation_changes_nothing(colours):
    data = data_of(colours, "model.eval_sizes=[16,[24,40]]")
    batch = next(iter(train_loader(data, batch_size=5, seed=0)))
    assert batch["image"].shape == (5, 3, 32, 32)
    assert batch["image"].dtype == torch.uint8
    one, two = (next(iter(eval_loader(data, "test", batch_size=4))) for _ in range(2))
    assert torch.equal(one["image"], two["image"])
    assert one["part"] == "test"
    assert {name: tuple(x.shape[2:]) for name, (x, _) in one["sizes"].items()} == {
        "at_16x16": (16, 16),
        "at_24x40": (24, 40),
    }


def test_limit_takes_each_class_with_its_share(colours):
    data = data_of(colours, "data.limit=10")
    assert data.spec["counts"] == [5, 5]
    assert data.summary["train_images_not_used"] == 18
    # The validation and test parts are what they were.
    assert data.spec["test_names"] == data_of(colours).spec["test_names"]


def test_broken_images_are_an_error_or_left_out_and_named(colours, tmp_path):
    for name in ("red", "blue"):
        (tmp_path / name).mkdir()
        for path in sorted((colours / name).iterdir())[:8]:
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    (tmp_path / "red" / "x1.png").write_bytes(b"")
    (tmp_path / "red" / "x2.png").write_bytes(next((colours / "red").iterdir()).read_bytes()[:500])
    with pytest.raises(UserError, match=r"cannot read red/x1.png: not an image \(and 1 more\); data.on_broken=skip"):
        data_of(tmp_path)
    data = data_of(tmp_path, "data.on_broken=skip")
    assert sum(data.summary["images"].values()) == 16
    assert data.summary["broken"]["count"] == 2
    assert [line.split(":")[0] for line in data.summary["broken"]["files"]] == ["red/x1.png", "red/x2.png"]
    with pytest.raises(UserError, match=r"red/x1.png"):
        data_of(tmp_path, "data.cache=false")


def test_copies_between_parts_are_found(colours, tmp_path):
    for part in ("train", "test"):
        for name in ("red", "blue"):
            (tmp_path / part / name).mkdir(parents=True)
            for path in sorted((colours / name).iterdir())[:6]:
                (tmp_path / part / name / path.name).write_bytes(path.read_bytes())
    found = data_of(tmp_path).summary["copies_between_parts"]
    assert found["count"] == 12
    assert "(test) = " in found["files"][0] or "(val)" in found["files"][0]


def test_given_parts_without_validation_give_some_of_training(colours, tmp_path):
    for part, names in (("train", slice(0, 14)), ("test", slice(14, 20))):
        for name in ("red", "blue"):
            (tmp_path / part / name).mkdir(parents=True)
            for path in sorted((colours / name).iterdir())[names]:
                (tmp_path / part / name / path.name).write_bytes(path.read_bytes())
    assert data_of(tmp_path).summary["images"] == {"train": 24, "val": 4, "test": 12}


def test_images_that_are_not_kept_are_the_same(colours):
    kept, read = data_of(colours), data_of(colours, "data.cache=false")
    one, two = (next(iter(eval_loader(data, "test", batch_size=6))) for data in (kept, read))
    assert torch.equal(one["image"], two["image"])
    assert read.summary["rows_x_columns"]["train"] == "read one by one"


def test_masks_are_checked_against_the_classes(halves, tmp_path):
    given = ["data.images=PART", "data.masks=PARTannot"]
    data = data_of(halves, *given, "data.ignore=255", recipe="vision/segmentation")
    assert data.spec["classes"] == ["0", "1"]
    assert data.summary["images"] == {"train": 16, "val": 4, "test": 4}
    batch = next(iter(train_loader(data, batch_size=4, seed=0)))
    assert batch["mask"].shape == (4, 32, 32)
    assert set(batch["mask"].unique().tolist()) <= {0, 1, 255}
    held = next(iter(eval_loader(data, "test", batch_size=4)))
    assert {tuple(mask.shape) for mask in held["mask"]} == {(40, 48)}
    more = [*given, "data.classes=[dark,bright]"]
    with pytest.raises(UserError, match=r"the mask of .* holds the number 255; known: 0 to 1; data.ignore=N"):
        data_of(halves, *more, recipe="vision/segmentation")
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "images" / "a.png")
    Image.fromarray(np.zeros((8, 9), dtype=np.uint8)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(UserError, match=r"a.png: its mask has \[8, 9\] pixels, the image \[8, 8\]"):
        data_of(tmp_path, recipe="vision/segmentation")


def test_one_class_or_an_unknown_class_is_no_task(colours, tmp_path):
    (tmp_path / "only").mkdir()
    for path in (colours / "red").iterdir():
        (tmp_path / "only" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"one class \(only\) leaves nothing to learn"):
        data_of(tmp_path)
    with pytest.raises(UserError, match=r"unknown class 'blue'; known: red, green|unknown class 'blue'.*did you mean"):
        data_of(colours, "data.classes=[red,green]")


def test_several_labels_per_image(colours, tmp_path):
    lines = [f"{colours}/{path.parent.name}/{path.name},{path.parent.name};any" for path in colours.rglob("*.png")]
    (tmp_path / "t.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    data = data_of(tmp_path / "t.csv", "model.task=labels", "augment.cutmix=0", "augment.smoothing=0")
    batch = next(iter(train_loader(data, batch_size=5, seed=0)))
    assert data.spec["classes"] == ["any", "blue", "red"]
    assert batch["label"].shape == (5, 3)
    assert batch["label"][:, 0].tolist() == [1.0] * 5


def test_grey_images_and_mean_of_the_data(colours):
    data = data_of(colours, "data.channels=grey")
    batch = next(iter(eval_loader(data, "test", batch_size=2)))
    assert batch["image"].shape[1] == 1
    assert len(data.spec["mean"]) == 1
    colour = data_of(colours).spec["mean"]
    assert abs(colour[0] - 130 / 255) < 0.02  # half the images have 200 red, half 60
    assert abs(colour[1] - 60 / 255) < 0.02
    with pytest.raises(UserError, match=r"must have 1 numbers for data.channels=grey"):
        data_of(colours, "data.channels=grey", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]")


def test_a_missing_folder_says_where_to_get_it(monkeypatch, tmp_path):
    monkeypatch.delenv("LONGSPAN_DATA", raising=False)
    with pytest.raises(UserError, match=r"trashnet is not here \(LONGSPAN_DATA is not set\).*garythung/trashnet"):
        build_data(load_recipe("vision/trashnet"))
    with pytest.raises(UserError, match=r"data.path: there is no file"):
        data_of(tmp_path / "gone")
