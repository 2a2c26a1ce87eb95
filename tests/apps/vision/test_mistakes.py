"""What goes wrong with a user's files: one line that says what, where and what would be right, and nothing silent."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from apps.vision.boxes import _sides
from apps.vision.data import build_data
from apps.vision.images import read_image
from core.training.data import eval_loader
from core.training.errors import UserError
from core.training.figures import draw_confusion
from core.training.fit import fit
from core.training.predict import predict
from core.training.recipe import load_recipe

SIZE = ["data.size=32", "model.patch=8"]


def data_of(path, *more, recipe="vision/folder"):
    return build_data(load_recipe(recipe, [f"data.path={path}", *SIZE, *more]))


def refused(path, *more, recipe="vision/folder"):
    with pytest.raises(UserError) as error:
        data_of(path, *more, recipe=recipe)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def photos(tmp_path):
    """Class folders red and blue with four images each."""
    for name, value in (("red", 200), ("blue", 60)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for n in range(4):
            Image.fromarray(np.full((10, 12, 3), value + n, np.uint8)).save(tmp_path / "photos" / name / f"{n}.png")
    return tmp_path / "photos"


def table(path, *lines):
    path.write_text(
        "\n".join(["path,label", *(f"{name}/{n}.png,{name}" for name in ("red", "blue") for n in range(4))])
    )
    with path.open("a") as file:
        file.write("\n" + "\n".join(lines) + "\n")
    return path


def test_an_image_that_breaks_late_is_named_by_the_loader(photos):
    for path in list(photos.rglob("*.png")):  # a JPEG's head is whole where its body is cut off
        noise = np.random.randint(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path.with_suffix(".jpg"))
        path.with_suffix(".jpg").write_bytes(path.with_suffix(".jpg").read_bytes()[:1500])
        path.unlink()
    with pytest.raises(UserError, match=r"cannot read (red|blue)/\d.jpg: .*; data.cache=true finds such files before"):
        data_of(photos, "data.cache=false")


def test_rows_of_a_table_are_named(photos):
    place = photos / "t.csv"
    assert refused(table(place, "red/9.png,red")) == (
        "cannot read red/9.png (" + f"{place}, line 10): no such file or directory; "
        "data.on_broken=skip leaves such images out and names them"
    )
    said = f"{place}, line 10: red/0.png stands in {place}, line 2, too; each image has one row"
    assert refused(table(place, "red/0.png,red")) == said
    assert refused(table(place, "red/0.png,blue")) == said
    assert refused(table(place, ",blue")) == f"{place}, line 10: path is empty"
    for label in ("NaN", "", "null"):
        Image.new("RGB", (9, 9)).save(photos / "new.png")
        assert f"{place}, line 10: label is {label or 'empty'}, which is no class" == refused(
            table(place, f"new.png,{label}")
        )
    table(place, "new.png,")
    data = data_of(place, "model.task=labels", "augment.cutmix=0", "augment.smoothing=0")
    assert data.spec["classes"] == ["blue", "red"]  # an image may have no label


def test_one_image_is_no_data(photos):
    assert "0.png is one image; data.path is a folder of class folders" in refused(photos / "red" / "0.png")


def test_a_link_to_nothing_is_no_misspelling(photos):
    (photos / "link").symlink_to(photos / "gone")
    assert "is a link to" in refused(photos / "link")
    (photos / "red" / "link.png").symlink_to(photos / "gone.png")
    assert refused(photos).startswith("cannot read red/link.png: no such file or directory; data.on_broken=skip")


def test_folders_and_classes_without_images_are_said(photos, caplog):
    (photos / "green").mkdir()
    (photos / "grey").mkdir()
    (photos / "grey" / "a.heic").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        data = data_of(photos, "data.classes=[red,blue,green]", "data.test_share=0.1")
    assert data.summary["without_images"] == ["green (empty)", "grey (.heic)"]
    assert "folders without an image that can be read are no class: green (empty), grey (.heic)" in caplog.text
    assert "no training image shows green, so nothing can be learned of it" in caplog.text
    assert "no image for test: data.test_share=0.1 of each class is less than half an image" in caplog.text
    assert "no image for val" not in caplog.text
    (photos / "green").rmdir()
    for part in ("train", "val"):
        (photos.parent / "split" / part).mkdir(parents=True)
        for name in ("red", "blue"):
            (photos.parent / "split" / part / name).symlink_to(photos / name)
    (photos.parent / "split" / "train" / "green").mkdir()
    assert data_of(photos.parent / "split").summary["without_images"] == ["train/green (empty)"]


def test_parts_without_training_images_are_told(photos):
    (photos / "t.csv").write_text("path,label,split\nred/0.png,red,val\nblue/0.png,blue,test\nblue/1.png,blue,test\n")
    said = refused(photos / "t.csv", "data.part_column=split")
    assert said == "no image belongs to the training part; there are: val 1, test 2"


def masks(folder, values, number=6):
    for name in ("images", "masks"):
        (folder / name).mkdir(exist_ok=True)
    for n in range(number):
        Image.fromarray(np.full((10, 12, 3), n, np.uint8)).save(folder / "images" / f"{n}.png")
        mask = np.resize(np.array(values if n == 1 else values[:1]), (10, 12))
        Image.fromarray(mask.astype(np.uint16 if max(values) > 255 else np.uint8)).save(folder / "masks" / f"{n}.png")
    return folder


@pytest.mark.parametrize(
    ("values", "given", "said"),
    [
        ([0, 1, 40000], [], "the masks hold 0, 1, 40000 but no 2 (the first with 40000 is that of images/1.png)"),
        ([0, 1, 255], [], "name the classes, data.classes=[road,sky,...], or leave a number out, data.ignore=255"),
        ([0], [], "the masks hold no number but 0, which leaves nothing to learn"),
        ([255], ["data.ignore=255"], "the masks hold no number that is scored, which leaves nothing to learn"),
    ],
)
def test_numbers_of_masks_without_names_have_no_gap(tmp_path, values, given, said):
    assert said in refused(masks(tmp_path, values), *given, recipe="vision/segmentation")


def test_masks_that_are_read_late_are_held_against_the_classes(tmp_path):
    given = ["data.cache=false", "data.classes=[a,b]"]
    assert "its mask holds the number 7; known: 0 to 1" in refused(
        masks(tmp_path, [7]), *given, recipe="vision/segmentation"
    )


@pytest.mark.parametrize("sides", [("nan", 0, 5, 5), (5, 0, 4, 5), (0, 5, 5, 4), ("inf", 0, 5, 5)])
def test_boxes_that_run_backwards_or_nowhere_are_no_boxes(sides):
    with pytest.raises(ValueError, match=r"not finite|come after left and top"):
        _sides(sides)


def test_names_in_any_script_are_drawn(tmp_path):
    labels = np.array([0, 1, 1])
    assert draw_confusion(tmp_path / "c.png", labels, labels, ["日本語", "ö & ü"], "images").is_file()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_upright(tmp_path, orientation):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255  # the upper left corner
    stored = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    stored |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    image = Image.fromarray(upright)
    if orientation > 1:
        image = image.transpose(Image.Transpose[stored[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "a.png", "grey")[0], torch.from_numpy(upright[..., 0]))


def test_too_many_workers_are_refused(colours):
    with pytest.raises(UserError, match=r"trainer.workers=1000 is too many for \d+ cores: at most \d+ here"):
        eval_loader(data_of(colours), "test", batch_size=4, workers=1000)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["model.eval_sizes=[32,50]"], "model.eval_sizes: [50, 50] does not divide into patches of 8; the nearest is"),
        (["augment.sizes=[20]"], "augment.sizes: [20, 20] does not divide into patches of 8; the nearest is [16, 16]"),
        (
            ["attention={variant: linformer, max_length: 16}", "model.eval_sizes=[64]"],
            "64 x 64 pixels: linformer was built for at most 16 keys, got 64; raise max_length",
        ),
        (["augment.rand_augment=rnd-m9"], "timm does not know 'rnd-m9'; it reads words such as rand-m9-mstd0.5-inc1"),
        (["predict.window=32"], "predict.window is for masks, the task is classes"),
        (["data.classes=[red]"], "data.classes names 1, which leaves nothing to tell apart"),
    ],
)
def test_what_cannot_be_shows_before_training(colours, tmp_path, given, said):
    small = ["backbone.dim=16", "backbone.depth=1", "backbone.heads=2", "model.stem=patch", "trainer.accelerator=cpu"]
    with pytest.raises(UserError) as error:
        fit("vision/folder", overrides=[f"data.path={colours}", *SIZE, *small, *given], run_dir=tmp_path / "run")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_answer_that_breaks_off_leaves_the_one_before(classifier, colours, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes((colours / "red" / "red0.png").read_bytes())
    before = predict(classifier, tmp_path / "in", tmp_path / "answers.csv")[0].read_text()
    (tmp_path / "in" / "b.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"b.png: not an image"):
        predict(classifier, tmp_path / "in", tmp_path / "answers.csv")
    assert (tmp_path / "answers.csv").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.csv", "in"]
