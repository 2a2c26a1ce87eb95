"""Finding images, classes, masks and parts in folders, lists, tables and archives."""

import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from apps.vision.images import BrokenImage, read_image
from apps.vision.recipe import DataSection
from apps.vision.sources import Store, find_items
from core.training.errors import UserError


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(path)
    return folder


def found(path, task="classes", **options):
    return find_items(path, DataSection(**options), task)


def test_class_folders_at_any_depth_hidden_files_left_out(tmp_path):
    touch(tmp_path, "cat/a.png", "dog/deep/b.PNG", "dog/c.jpg", ".cache/d.png", "loose.png")
    (tmp_path / "cat" / "notes.txt").touch()
    items = found(tmp_path).items
    assert [(item.name, item.label, item.part) for item in items] == [
        ("cat/a.png", "cat", ""),
        ("dog/c.jpg", "dog", ""),
        ("dog/deep/b.PNG", "dog", ""),
    ]


def test_split_folders_are_seen_under_their_usual_names(tmp_path):
    touch(tmp_path, "train/cat/a.png", "valid/cat/b.png", "test/dog/c.png")
    assert {(item.part, item.label) for item in found(tmp_path).items} == {
        ("train", "cat"),
        ("val", "cat"),
        ("test", "dog"),
    }
    # A class that happens to be called train is a class.
    other = touch(tmp_path / "x", "train/a.png", "car/b.png")
    assert {item.label for item in found(other).items} == {"train", "car"}


def test_masks_stand_beside_images_by_name(tmp_path):
    touch(tmp_path, "train/a.jpg", "trainannot/a.png", "val/b.jpg", "valannot/b.png")
    items = found(tmp_path, "segments", images="PART", masks="PARTannot").items
    assert [(item.image, item.mask, item.part) for item in items] == [
        ("train/a.jpg", "trainannot/a.png", "train"),
        ("val/b.jpg", "valannot/b.png", "val"),
    ]
    touch(tmp_path, "train/c.jpg")
    with pytest.raises(UserError, match=r"1 images have no mask of the same name in .*, the first is train/c.jpg"):
        found(tmp_path, "segments", images="PART", masks="PARTannot")
    with pytest.raises(UserError, match=r"no images in trein \(did you mean 'train'\?\)"):
        found(tmp_path, "segments", images="trein", masks="trainannot")


def test_lists_choose_parts_and_what_is_absent_is_counted(tmp_path):
    touch(tmp_path / "set", "cat/cat1.jpg", "cat/cat2.jpg", "dog/dog1.jpg", "dog/dog2.jpg")
    (tmp_path / "train.txt").write_text("cat1.jpg 1\ndog1.jpg 2\ngone.jpg 2\n")
    (tmp_path / "test.txt").write_text("set/dog/dog2.jpg\n")
    some = found(tmp_path, images="set", lists={"train": "train.txt", "test": "test.txt"})
    assert {(item.name, item.label, item.part) for item in some.items} == {
        ("set/cat/cat1.jpg", "cat", "train"),
        ("set/dog/dog1.jpg", "dog", "train"),
        ("set/dog/dog2.jpg", "dog", "test"),
    }
    assert some.notes == {"listed_but_absent": {"train": 1}, "there_but_not_listed": 1}
    (tmp_path / "test.txt").write_text("cat1.jpg\n")
    with pytest.raises(UserError, match=r"test.txt, line 1: cat1.jpg is in the list of train, too"):
        found(tmp_path, images="set", lists={"train": "train.txt", "test": "test.txt"})
    with pytest.raises(UserError, match=r"there is no file .*trains.txt .did you mean 'train.txt'"):
        found(tmp_path, images="set", lists={"train": "trains.txt"})
    touch(tmp_path / "set", "dog/cat1.jpg")
    with pytest.raises(UserError, match=r"line 1: cat1.jpg is there 2 times"):
        found(tmp_path, images="set", lists={"train": "train.txt"})


def test_tables_give_paths_classes_and_parts(tmp_path):
    touch(tmp_path, "pics/a.png", "pics/b.png")
    (tmp_path / "t.csv").write_text("path,label,split\na.png,cat,train\nb.png,cat;dog,VALID\n")
    some = found(tmp_path / "t.csv", "labels", images="pics", part_column="split")
    assert [(item.image, item.label, item.part) for item in some.items] == [
        ("pics/a.png", ["cat"], "train"),
        ("pics/b.png", ["cat", "dog"], "val"),
    ]
    assert some.store.read(some.items[0].image) == tmp_path / "pics" / "a.png"
    with pytest.raises(UserError, match=r"no column 'labl'.*did you mean 'label'"):
        found(tmp_path / "t.csv", label_column="labl")
    (tmp_path / "t.csv").write_text("path,label,split\na.png,cat,tset\n")
    with pytest.raises(UserError, match=r"t.csv, line 2: split is 'tset'; known: train, val, test"):
        found(tmp_path / "t.csv", part_column="split")
    (tmp_path / "t.csv").write_text("path,label\na.png,\n")
    with pytest.raises(UserError, match=r"line 2: label is empty"):
        found(tmp_path / "t.csv")


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_archives_are_read_without_unpacking(tmp_path, kind):
    touch(tmp_path, "train/cat/a.png", "test/dog/b.png")
    archive = tmp_path / f"all.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for name in ("train/cat/a.png", "test/dog/b.png"):
                file.write(tmp_path / name, name)
    else:
        with tarfile.open(archive, "w:gz") as file:
            for name in ("train/cat/a.png", "test/dog/b.png"):
                file.add(tmp_path / name, f"./{name}")
    some = found(archive)
    assert {(item.label, item.part) for item in some.items} == {("cat", "train"), ("dog", "test")}
    assert some.store.read(some.items[0].image)[1:4] == b"PNG"
    archive.write_bytes(archive.read_bytes()[:60])
    with pytest.raises(UserError, match=r"not a whole archive"):
        found(archive)


def test_nothing_to_find_is_said(tmp_path):
    with pytest.raises(UserError, match=r"no images; known suffixes: .jpg"):
        found(tmp_path)
    touch(tmp_path, "a.png")
    with pytest.raises(UserError, match=r"no class folders with images \(class/image.jpg\); 1 images lie elsewhere"):
        found(tmp_path)


def test_folders_that_are_links_are_followed_but_not_round_in_circles(tmp_path):
    far = touch(tmp_path / "far", "deep/a.png", "b.png")
    root = touch(tmp_path / "photos", "dog/c.png")
    (root / "cat").symlink_to(far)
    (root / "lynx").symlink_to(far / "deep")  # a folder that another link leads to, too
    (root / "dog" / "back").symlink_to(root)  # to a folder above
    (far / "deep" / "self").symlink_to(".")
    (root / "dog" / "one.png").symlink_to(far / "b.png")
    (root / "dog" / "gone.png").symlink_to(tmp_path / "gone.png")
    (root / "empty").symlink_to(tmp_path / "nowhere")
    some = found(root)
    assert [(item.name, item.label) for item in some.items] == [
        ("cat/b.png", "cat"),
        ("cat/deep/a.png", "cat"),
        ("dog/c.png", "dog"),
        ("dog/gone.png", "dog"),
        ("dog/one.png", "dog"),
        ("lynx/a.png", "lynx"),
    ]
    with pytest.raises(BrokenImage, match="no such file"):
        read_image(some.store.read("dog/gone.png"), "rgb")


def test_two_folders_that_lead_to_each_other_end(tmp_path):
    root = touch(tmp_path, "a/x.png", "b/y.png")
    (root / "a" / "b").symlink_to(root / "b")
    (root / "b" / "a").symlink_to(root / "a")
    assert [item.name for item in found(root).items] == ["a/b/y.png", "a/x.png", "b/a/x.png", "b/y.png"]
    (root / "b" / "a").unlink()
    linked = tmp_path / "linked"
    linked.symlink_to(root / "a")  # the folder that is given may be a link itself
    assert Store(linked).names() == ["b/y.png", "x.png"]
